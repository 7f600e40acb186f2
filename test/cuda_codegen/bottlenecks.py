"""The process that lowers a stack of ResNet bottlenecks for a pretended H100.

``python bottlenecks.py lower float32 all eval ours ...`` prints, as JSON by provider, the figures
of ``python -m bench cuda-codegen`` and which kernels spill registers on an H100. ``interpret``
instead of ``lower`` runs the generated code on CPU and prints its errors and eager mode's against
float64.
"""

from __future__ import annotations

import os
import sys

if sys.argv[1] == "interpret":
    os.environ["TRITON_INTERPRET"] = "1"

from bench.cuda_codegen import pretended_gpu  # noqa: F401  before PyTorch

# isort: split
import contextlib
import copy
import json
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.cases import CASES, Case
from bench.cuda_codegen.__main__ import figures
from bench.cuda_codegen.lowering import lower
from bench.cuda_codegen.recording import Lowered
from bench.providers import PROVIDERS, Provider
from bench.workload import Settings
from convbn_inductor_pass import PassFailedWarning


def conv_bn(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


Activation = Callable[[Tensor], Tensor]


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.reduce, self.expand = conv_bn(inputs, width, 1), conv_bn(width, 4 * width, 1)
        self.middle = conv_bn(width, width, 3, stride)
        same = inputs == 4 * width and stride == 1
        self.shortcut = nn.Identity() if same else conv_bn(inputs, 4 * width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.middle(self.activation(self.reduce(x))))
        return self.activation(self.expand(y) + self.shortcut(x))


def stack(width: int, activation: Activation = torch.relu) -> nn.Sequential:
    """Stem and two bottlenecks: one that halves the map, one that keeps it."""
    return nn.Sequential(
        conv_bn(3, width, 7, 2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        Bottleneck(width, width, 2, activation),
        Bottleneck(4 * width, width, 1, activation),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 1000),
    )


SMALL = (3, 16, 16)
CASES["bottlenecks"] = Case("bottlenecks", "test", lambda: stack(64), small_shape=SMALL)
CASES["narrow"] = Case("narrow", "test", lambda: stack(4), SMALL, 2, small_shape=SMALL)
# Where rounding to bfloat16 flips a ReLU, gradients say little.
CASES["smooth"] = Case(
    "smooth", "test", lambda: stack(4, torch.sigmoid), SMALL, 2, small_shape=SMALL
)
FROZEN_LAYERS = Provider("frozen", "", mode="tune", options={"fuse_frozen_layers": True})


def lowered(case: str, precision: str, protocol: str, provider: str) -> Lowered:
    settings = Settings(
        case,
        CASES[case].batch,
        CASES[case].shape,
        protocol,
        precision,
        memory_format="channels_last",
        device="cuda",
    )
    return lower(settings, FROZEN_LAYERS if provider == "frozen" else PROVIDERS[provider])


def lowered_figures(precision: str, protocol: str, *providers: str) -> dict[str, object]:
    from bench.cuda_codegen.cubins import Cubin, compile_kernel

    result: dict[str, object] = {}
    seen: set[str] = set()
    for name in providers:
        one = lowered("bottlenecks", precision, protocol, name)
        cubins: list[Cubin] = []
        for kernel, source in one.kernels.items():
            nameless = source.replace(kernel, "kernel")
            if nameless not in seen:
                seen.add(nameless)
                cubins += compile_kernel(kernel, source)
        spills = [f"{c.kernel}, {c.configuration}" for c in cubins if c.spilled_bytes]
        result[name] = {"values": figures(one), "compiled": len(cubins), "spills": spills}
    return result


def interpreted_errors(precision: str, protocol: str, *providers: str) -> dict[str, object]:
    """By provider and tensor: errors of the generated code and of eager mode, and whether the
    outputs have the bits of the first provider's."""
    from bench.cuda_codegen.interpreter import run_step

    case = "narrow" if precision == "float32" else "smooth"
    result, first = {}, None
    for name in providers:
        one = lowered(case, precision, protocol, name)
        torch.default_generator.manual_seed(0)
        x = torch.randn(2, *SMALL).contiguous(memory_format=torch.channels_last)
        outputs, gradients = run_step(one, (x,))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision != "float32"):
            eager = step(copy.deepcopy(one.model), x, protocol)
        exact = step(copy.deepcopy(one.model).double(), x.double(), protocol)
        tensors = {"output": outputs[0], **gradients}
        assert tensors.keys() == exact.keys(), f"{tensors.keys()} instead of {exact.keys()}"
        errors = {n: (error(tensors[n], exact[n]), error(eager[n], exact[n])) for n in exact}
        first = outputs[0] if first is None else first
        result[name] = {"errors": errors, "same_bits": torch.equal(outputs[0], first)}
    return result


def step(model: nn.Module, x: Tensor, protocol: str) -> dict[str, Tensor]:
    (output,) = model(x)
    if protocol == "inference":
        return {"output": output}
    output.backward(torch.ones_like(output))
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), **gradients}


def error(value: Tensor, exact: Tensor) -> float:
    """Relative, of all elements together."""
    return ((value.double() - exact).norm() / exact.norm()).item()


if __name__ == "__main__":
    warnings.simplefilter("error", PassFailedWarning)
    run = {"lower": lowered_figures, "interpret": interpreted_errors}[sys.argv[1]]
    with contextlib.redirect_stdout(sys.stderr):
        found = run(*sys.argv[2:])
    print(json.dumps(found))
