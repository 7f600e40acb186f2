"""What the tests of forward folding share: run it, and compare with eager mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import convbn_inductor_pass as cbn
from convbn_inductor_pass import Record, testing
from convbn_inductor_pass._torch import inductor
from convbn_inductor_pass.passes.base import Outcome
from convbn_inductor_pass.passes.forward_folding import ForwardFoldingPass

__all__ = [
    "Frozen",
    "assert_folded_right",
    "bump",
    "check_residual_written_before_relu",
    "codes",
    "compiled",
    "folded",
    "layer_records",
    "needs_onednn",
]

needs_onednn = pytest.mark.skipif(
    not inductor.has_onednn_epilogues(torch.float32), reason="needs oneDNN"
)


def layer_records() -> list[Record]:
    """The newest records of forward folding."""
    return [r for r in cbn.records() if r.pass_name == "forward_folding"]


def folded(
    fn: Callable[..., Any], *inputs: Any, forward: str = "fold", grad: bool = False, **options: Any
) -> tuple[Any, list[Record]]:
    """Outputs with forward folding, and its records; no code is generated."""
    options["backend"] = testing.post_grad_backend()
    return _run(fn, inputs, forward, grad, options)


def compiled(
    fn: Callable[..., Any], *inputs: Any, grad: bool = False, **options: Any
) -> tuple[Any, list[Record]]:
    """The same through Inductor."""
    return _run(fn, inputs, "fold", grad, options)


def _run(
    fn: Callable[..., Any], inputs: Any, forward: str, grad: bool, options: dict[str, Any]
) -> tuple[Any, list[Record]]:
    run, consistent = ForwardFoldingPass.run, []

    def checked(self: ForwardFoldingPass, graph: fx.Graph) -> Outcome:
        before = str(graph)
        outcome = run(self, graph)
        consistent.append((str(graph) != before) == (outcome.rewritten > 0))
        return outcome

    cbn.clear_records()
    with (
        testing.fresh_compile(),
        cbn.options(forward=forward),
        torch.set_grad_enabled(grad),
        mock.patch.object(ForwardFoldingPass, "run", checked),
    ):
        out = torch.compile(fn, **options)(*inputs)
    assert all(consistent), "a graph was changed though every layer was refused, or the reverse"
    return out, layer_records()


def codes(records: list[Record]) -> list[str]:
    return [r.code.name for r in records]


def assert_folded_right(
    model: nn.Module, *inputs: Tensor, count: int, forward: str = "fold"
) -> list[Record]:
    """``count`` layers are folded, and the error against float64 is at most twice eval mode's."""
    with torch.no_grad():
        out, records = folded(model, *inputs, forward=forward)
        expected = model(*inputs)
        exact = copy.deepcopy(model).double()(*(i.double() for i in inputs))
    assert codes(records).count("FOLDED") == count, records
    assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
    scale = exact.abs().max()
    error, by_eval = ((o.double() - exact).abs().max() / scale for o in (out, expected))
    assert error <= 2 * by_eval + 4 * torch.finfo(out.dtype).eps
    return records


class Frozen(nn.Module):
    """Frozen batch norm, written out in one of several ways."""

    def __init__(self, channels: int, form: str) -> None:
        super().__init__()
        self.form = form
        for i, name in enumerate(("weight", "bias", "mean", "var")):
            generator = torch.Generator().manual_seed(i)
            self.register_buffer(name, torch.rand(channels, generator=generator) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        w, b, m, v = self.weight, self.bias, self.mean, self.var
        if self.form == "functional":
            return F.batch_norm(x, m, v, w, b, training=False)
        if self.form == "torchvision":
            w, b, v, m = (t.reshape(1, -1, 1, 1) for t in (w, b, v, m))
            scale = w * (v + 1e-5).rsqrt()
            return x * scale + (b - m * scale)
        if self.form == "written":
            x = (x - m[None, :, None, None]) / torch.sqrt(v[None, :, None, None] + 1e-5)
            return x * w[None, :, None, None] + b[None, :, None, None]
        if self.form == "reversed":
            centered = m.view(1, -1, 1, 1) - x
            return b[:, None, None] - w.view(-1, 1, 1) * centered * v.view(-1, 1, 1)
        if self.form == "addcmul":
            return torch.addcmul(b[:, None, None], x, w[:, None, None], value=0.5)
        if self.form == "expanded":
            return x * w[None, :, None, None].expand_as(x) + b[:, None, None].expand(x.shape[1:])
        if self.form == "constants":
            return 3 - (-(x * 2 + 1)) / 4
        if self.form == "several":
            y = F.batch_norm(x, m, v, w, b) * w[:, None, None]
            return F.batch_norm(y, v, m) + b[:, None, None]
        raise ValueError(self.form)


@torch.library.custom_op("convbn_test::bump", mutates_args={"x"})
def bump(x: Tensor) -> None:
    """A write that stays in the graph."""
    x.add_(1)


def check_residual_written_before_relu() -> None:
    """The kernel, in ReLU's place, would add what was written."""
    torch.manual_seed(0)
    x, w, s = torch.randn(2, 4, 6, 6), torch.randn(4, 4, 3, 3), torch.randn(4, 1, 1)
    other = torch.randn(2, 4, 6, 6)

    def fn(x: Tensor, w: Tensor, s: Tensor, other: Tensor) -> Tensor:
        y = F.conv2d(x, w, padding=1) * s + other
        bump(other)
        return F.relu(y)

    expected = fn(x, w, s, other.clone())
    out, records = folded(fn, x, w, s, other.clone())
    assert codes(records) == ["INPUT_MUTATED"]
    torch.testing.assert_close(out, expected)
