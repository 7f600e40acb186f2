"""Graphs in which computing a layer as oneDNN's linear layer might go wrong. All under Inductor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import convbn_inductor_pass as cbn
from convbn_inductor_pass import kernels, testing, timing

pytestmark = [
    pytest.mark.timed,
    pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN"),
]
WAYS = (kernels.LINEAR, kernels.UNFOLDED_LINEAR)


def assert_right(monkeypatch, way, fn, *args, layers):
    """``fn`` with its layers computed in the given way: outputs, strides and inputs as in eager."""
    monkeypatch.setattr(
        timing,
        "seconds",
        lambda work, names, **_: {n: float(n != way) for n in ("as written", *names)},
    )
    mine, expected_args = [t.clone() for t in args], [t.clone() for t in args]
    expected = fn(*expected_args)
    cbn.clear_records()
    with testing.fresh_compile(), cbn.options(forward="auto"), torch.no_grad():
        out = torch.compile(fn)(*mine)
    assert [r.kernel for r in cbn.forward_records() if r.code.rewritten] == [way] * layers
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mine, expected_args)
    for a, b in zip(out, expected, strict=True):
        assert a.stride() == b.stride() or not a.numel()


@pytest.mark.parametrize("way", WAYS)
def test_input_written_to_and_returned(monkeypatch, way):
    """Contiguous, channels-last or sliced; written to after the layer; also a result itself."""
    torch.manual_seed(0)
    w, s = torch.randn(6, 4, 1, 1), torch.rand(6, 1, 1)

    def fn(x, y, z, w, s):
        before = F.conv2d(x, w) * s
        x.add_(1)
        after = (F.conv2d(x, w) * s).relu()
        kept = y.sin()
        third = F.conv2d(kept, w, stride=2) * s
        part = z[:, 1:5]
        fourth = (F.conv2d(part, w) * s).relu()
        return before, after, kept, third, kept[:, 1:], fourth

    x, z = torch.randn(2, 4, 5, 3), torch.randn(2, 6, 3, 3)
    y = torch.randn(2, 4, 5, 3).contiguous(memory_format=torch.channels_last)
    assert_right(monkeypatch, way, fn, x, y, z, w, s, layers=4)


@pytest.mark.parametrize("way", WAYS)
def test_rows_written_to_and_returned(monkeypatch, way):
    """The same for linear layers, with weights in either layout and a bias of one number."""
    torch.manual_seed(0)

    def fn(x, w, v, b, s):
        before = (x @ w) * s
        x.add_(1)
        after = (F.linear(x, v) * s + s).relu()
        kept = x.cos()
        third = torch.addmm(b, kept[:, ::2], w[::2]) * s
        return before, after, kept, third

    args = torch.randn(3, 4), torch.randn(4, 6), torch.randn(6, 4), torch.randn(1), torch.rand(6)
    assert_right(monkeypatch, way, fn, *args, layers=3)


@pytest.mark.parametrize("way", WAYS)
def test_weight_made_in_the_graph_and_shared(monkeypatch, way):
    torch.manual_seed(0)

    def fn(x, y, w, s):
        w = w - w.mean((1, 2, 3), keepdim=True)
        a, b = (F.conv2d(t, w) * s for t in (x, y))
        return a.relu(), b + a.mean(), w

    args = torch.randn(2, 4, 3, 3), torch.randn(1, 4, 6, 2), torch.randn(6, 4, 1, 1)
    assert_right(monkeypatch, way, fn, *args, torch.rand(6, 1, 1), layers=2)


@pytest.mark.parametrize("way", WAYS)
def test_empty_batch_and_single_pixels(monkeypatch, way):
    torch.manual_seed(0)

    def fn(x, y, w, s):
        return F.conv2d(x, w) * s, (F.conv2d(y, w) * s).relu().flatten(1)

    args = torch.randn(0, 4, 3, 3), torch.randn(2, 4, 1, 1), torch.randn(6, 4, 1, 1)
    assert_right(monkeypatch, way, fn, *args, torch.rand(6, 1, 1), layers=2)
