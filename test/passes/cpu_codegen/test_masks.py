"""Masks that are saved for backward on CPU: stored otherwise, the same bits saved."""

import copy

import pytest
import torch
import torch.nn.functional as F
from common import spread_statistics
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import convbn_inductor_pass as cbn
from convbn_inductor_pass import testing
from convbn_inductor_pass.passes.cpu_codegen import masks

aten = torch.ops.aten


class Pooled(nn.Module):
    """Layers whose activations have other users than a convolution, so that masks are saved."""

    def __init__(self, activation):
        super().__init__()
        self.activation = activation
        self.convs = nn.ModuleList(
            [nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1, bias=False)]
        )
        self.bns = nn.ModuleList([nn.BatchNorm2d(16), nn.BatchNorm2d(32)])
        spread_statistics(self)
        self.eval()

    def forward(self, x):
        for conv, bn in zip(self.convs, self.bns, strict=True):
            x = F.max_pool2d(self.activation(bn(conv(x))), 2)
        return x.mean((2, 3))


def step(model, x, *, dynamic=False, forward="exact"):
    """Outputs and gradients, and what autograd saves, of a compiled step."""
    model, saved = copy.deepcopy(model), []

    def pack(tensor):
        saved.append(tensor.detach().clone())
        return tensor

    with testing.fresh_compile(), cbn.options(forward=forward):
        compiled = torch.compile(model, dynamic=dynamic)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = compiled(x)
        out.square().sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters())], saved


@pytest.mark.parametrize("forward", ["exact", "fold"])
@pytest.mark.parametrize(
    ("activation", "fmt"),
    [
        (F.relu, torch.contiguous_format),
        (F.relu6, torch.channels_last),
        (F.hardtanh, torch.contiguous_format),
    ],
)
def test_same_bits_and_bytes(activation, fmt, forward, monkeypatch):
    """Also after forward folding, whose results the masks are then computed from."""
    torch.manual_seed(0)
    model = Pooled(activation).to(memory_format=fmt)
    x = torch.randn(4, 3, 32, 32).to(memory_format=fmt)
    rewrite, rewritten = masks.rewrite_masks, []

    def counted(graph):
        rewritten.append(rewrite(graph))
        return rewritten[-1]

    monkeypatch.setattr(masks, "rewrite_masks", counted)
    results, saved = step(model, x, forward=forward)
    large = sum(t.dtype == torch.bool and t.numel() >= 1 << 14 for t in saved)
    assert sum(rewritten) == 2 * large  # stored and loaded
    monkeypatch.setattr(masks, "rewrite_masks", lambda graph: 0)
    expected, expected_saved = step(model, x, forward=forward)
    # Masks of two comparisons are stored channels-last now, and sums over them in that order.
    assert torch.equal(results[0], expected[0])
    for a, b in zip(results[1:], expected[1:], strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())
    for a, b in zip(saved, expected_saved, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_masks_are_saved_and_rewritten():
    """Else the test above compares nothing."""
    torch.manual_seed(0)
    _, saved = step(Pooled(F.hardtanh), torch.randn(4, 3, 32, 32))
    assert any(t.dtype == torch.bool and t.numel() >= 1 << 14 for t in saved)


def test_dynamic_shapes():
    torch.manual_seed(0)
    model, x = Pooled(F.hardtanh), torch.randn(4, 3, 32, 32)
    dynamic, static = step(model, x, dynamic=True), step(model, x)
    for a, b in zip(dynamic[0], static[0], strict=True):
        torch.testing.assert_close(a, b)


def graph_of(numel, device="cpu", pointwise=True):
    graph = fx.Graph()
    with FakeTensorMode():
        value = torch.empty(numel, device=device)
        mask = torch.empty(numel, device=device, dtype=torch.bool)
    y = graph.placeholder("y")
    target, args = (aten.le.Scalar, (y, 0)) if pointwise else (aten.isin.Tensor_Tensor, (y, y))
    le = graph.call_function(target, args)
    y.meta["val"], le.meta["val"] = value, mask
    graph.output((y, le))
    return graph


def test_rewritten_graph():
    graph = graph_of(1 << 14)
    assert masks.rewrite_masks(graph) == 1
    graph.lint()
    names = [n.target for n in graph.nodes if n.op == "call_function"]
    assert names[-1] is torch.ops.convbn_inductor_pass.as_mask.default
    y = torch.randn(1 << 14)
    _, mask = fx.Interpreter(fx.GraphModule({}, graph)).run(y)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, y <= 0)


def test_a_mask_stays_after_the_masks_that_it_is_computed_from():
    """Also where one of them and the other source would have the same place."""

    def fn(x):
        y = x.sin()
        mask = y > 0
        return y, torch.logical_and(y, mask)

    x = torch.randn(1 << 15)
    traced = make_fx(fn, tracing_mode="fake")(x)
    assert masks.rewrite_masks(traced.graph) == 1
    traced.graph.lint()
    traced.recompile()
    for a, b in zip(traced(x), fn(x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "options", [{"numel": 100}, {"numel": 1 << 14, "device": "meta"}], ids=["small", "device"]
)
def test_left_alone(options):
    graph = graph_of(**options)
    before = str(graph)
    assert masks.rewrite_masks(graph) == 0
    assert str(graph) == before


def test_not_pointwise_is_left_alone():
    graph = graph_of(1 << 14, pointwise=False)
    assert masks.rewrite_masks(graph) == 0


def test_loads_in_a_backward():
    graph = fx.Graph()
    with FakeTensorMode():
        value = torch.empty(1 << 14)
        values = {"mask": torch.empty(1 << 14, dtype=torch.bool), "tangents_1": value}
    mask, dy = (graph.placeholder(name) for name in values)
    for node in (mask, dy):
        node.meta["val"] = values[node.name]
    zero = graph.call_function(aten.full.default, ([], 0.0))
    graph.output((graph.call_function(aten.where.self, (mask, zero, dy)),))
    assert masks.rewrite_masks(graph) == 1
    graph.lint()
    assert [n.target for n in mask.users] == [torch.ops.convbn_inductor_pass.as_bytes.default]
    y, dy = torch.randn(1 << 14), torch.randn(1 << 14)
    (dx,) = fx.Interpreter(fx.GraphModule({}, graph)).run(y <= 0, dy)
    assert torch.equal(dx, torch.where(y <= 0, 0.0, dy))


def test_operators():
    bytes = torch.tensor([[0, 1, 1], [1, 0, 0]], dtype=torch.uint8).t()
    torch.library.opcheck(torch.ops.convbn_inductor_pass.as_mask.default, (bytes,))
    mask = torch.ops.convbn_inductor_pass.as_mask(bytes)
    assert mask.dtype == torch.bool
    assert mask.stride() == bytes.stride()
    assert torch.equal(mask, bytes != 0)
    torch.library.opcheck(torch.ops.convbn_inductor_pass.as_bytes.default, (mask,))
    back = torch.ops.convbn_inductor_pass.as_bytes(mask)
    assert back.dtype == torch.uint8
    assert back.stride() == bytes.stride()
    assert torch.equal(back, bytes)
