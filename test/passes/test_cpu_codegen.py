"""Small values that large ones are computed from on CPU: stored once, every bit the same."""

import copy

import pytest
import torch
import torch.nn.functional as F
from common import spread_statistics
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

import convbn_inductor_pass as cbn
from convbn_inductor_pass import testing
from convbn_inductor_pass._torch import inductor
from convbn_inductor_pass.passes import cpu_codegen

aten = torch.ops.aten


def stored(fn, *args):
    """The targets of what is stored when ``fn`` is traced with ``args``."""
    graph = make_fx(fn, tracing_mode="fake")(*args).graph
    before = [n for n in graph.nodes if n.op == "call_function"]
    count = cpu_codegen.store_invariants(graph)
    graph.lint()
    added = [n for n in graph.nodes if n.op == "call_function" and n not in before]
    assert len(added) == count
    assert all(n.target is inductor.force_stride_order for n in added)
    for node in added:
        assert list(node.args[0].users) == [node]
        assert node.meta["val"].stride() == tuple(node.args[1])
    return [n.args[0].target for n in added]


def maps(batch=2, channels=8, size=32, **options):
    return torch.randn(batch, channels, size, size, **options)


def vectors(n, channels=8, **options):
    return [torch.rand(channels, **options) + 0.5 for _ in range(n)]


def norm(x, mean, var, weight, bias):
    r = 1 / torch.sqrt(var + 1e-5)
    return (x - mean[:, None, None]) * r[:, None, None] * weight[:, None, None] + bias[
        :, None, None
    ]


def test_of_a_norm():
    assert stored(norm, maps(), *vectors(4)) == [aten.mul.Tensor]  # 1 / s: reciprocal, times one
    assert stored(norm, maps().double(), *vectors(4, dtype=torch.double)) == [aten.mul.Tensor]


def test_what_comes_after_is_stored_with_it():
    def scaled_first(x, var, weight):
        scale = (weight * torch.rsqrt(var + 1e-5)).reshape(1, -1, 1, 1)
        return x * scale, x + scale.expand(2, -1, -1, -1)

    assert stored(scaled_first, maps(), *vectors(2)) == [aten.mul.Tensor]


def test_of_gates():
    def gated(x, w):
        return x * torch.sigmoid(F.conv2d(x.mean((2, 3), keepdim=True), w))

    assert stored(gated, maps(), torch.randn(8, 8, 1, 1)) == [aten.sigmoid.default]


def test_one_that_is_computed_from_another_is_stored_if_it_is_slow_itself():
    def both(x, var):
        r = torch.rsqrt(var)[:, None, None]
        return x * r, x + r * 2, x - torch.exp(r)

    assert stored(both, maps(), *vectors(1)) == [aten.rsqrt.default, aten.exp.default]


@pytest.mark.parametrize(
    ("fn", "args"),
    [
        pytest.param(lambda x, a, b: x * (a + b)[:, None, None], [maps(), *vectors(2)], id="fast"),
        pytest.param(norm, [maps(size=8), *vectors(4)], id="few pixels"),
        pytest.param(norm, [t.bfloat16() for t in (maps(), *vectors(4))], id="bfloat16"),
        pytest.param(norm, [t.half() for t in (maps(), *vectors(4))], id="float16"),
        pytest.param(lambda x, r: x * r[:, None, None], [maps(), *vectors(1)], id="an input"),
        pytest.param(norm, [t.to("meta") for t in (maps(), *vectors(4))], id="another device"),
        pytest.param(lambda x, y: x * torch.rsqrt(y), [maps(), maps().abs()], id="as large"),
        pytest.param(
            lambda x: x * torch.rsqrt(x.var((1, 2), keepdim=True) + 1e-5), [maps()], id="a sum"
        ),
        pytest.param(
            lambda x, v: x * torch.rsqrt(torch.sort(v)[0].sum()),
            [maps(), *vectors(1)],
            id="one value",
        ),
        pytest.param(
            lambda x, w: F.conv2d(x, torch.rsqrt(w)),
            [maps(), torch.rand(8, 8, 3, 3)],
            id="for a convolution",
        ),
    ],
)
def test_left_alone(fn, args):
    assert stored(fn, *args) == []


class Squeezed(nn.Module):
    """Two blocks, one with a gate, and a norm written by hand."""

    def __init__(self):
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.b, self.bn_b = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)
        self.gate = nn.Conv2d(16, 16, 1)
        self.c = nn.Conv2d(16, 16, 3, padding=1)
        self.register_buffer("var", torch.rand(16, 1, 1) + 0.5)
        spread_statistics(self)
        self.eval()

    def forward(self, x):
        x = F.relu(self.bn_a(self.a(x)))
        y = self.bn_b(self.b(x))
        x = F.relu(x + y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True))))
        return F.relu(self.c(x) / torch.sqrt(self.var + 1e-3))


@pytest.fixture
def counted(monkeypatch):
    """The number of values that each graph has stored."""
    store, counts = cpu_codegen.store_invariants, []

    def counting(graph):
        counts.append(store(graph))
        return counts[-1]

    monkeypatch.setattr(cpu_codegen, "store_invariants", counting)
    return counts


@pytest.mark.parametrize(
    ("trains", "autocast", "dynamic", "forward"),
    [
        (True, True, True, "exact"),
        (False, False, False, "fold"),
    ],
)
def test_same_bits(trains, autocast, dynamic, forward, counted, monkeypatch):
    """Through Inductor: outputs, and in training gradients, with and without."""
    torch.manual_seed(0)
    model, x = Squeezed(), torch.randn(4, 3, 24, 24)
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)

    def step():
        mine = copy.deepcopy(model)
        with testing.fresh_compile(), cbn.options(forward=forward), torch.set_grad_enabled(trains):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = torch.compile(mine)(x)
            if trains:
                out.float().square().sum().backward()
        return [out.detach(), *(p.grad for p in mine.parameters() if trains)]

    results = step()
    if forward == "exact":
        assert sum(counted) >= 3 + (not autocast)  # its gate is in bfloat16
    monkeypatch.setattr(cpu_codegen, "store_invariants", lambda graph: 0)
    for mine, plain in zip(results, step(), strict=True):
        assert torch.equal(mine, plain)


def test_written_to_between_and_returned(counted):
    """What is stored is of before a write to what it is made of, and may itself be a result."""

    def fn(x, var):
        r = torch.rsqrt(var + 1e-5)[:, None, None]
        before = x * r
        var.mul_(4)
        after = x * torch.rsqrt(var + 1e-5)[:, None, None]
        return before, after, before - r, r, r.flatten()[2:]

    x, (var,) = maps(), vectors(1)
    expected_var = var.clone()
    expected = fn(x, expected_var)
    with testing.fresh_compile(), torch.no_grad():
        out = torch.compile(fn)(x, var)
    assert counted == [2]
    torch.testing.assert_close((*out, var), (*expected, expected_var))
    assert [t.stride() for t in out] == [t.stride() for t in expected]


def loops_around(text, code):
    """For each time that ``text`` stands in C++ code: how many loops are around it."""
    found, blocks, after_for = [], [], False
    for line in code.splitlines():
        after_for |= line.lstrip().startswith("for(")
        found += [sum(blocks)] * line.count(text)
        for brace in (c for c in line if c in "{}"):
            if brace == "}":
                del blocks[-1:]
            else:
                blocks.append(after_for)
                after_for = False
    return found


def test_the_loop_over_pixels_has_no_root():
    """In generated code the square root stands in a loop of its own, over channels."""
    model, x = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)).eval(), maps(2, 3, 40)
    around = {}
    for flag in (True, False):
        with testing.fresh_compile(flag=flag), torch.no_grad():
            _, (code,) = run_and_get_code(torch.compile(model), x)
        around[flag] = loops_around("sqrt(", code)
    assert max(around[True]) == 1 < max(around[False])
