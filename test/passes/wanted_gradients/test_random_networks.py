"""Random networks of frozen and trained layers, activations and pools.

By default 12, always the same. ``CONVBN_FUZZ_EXAMPLES=3000`` draws that many, and
``CONVBN_FUZZ_SEED=7`` other ones; a failing example prints as source code.

Forward bits are eval mode's. So is every bit of the gradients where no other sum is computed than
in eval mode: where no layer is frozen and no batch norm fused, and not in channels-last, where a
mask made of bits lies otherwise, so that aten's kernels sum in another order. Else each gradient's
error against float64 is at most a few times the largest of eval mode.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
from random import Random

import hypothesis
import torch
from common import fuzz, spread_statistics
from hypothesis import strategies as st
from passes.wanted_gradients.wanted import compare, same
from torch import nn

from convbn_inductor_pass import Code, testing

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MAX_POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
ADAPTIVE_POOLS = {1: nn.AdaptiveMaxPool1d, 2: nn.AdaptiveMaxPool2d, 3: nn.AdaptiveMaxPool3d}
AVERAGE_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
ACTIVATIONS = (
    *("ReLU()", "ReLU()", "ReLU(inplace=True)", "ReLU6()", "ReLU6(inplace=True)"),
    *("Hardtanh(-0.5, 2.0)", "LeakyReLU(0.1)", "Threshold(0.25, 0.0)", "RReLU()"),
    *("SiLU()", "ELU()", "Hardswish()", "Sigmoid()", "Softplus()"),
)


@dataclasses.dataclass
class Drawn:
    """A network and how it is run."""

    model: nn.Module
    x: torch.Tensor
    autocast: bool
    dynamic: bool

    def __repr__(self) -> str:
        frozen = [n for n, p in self.model.named_parameters() if not p.requires_grad]
        shape = tuple(self.x.shape)
        return (
            f"{self.model}\nfrozen {frozen}\nx {shape} {self.x.stride()} {self.x.dtype} "
            f"requires_grad={self.x.requires_grad} autocast={self.autocast} dynamic={self.dynamic}"
        )


class Chain(nn.Module):
    """Layers one after the other; some results are added to, or returned."""

    def __init__(self, layers: list[nn.Module], skips: list[tuple[int, int]], returned: list[int]):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.skips, self.returned = skips, returned

    def extra_repr(self) -> str:
        return f"skips={self.skips}, returned={self.returned}"

    def forward(self, x):
        values = [x]
        for i, layer in enumerate(self.layers):
            value = layer(values[-1])
            for source, target in self.skips:
                if target == i and values[source].shape == value.shape:
                    value = value + values[source]
            values.append(value)
        return [values[-1], *(values[i] for i in self.returned)]


def draw_network(seed: int) -> Drawn | None:
    """The network of a seed; None if its sizes are too small for its kernels."""
    random = Random(seed)

    def chance(percent):
        return random.randrange(100) < percent

    def pick(*values):
        return random.choice(values)

    torch.manual_seed(seed)
    rank = pick(2, 2, 2, 2, 1, 3)
    channels = pick(3, 4, 8)
    x = torch.randn(pick(1, 2, 8), channels, *(pick(7, 8, 12) for _ in range(rank)))
    if rank == 3:
        x = x[..., :6].contiguous()
    freeze_layers, freeze_norms = pick(0, 50, 100), pick(0, 50, 100)
    layers: list[nn.Module] = []

    def add(layer, percent=0):
        layer.eval()
        if chance(percent):
            layer.requires_grad_(False)
            if getattr(layer, "bias", None) is not None and chance(30):
                layer.bias.requires_grad_(True)
        layers.append(layer)

    for _ in range(pick(1, 2, 3, 4)):
        kind = pick("conv", "conv", "conv", "depthwise", "transposed")
        kernel, stride, padding = pick(1, 2, 3), pick(1, 1, 2), pick(0, 1)
        if kind == "depthwise":
            arguments, out = {"groups": channels}, channels * pick(1, 2)
        else:
            arguments, out = {"dilation": pick(1, 1, 2)}, pick(4, 8, 16)
        make = TRANSPOSED[rank] if kind == "transposed" else CONVS[rank]
        padding = min(padding, kernel - 1)
        add(
            make(channels, out, kernel, stride, padding, bias=chance(50), **arguments),
            freeze_layers,
        )
        channels = out
        if chance(60):
            add(spread_statistics(NORMS[rank](channels), len(layers)), freeze_norms)
        pool = pick("none", "none", "max", "max", "adaptive", "average")
        if chance(85):
            add(eval(f"nn.{pick(*ACTIVATIONS)}"))
        if pool == "max":
            kernel = pick(2, 3)
            # Not both: a window of padding alone has PyTorch write out of bounds (2.13, CPU).
            padding, dilation = pick((0, 1), (0, 1), (1, 1), (0, 2))
            options = {"padding": padding, "dilation": dilation, "ceil_mode": chance(30)}
            add(MAX_POOLS[rank](kernel, pick(1, 2), **options))
        elif pool == "adaptive":
            add(ADAPTIVE_POOLS[rank](pick(1, 2, 3)))
        elif pool == "average":
            add(AVERAGE_POOLS[rank](2, pick(1, 2)))
    n = len(layers)
    skips = [(random.randrange(n), random.randrange(n)) for _ in range(2)]
    skips = [(source, target) for source, target in skips if source <= target and chance(50)]
    returned = [random.randint(1, n)] if chance(15) else []
    model = Chain(layers, skips, returned)
    try:
        outputs = model(x)
    except RuntimeError:
        return None
    if not all(o.numel() for o in outputs):
        return None
    # Three channels: PyTorch's weight gradient of a 1x1 convolution with stride 2 would write out
    # of bounds (2.13, CPU).
    if rank == 2 and chance(30) and x.shape[1] != 3:
        x = x.contiguous(memory_format=torch.channels_last)
        model = model.to(memory_format=torch.channels_last)
    dtype = pick(torch.float32, torch.float32, torch.float64)
    trains = any(p.requires_grad for p in model.parameters())
    x = x.to(dtype).requires_grad_(not trains or chance(60))
    autocast = dtype is torch.float32 and chance(20) and not _has_single_positions(layers, x)
    return Drawn(model.to(dtype), x, autocast, chance(15))


def _has_single_positions(layers: list[nn.Module], x: torch.Tensor) -> bool:
    """Whether a map shrinks to one position: there bfloat16's weight gradients are not computed.

    oneDNN leaves part of them as the memory was, in eager mode, too (2.13, CPU).
    """
    found = False
    with torch.no_grad():
        for layer in layers:
            x = layer(x)
            found = found or x[0, 0].numel() == 1
    return found


def check(drawn: Drawn, counts: collections.Counter) -> None:
    compared = compare(drawn.model, drawn.x, dynamic=drawn.dynamic, autocast=drawn.autocast)
    records = [r for result in compared.results for r in result.records]
    done = [r.code for r in records if r.code.rewritten]
    counts.update(code.name for code in set(done))
    counts["networks"] += 1
    other_sums = {Code.FUSED, Code.WEIGHT_COPY, Code.SHAPE_ONLY} & set(done)
    if not other_sums and drawn.x.is_contiguous():
        same(compared.gradients, compared.plain_gradients)
        return
    reference = copy.deepcopy(drawn.model).double()
    x = drawn.x.detach().double().requires_grad_(drawn.x.requires_grad)
    _, exact = testing.outputs_and_gradients(reference, dict(reference.named_parameters()), (x,))
    narrow = torch.bfloat16 if drawn.autocast else drawn.x.dtype
    assert compared.gradients.keys() == compared.plain_gradients.keys() == exact.keys()
    # Relative to the largest element of each gradient; the largest error of any of them, because
    # a scale's gradient is made of a weight's.
    scales = {n: float(t.abs().max()) or 1.0 for n, t in exact.items()}

    def errors(gradients):
        return {n: float((gradients[n] - t).abs().max()) / scales[n] for n, t in exact.items()}

    mine, plain = errors(compared.gradients), errors(compared.plain_gradients)
    allowed = 8 * max(plain.values()) + 64 * torch.finfo(narrow).eps
    for name, error in mine.items():
        assert compared.gradients[name].dtype == compared.plain_gradients[name].dtype
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def test_random_networks() -> None:
    counts: collections.Counter = collections.Counter()

    @fuzz(12)
    @hypothesis.given(st.integers(0, (1 << 32) - 1).map(draw_network))
    def run(drawn: Drawn | None) -> None:
        hypothesis.assume(drawn is not None)
        check(drawn, counts)

    run()
    print(dict(counts.most_common()))
    rules = (Code.SHAPE_ONLY, Code.MASK_FROM_OUTPUT, Code.MASK_AFTER_POOLING, Code.FUSED)
    for code in rules:  # else the draws test nothing
        assert counts[code.name] >= max(1, counts["networks"] // 24)
