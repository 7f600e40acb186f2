"""Parallel branches become one convolution, and only where their sum is one."""

from __future__ import annotations

import copy

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from common import fastest, fuzz, spread_statistics
from hypothesis import strategies as st
from torch import Tensor, nn

import convbn_inductor_pass as cbn
from bench.models.repvgg import RepVGG
from convbn_inductor_pass import ForwardCode, _inductor, kernels, testing, timing

pytestmark = pytest.mark.skipif(
    not _inductor.has_onednn_epilogues(torch.float32), reason="needs oneDNN"
)


@pytest.fixture(autouse=True)
def always_packed(monkeypatch):
    monkeypatch.setattr(timing, "seconds", fastest(kernels.PACKED))


def compiled(model, *inputs, backend=None, **options):
    """The compiled model after a first call, and the records of that."""
    cbn.clear_records()
    with cbn.options(**{"forward": "auto", **options}):
        function = torch.compile(model, backend=backend or testing.post_grad_backend())
        function(*inputs)
    return function, cbn.forward_records()


def merged(model, *inputs, tolerance=1e-4, **options) -> list[str]:
    """Layers whose weights another one's contains; the outputs are those of eager mode."""
    with testing.fresh_compile(), torch.no_grad():
        expected = model(*inputs)
        function, records = compiled(model, *inputs, **options)
        out = function(*inputs)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    return [r.layer for r in records if r.code is ForwardCode.MERGED]


class Sum(nn.Module):
    """``act(bn(conv_1(x)) + bn(conv_2(x)) + ... [+ bn(x)])``."""

    def __init__(self, *convs: nn.Module, identity: bool = False, act=F.relu) -> None:
        super().__init__()
        self.convs, self.act = nn.ModuleList(convs), act
        norms = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
        norm = norms[convs[0].weight.ndim - 2]
        self.norms = nn.ModuleList(norm(c.out_channels) for c in convs)
        self.identity = norm(convs[0].in_channels) if identity else None
        torch.manual_seed(0)
        spread_statistics(self)
        self.eval()

    def terms(self, x: Tensor) -> list[Tensor]:
        terms = [norm(conv(x)) for conv, norm in zip(self.convs, self.norms, strict=True)]
        return terms if self.identity is None else [*terms, self.identity(x)]

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.terms(x)
        for other in others:
            first = first + other
        return self.act(first)


def conv(kernel, inputs=6, outputs=6, dim=2, **arguments) -> nn.Module:
    kinds = {2: nn.Conv2d, 3: nn.Conv3d}
    return kinds[dim](inputs, outputs, kernel, **{"bias": False, **arguments})


@pytest.mark.parametrize("backend", [None, "inductor"])
def test_repvgg(backend):
    model = spread_statistics(RepVGG((8, 8, 16, 32), (2, 2, 2, 1)).eval())
    names = merged(model, torch.randn(2, 3, 64, 64), backend=backend)
    blocks = ("stem", *(f"stages.{i}.{j}" for i in range(3) for j in range(2)), "stages.3.0")
    assert names == [f"{block}.narrow.0" for block in blocks]


@pytest.mark.parametrize(
    "branches",
    [
        [conv(1), conv(3, padding=1)],
        [conv(3, padding=1, stride=2), conv(1, stride=2, bias=True)],
        [conv(5, padding=2), conv(3, padding=1), conv(1), conv(3, padding=1, bias=True)],
        [conv(3, padding=1, groups=3), conv(1, groups=3)],
        [conv(3, padding=1, groups=6), conv(1, groups=6), conv(3, padding=1, groups=6)],
        [conv(3, padding=2, dilation=2), conv(1), conv((3, 1), padding=(2, 0), dilation=(2, 1))],
        [conv((3, 5), padding=(1, 2)), conv((1, 3), padding=(0, 1)), conv((3, 1), padding=(1, 0))],
        [conv(2, padding=1, stride=3), conv(1, stride=3)],
        [conv(1, outputs=4), conv(1, outputs=4)],
        [conv(3, padding=1, dim=3), conv(1, dim=3), conv((1, 1, 3), padding=(0, 0, 1), dim=3)],
    ],
)
@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_geometries(branches, identity, dtype):
    if not _inductor.has_onednn_epilogues(dtype):
        pytest.skip("no such kernels here")
    branches = [copy.deepcopy(b) for b in branches]
    same = branches[0].stride[0] == 1 and branches[0].out_channels == branches[0].in_channels
    if identity and not same:
        pytest.skip("no identity changes sizes")
    model = Sum(*branches, identity=identity).to(dtype)
    x = torch.randn(2, 6, *([7, 8, 5][: branches[0].weight.ndim - 2]), dtype=dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    # In bfloat16 nothing is added in oneDNN's convolution, as elsewhere: it may raise.
    adds = identity and dtype == torch.bfloat16
    assert len(merged(model, x, tolerance=tolerance)) == (0 if adds else len(branches) - 1)


@pytest.mark.parametrize(
    "act", [F.relu, F.silu, F.hardswish, torch.sigmoid, torch.sin, lambda x: x]
)
def test_what_follows(act):
    assert merged(Sum(conv(3, padding=1), conv(1), identity=True, act=act), torch.randn(2, 6, 8, 8))


def test_terms_in_any_order():
    """Branches apart from each other in the sum, twice the same term, and other convolutions."""

    class Block(Sum):
        def forward(self, x):
            a, b, c, d, i = self.terms(x)
            return F.relu((i + (a + x)) + ((c + x) + (d + b)))

    model = Block(
        *(conv(1), conv((1, 5), padding=(0, 2)), conv(3, padding=1), conv((3, 1), padding=(1, 0))),
        identity=True,
    )
    x = torch.randn(2, 6, 8, 8)
    for backend in (None, "inductor"):
        assert sorted(merged(model, x, backend=backend)) == ["convs.0", "convs.3"]
        wide = next(r for r in cbn.forward_records() if "parallel" in r.detail)
        assert (wide.layer, wide.epilogue) == ("convs.2", "add+relu")


def test_a_residual_is_added_to_the_sum():
    class Block(Sum):
        def forward(self, x, y):
            a, b = self.terms(x)
            return F.relu((a + b) + y)

    inputs = torch.randn(2, 6, 8, 8), torch.randn(2, 6, 8, 8)
    assert merged(Block(conv(3, padding=1), conv(1)), *inputs) == ["convs.1"]
    wide = next(r for r in cbn.forward_records() if r.code is ForwardCode.FOLDED)
    assert wide.epilogue == "add+relu"


@pytest.mark.parametrize("backend", [None, "inductor"])
def test_autocast(backend):
    """Each convolution has a cast of the input of its own."""
    if not _inductor.has_onednn_epilogues(torch.bfloat16):
        pytest.skip("no such kernels here")
    model, x = Sum(conv(3, padding=1), conv(1)), torch.randn(2, 6, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert merged(model, x, tolerance=0.1, backend=backend) == ["convs.1"]


def test_norms_in_another_dtype():
    """What is added is in float32, what one convolution would compute is not."""
    if not _inductor.has_onednn_epilogues(torch.bfloat16):
        pytest.skip("no such kernels here")

    class Wide(Sum):
        def forward(self, x):
            convs = zip(self.convs, self.norms, strict=True)
            a, b = (norm(conv(x).float()) for conv, norm in convs)
            return a + b

    model = Wide(conv(3, padding=1), conv(1))
    model.convs.bfloat16()
    assert merged(model, torch.randn(2, 6, 8, 8).bfloat16(), tolerance=0.1) == []


def test_long_sums():
    """Deeper than Python's stack, and one whose terms double in each step."""

    class Long(Sum):
        def forward(self, x):
            a, b, c = self.terms(x)
            for _ in range(1200):
                a = a + x
            for _ in range(40):
                c = c + c
            return a + b, c

    model = Long(conv(3, padding=1), conv(1), conv(1))
    assert merged(model, torch.randn(1, 6, 4, 4)) == ["convs.1"]


def test_every_change_shows():
    model, x = Sum(conv(3, padding=1), conv(1, bias=True), identity=True), torch.randn(2, 6, 8, 8)
    with testing.fresh_compile(), torch.no_grad():
        function, _ = compiled(model, x)
        before = function(x).clone()
        torch.testing.assert_close(function(x), model(x), rtol=1e-4, atol=1e-4)
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        changed = 0
        for name, tensor in tensors.items():
            if not tensor.is_floating_point() or name.startswith("identity"):
                continue
            (tensor.data if name.startswith("convs") else tensor).view(-1)[1].mul_(1.5).add_(0.5)
            out = function(x).clone()
            torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-4, msg=name)
            assert not torch.equal(out, before), name
            before, changed = out, changed + 1
    assert changed == 3 + 2 * 4


def subclasses():
    class TwoInputs(Sum):
        def forward(self, x):
            return F.relu(self.norms[0](self.convs[0](x)) + self.norms[1](self.convs[1](x + 1)))

    class Returned(Sum):
        def forward(self, x):
            a, b = self.terms(x)
            return a + b, b

    class Twice(Sum):
        def forward(self, x):
            a, b = self.terms(x)
            return (a + b) * b

    class Broadcast(Sum):
        def forward(self, x):
            a, b = self.terms(x)
            return (a + x[:, :, :1]) + b

    class Weighted(Sum):
        def forward(self, x):
            a, b = self.terms(x)
            return torch.add(a, b, alpha=2)

    class Itself(Sum):
        def forward(self, x):
            a, _ = self.terms(x)
            return a + a

    class Gated(Sum):
        def forward(self, x):
            a, _ = self.terms(x)
            return a + x * self.norms[1].weight[:, None, None] * x.mean()

    class ScaledByInput(Sum):
        """A weight made of this cannot be kept."""

        def forward(self, x):
            a, b = self.terms(x)
            return a + b * x.mean((0, 2, 3), keepdim=True)

    class Writing(Sum):
        """A parameter may be another in the middle of the graph."""

        def forward(self, x):
            self.norms[0].running_mean.mul_(1)
            a, b = self.terms(x)
            return a + b

    class Sliced(Sum):
        def forward(self, x):
            a, b = self.terms(x)
            return (a + b)[:, 1:]

    return (
        TwoInputs,
        Returned,
        Twice,
        Broadcast,
        Weighted,
        Itself,
        Gated,
        ScaledByInput,
        Writing,
        Sliced,
    )


@pytest.mark.parametrize("kind", subclasses(), ids=lambda c: c.__name__)
def test_other_sums_stay(kind):
    assert merged(kind(conv(3, padding=1), conv(1)), torch.randn(2, 6, 8, 8)) == []
    assert not any("parallel" in r.detail for r in cbn.forward_records())


@pytest.mark.parametrize(
    "branches",
    [
        [conv(3, padding=1), conv(3, padding=2, dilation=2)],  # of the same size, but not covered
        [conv(5, padding=4, dilation=2), conv(3, padding=1)],  # which reads between the wide one's
        [conv(3, padding=1), conv(1, groups=2)],
        [conv((1, 3), padding=(0, 1)), conv((3, 1), padding=(1, 0))],
        [conv(2, padding=1, stride=8), conv(3, stride=8)],  # which begins after it
        [conv(3, padding=1, stride=8), conv(1, stride=9)],
    ],
)
def test_other_geometries_stay(branches):
    model = Sum(*(copy.deepcopy(b) for b in branches))
    assert merged(model, torch.randn(2, 6, 7, 7)) == []


def test_options():
    model, x = Sum(conv(3, padding=1), conv(1), identity=True), torch.randn(2, 6, 8, 8)
    assert merged(model, x) == ["convs.1"]
    assert merged(model, x, allow=("convs.*",)) == ["convs.1"]
    for options in (
        *({"forward": "fold"}, {"keep_packed_weights": False}, {"deny": ("norms.1",)}),
        *({"deny": ("convs.0",)}, {"allow": ("convs.0",)}),
    ):
        assert merged(model, x, **options) == [], options


def test_explain():
    model, x = Sum(conv(3, padding=1), conv(1)), torch.randn(2, 6, 8, 8)
    with torch.no_grad(), cbn.options(forward="auto"):
        explanation = cbn.explain(model, x)
    codes = {r.layer: (r.code, r.detail) for r in explanation.forward}
    assert codes == {
        "convs.0": (ForwardCode.FOLDED, "with parallel branches: convs.1"),
        "convs.1": (ForwardCode.MERGED, "convs.0"),
    }
    assert sum(r.seconds_folded for r in explanation.forward) == 0.5


def test_training_and_dynamic_sizes_stay():
    model, x = Sum(conv(3, padding=1), conv(1), identity=True), torch.randn(2, 6, 8, 8)
    with testing.fresh_compile():
        function, records = compiled(model, x.requires_grad_())
        torch.testing.assert_close(function(x), model(x), rtol=1e-4, atol=1e-4)
    assert records
    assert all(r.code is not ForwardCode.MERGED for r in records)
    torch._dynamo.mark_dynamic(x, 0)
    assert merged(model, x.detach()) == ["convs.1"]
    y = torch.randn(2, 6, 8, 8)
    torch._dynamo.mark_dynamic(y, 0)
    assert merged(model, y) == []


def test_where_it_is_slower(monkeypatch):
    """One convolution that takes longer than both, as measured."""

    def seconds(workload, ways, *, measure):
        slow = 3.0 if ways == [kernels.PACKED] else 1.0
        return {timing.AS_WRITTEN: 1.0, **dict.fromkeys(ways, slow)}

    monkeypatch.setattr(timing, "seconds", seconds)
    assert merged(Sum(conv(3, padding=1), conv(1)), torch.randn(2, 6, 8, 8)) == []
    monkeypatch.setattr(timing, "seconds", lambda *_, **__: {})  # nothing measured
    assert merged(Sum(conv(3, padding=1), conv(1)), torch.randn(2, 6, 8, 8)) == []


def test_error_against_float64():
    """On average at most twice eval mode's."""
    errors = []
    for seed in range(5):
        model = Sum(conv(3, 32, 32, padding=1), conv(1, 32, 32), identity=True)
        torch.manual_seed(seed)
        x = torch.randn(2, 32, 12, 12)
        with testing.fresh_compile(), torch.no_grad():
            exact = copy.deepcopy(model).double()(x.double())
            function, records = compiled(model, x)
            assert ForwardCode.MERGED in {r.code for r in records}
            errors.append([(out - exact).abs().max() for out in (function(x), model(x))])
    mine, eager = torch.tensor(errors).mean(0)
    assert mine <= 2 * eager


@st.composite
def random_sums(draw):
    """A sum of branches over two inputs, and how its terms are added."""
    groups, stride = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 1, 2]))
    size = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    terms, shape = [], None
    for _ in range(draw(st.integers(2, 4))):
        kernel = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 3]))
        dilation = draw(st.sampled_from([1, 1, 2]))
        padding = tuple(draw(st.sampled_from([dilation * (k - 1) // 2, 0, 1])) for k in kernel)
        one = conv(
            kernel, 4, 4, stride=stride, padding=padding, dilation=dilation, groups=groups,
            bias=draw(st.booleans()),
        )  # fmt: skip
        try:
            out = one(torch.zeros(1, 4, *size)).shape
        except RuntimeError:  # the kernel is larger than the input
            continue
        if shape in (None, out):
            shape = out
            terms.append((one, draw(st.sampled_from([0, 0, 0, 1]))))
    hypothesis.assume(len(terms) > 1)
    kinds = ["conv"] * len(terms)
    if shape[2:] == size:
        kinds += draw(st.lists(st.sampled_from(["norm", "x", "scaled"]), max_size=2))
    return terms, draw(st.permutations(kinds)), draw(st.randoms()), size


class RandomSum(nn.Module):
    def __init__(self, terms, kinds, choices) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.ModuleList(c for c, _ in terms)
        self.sources, self.kinds = [source for _, source in terms], kinds
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in kinds)
        self.scale = nn.Parameter(torch.randn(4, 1, 1))
        # Which two terms are added next, until one is left.
        self.pairs = [choices.sample(range(n), 2) for n in range(len(kinds), 1, -1)]
        spread_statistics(self)
        self.eval()

    def forward(self, *inputs: Tensor) -> Tensor:
        layers = zip(self.convs, self.sources, strict=True)
        terms = []
        for kind, norm in zip(self.kinds, self.norms, strict=True):
            if kind == "conv":
                layer, source = next(layers)
                terms.append(norm(layer(inputs[source])))
            else:
                x = inputs[0]
                terms.append(
                    {"norm": norm, "x": lambda x: x, "scaled": lambda x: x * self.scale}[kind](x)
                )
        for i, j in self.pairs:
            both = terms[i] + terms[j]
            terms = [t for k, t in enumerate(terms) if k not in (i, j)] + [both]
        return F.relu(terms[0])


def test_random_sums():
    found = {"merged": 0, "none": 0}

    @fuzz(60)
    @hypothesis.given(random_sums())
    def check(drawn):
        terms, kinds, choices, size = drawn
        model = RandomSum(terms, kinds, choices)
        names = merged(model, *(torch.randn(2, 4, *size) for _ in range(2)))
        found["merged" if names else "none"] += 1

    check()
    assert min(found.values()) >= sum(found.values()) // 6, found
