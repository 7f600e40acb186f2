"""Scaled weights as one list on CUDA: the graph, where a list ends, and what is left alone.

What Inductor makes of it is in ``test/cuda_codegen``.
"""

from __future__ import annotations

import pytest
import torch
from expecttest import TestCase
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from convbn_inductor_pass.passes import batched_weights
from convbn_inductor_pass.passes.batched_weights import BatchedWeightsPass

aten = torch.ops.aten


def conv(x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    ones = [1, 1]
    return aten.convolution.default(x, weight, None, ones, ones, ones, False, [0, 0], groups)


def input_gradient(g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    ones = [1, 1]
    rest = (None, ones, ones, ones, False, [0, 0], 1, [True, False, False])
    return aten.convolution_backward.default(g, x, weight, *rest)[0]


def three(x, a, b, c, s, t, u):
    """In the order of a backward, with a scale that is computed late."""
    x = conv(x, a * s.view(-1, 1, 1, 1))
    x = input_gradient(x, x, b * t.reciprocal().view(-1, 1, 1, 1))
    return conv(x, c * u.exp().to(torch.float32).view(-1, 1, 1, 1))


WEIGHTS = [(4, 4, 3, 3)] * 3
INPUTS = [(2, 4, 5, 5), *WEIGHTS, (4,), (4,), (4,)]


def traced(function, shapes=INPUTS, device: str = "cuda") -> fx.GraphModule:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return make_fx(function)(*(torch.empty(shape, device=device) for shape in shapes))


def text(gm: fx.GraphModule) -> str:
    return "\n".join(line.strip() for line in str(gm.graph).splitlines())


class TestGraph(TestCase):
    maxDiff = None

    def test_one_product_of_lists(self):
        gm = traced(three)
        assert BatchedWeightsPass().run(gm.graph).rewritten == 3
        gm.graph.lint()
        self.assertExpectedInline(
            text(gm),
            """\
graph():
%x_1 : [num_users=1] = placeholder[target=x_1]
%a_1 : [num_users=1] = placeholder[target=a_1]
%b_1 : [num_users=1] = placeholder[target=b_1]
%c_1 : [num_users=1] = placeholder[target=c_1]
%s_1 : [num_users=1] = placeholder[target=s_1]
%t_1 : [num_users=1] = placeholder[target=t_1]
%u_1 : [num_users=1] = placeholder[target=u_1]
%view : [num_users=1] = call_function[target=torch.ops.aten.view.default](args = (%s_1, [-1, 1, 1, 1]), kwargs = {})
%reciprocal : [num_users=1] = call_function[target=torch.ops.aten.reciprocal.default](args = (%t_1,), kwargs = {})
%view_1 : [num_users=1] = call_function[target=torch.ops.aten.view.default](args = (%reciprocal, [-1, 1, 1, 1]), kwargs = {})
%exp : [num_users=1] = call_function[target=torch.ops.aten.exp.default](args = (%u_1,), kwargs = {})
%view_2 : [num_users=1] = call_function[target=torch.ops.aten.view.default](args = (%exp, [-1, 1, 1, 1]), kwargs = {})
%_foreach_mul_list : [num_users=3] = call_function[target=torch.ops.aten._foreach_mul.List](args = ([%a_1, %b_1, %c_1], [%view, %view_1, %view_2]), kwargs = {})
%getitem_3 : [num_users=1] = call_function[target=operator.getitem](args = (%_foreach_mul_list, 0), kwargs = {})
%getitem_4 : [num_users=1] = call_function[target=operator.getitem](args = (%_foreach_mul_list, 1), kwargs = {})
%getitem_5 : [num_users=1] = call_function[target=operator.getitem](args = (%_foreach_mul_list, 2), kwargs = {})
%convolution : [num_users=1] = call_function[target=torch.ops.aten.convolution.default](args = (%x_1, %getitem_3, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1), kwargs = {})
%convolution_backward : [num_users=3] = call_function[target=torch.ops.aten.convolution_backward.default](args = (%convolution, %convolution, %getitem_4, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, False, False]), kwargs = {})
%getitem : [num_users=1] = call_function[target=operator.getitem](args = (%convolution_backward, 0), kwargs = {})
%getitem_1 : [num_users=0] = call_function[target=operator.getitem](args = (%convolution_backward, 1), kwargs = {})
%getitem_2 : [num_users=0] = call_function[target=operator.getitem](args = (%convolution_backward, 2), kwargs = {})
%convolution_1 : [num_users=1] = call_function[target=torch.ops.aten.convolution.default](args = (%getitem, %getitem_5, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1), kwargs = {})
return convolution_1""",
        )
        (product,) = gm.graph.find_nodes(op="call_function", target=aten._foreach_mul.List)
        assert [tuple(v.shape) for v in product.meta["val"]] == WEIGHTS


def test_same_bits():
    gm = traced(three)
    inputs = [torch.randn(shape).abs() + 0.1 for shape in INPUTS]
    expected = three(*inputs)
    BatchedWeightsPass().run(gm.graph)
    gm.recompile()
    assert torch.equal(gm(*inputs), expected)


def test_half_precision_is_cast_after():
    def function(x, a, b, s, t):
        for weight, scale in ((a, s), (b, t)):
            product = weight * scale.view(-1, 1, 1, 1)
            x = conv(x, product.to(torch.bfloat16))
        return x

    gm = traced(function, [INPUTS[0], *WEIGHTS[:2], (4,), (4,)])
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert BatchedWeightsPass().run(gm.graph).rewritten == 2
    gm.graph.lint()


def test_a_list_ends_where_it_is_large(monkeypatch):
    monkeypatch.setattr(batched_weights, "_MOST_BYTES", 2 * 4 * 4 * 9 * 4)
    gm = traced(three)
    # Two in a list; the third, alone, stays as it is.
    assert BatchedWeightsPass().run(gm.graph).rewritten == 2
    assert len(gm.graph.find_nodes(op="call_function", target=aten._foreach_mul.List)) == 1


def on_what_is_computed(x, a, b, s, t):
    x = conv(x, a * s.view(-1, 1, 1, 1))
    return conv(x, b * x.mean((0, 2, 3)).view(-1, 1, 1, 1))


def by_a_number(x, a, b, s, t):
    return conv(conv(x, a * 2.0), b * 3.0)


def not_scaled(x, a, b, s, t):
    return conv(conv(x, a + s.view(-1, 1, 1, 1)), b) * t.view(-1, 1, 1)


def the_same_weight_twice(x, a, b, s, t):
    weight = a * s.view(-1, 1, 1, 1)
    return conv(conv(x, weight), weight)


@pytest.mark.parametrize(
    "function", [on_what_is_computed, by_a_number, not_scaled, the_same_weight_twice]
)
def test_left_as_it_is(function):
    gm = traced(function, [INPUTS[0], *WEIGHTS[:2], (4,), (4,)])
    before = text(gm)
    assert BatchedWeightsPass().run(gm.graph).rewritten == 0
    assert text(gm) == before


def test_not_on_cpu():
    gm = traced(three, device="cpu")
    before = text(gm)
    assert BatchedWeightsPass().run(gm.graph).rewritten == 0
    assert text(gm) == before
