"""Casts of masked gradients, once per user. What Inductor makes of it: ``test/cuda_codegen``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from convbn_inductor_pass.passes.repeated_casts import RepeatedCastsPass

aten = torch.ops.aten
prims = torch.ops.prims


def widened(value: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return prims.convert_element_type.default(value, dtype)


def masked(mask, zero, g, scale):
    """As the backward of a ReLU and a batch norm."""
    wide = widened(torch.where(mask, zero, g))
    return wide.sum(0), (wide * scale).sum(), wide


def traced(function, dtype=torch.bfloat16, device="cuda") -> fx.GraphModule:
    with FakeTensorMode(allow_non_fake_inputs=True):
        g, scale = torch.empty(4, 3, dtype=dtype, device=device), torch.empty(3, device=device)
        return make_fx(function)(g > 0, g.new_empty(()), g, scale)


def casts(gm: fx.GraphModule) -> list[fx.Node]:
    return gm.graph.find_nodes(
        op="call_function", target=prims.convert_element_type.default
    ) + gm.graph.find_nodes(op="call_function", target=aten._to_copy.default)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_each_user_has_a_cast_of_its_own(dtype):
    gm = traced(masked, dtype)
    (cast,) = casts(gm)
    meta = cast.meta["val"]
    assert RepeatedCastsPass().run(gm.graph).rewritten == 1
    gm.graph.lint()
    assert [len(c.users) for c in casts(gm)] == [1, 1, 1]
    assert all(c.args == cast.args and c.meta["val"] is meta for c in casts(gm))
    assert RepeatedCastsPass().run(gm.graph).rewritten == 0


def test_values_are_the_same():
    gm = traced(masked)
    g = torch.randn(4, 3, dtype=torch.bfloat16)
    values = g > 0.5, g.new_zeros(()), g, torch.randn(3)
    expected = gm(*values)
    RepeatedCastsPass().run(gm.graph)
    gm.recompile()
    torch.testing.assert_close(gm(*values), expected, rtol=0, atol=0)


def test_nothing_moves_across_a_write():
    gm = traced(masked)
    (cast,) = casts(gm)
    chosen = cast.args[0]
    with gm.graph.inserting_after(cast):
        write = gm.graph.call_function(aten.zero_.default, (chosen,))
    write.meta = dict(chosen.meta)
    assert RepeatedCastsPass().run(gm.graph).rewritten == 1
    nodes = [*gm.graph.nodes]
    assert max(nodes.index(c) for c in casts(gm)) < nodes.index(write)


def one_user(mask, zero, g, scale):
    return widened(torch.where(mask, zero, g)).sum()


def rounded(mask, zero, g, scale):
    wide = widened(g + g)
    return wide.sum(), wide * scale


def narrowed(mask, zero, g, scale):
    narrow = widened(torch.where(mask, zero, scale), torch.bfloat16)
    return narrow.sum(), narrow * g


@pytest.mark.parametrize(
    ("function", "dtype", "device"),
    [
        (masked, torch.bfloat16, "cpu"),
        (masked, torch.float32, "cuda"),
        (one_user, torch.bfloat16, "cuda"),
        (rounded, torch.bfloat16, "cuda"),
        (narrowed, torch.float32, "cuda"),
    ],
    ids=["cpu", "no cast", "one user", "what is cast was rounded", "narrowed"],
)
def test_left_alone(function, dtype, device):
    gm = traced(function, dtype, device)
    before = gm.code
    assert RepeatedCastsPass().run(gm.graph).rewritten == 0
    gm.recompile()
    assert gm.code == before
