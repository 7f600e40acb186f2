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

from convbn_inductor_pass._torch import compat
from convbn_inductor_pass.graph.operators import convolution_relu
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
    return conv(x, c * u.neg().to(torch.float32).view(-1, 1, 1, 1))


WEIGHTS = [(4, 4, 3, 3)] * 3
INPUTS = [(2, 4, 5, 5), *WEIGHTS, (4,), (4,), (4,)]


def traced(function, shapes=INPUTS, device: str = "cuda") -> fx.GraphModule:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return make_fx(function)(*(torch.empty(shape, device=device) for shape in shapes))


def text(gm: fx.GraphModule) -> str:
    """The calls, with at most three arguments each."""
    calls = [n for n in gm.graph.nodes if n.op == "call_function"]
    found = "\n".join(f"{n.name} = {n.target}{n.args[:3]}" for n in calls)
    for long, short in (
        ("convbn_inductor_pass.convolution_relu.default", "convolution_relu"),
        ("prims.inductor_force_stride_order.default", "force_stride_order"),
        ("inductor_force_stride_order_default", "laid_out"),
    ):
        found = found.replace(long, short)
    return found


class TestGraph(TestCase):
    maxDiff = None

    def test_one_product_of_lists(self):
        gm = traced(three)
        assert BatchedWeightsPass().run(gm.graph).rewritten == 3
        gm.graph.lint()
        gm.graph.eliminate_dead_code()
        self.assertExpectedInline(
            text(gm),
            """\
view = aten.view.default(s_1, [-1, 1, 1, 1])
reciprocal = aten.reciprocal.default(t_1,)
view_1 = aten.view.default(reciprocal, [-1, 1, 1, 1])
neg = aten.neg.default(u_1,)
view_2 = aten.view.default(neg, [-1, 1, 1, 1])
_foreach_mul_list = aten._foreach_mul.List([a_1, b_1, c_1], [view, view_1, view_2])
getitem_3 = <built-in function getitem>(_foreach_mul_list, 0)
laid_out = force_stride_order(getitem_3, [36, 1, 12, 4])
getitem_4 = <built-in function getitem>(_foreach_mul_list, 1)
laid_out_1 = force_stride_order(getitem_4, [36, 1, 12, 4])
getitem_5 = <built-in function getitem>(_foreach_mul_list, 2)
laid_out_2 = force_stride_order(getitem_5, [36, 1, 12, 4])
convolution = aten.convolution.default(x_1, laid_out, None)
convolution_backward = aten.convolution_backward.default(convolution, convolution, laid_out_1)
getitem = <built-in function getitem>(convolution_backward, 0)
convolution_1 = aten.convolution.default(getitem, laid_out_2, None)""",
        )
        (product,) = gm.graph.find_nodes(op="call_function", target=aten._foreach_mul.List)
        assert [tuple(v.shape) for v in product.meta["val"]] == WEIGHTS

    def test_biases_of_cudnn(self):
        """In a list of sums, and with products of their own in that of the weights."""
        gm = traced(folded, FOLDED)
        assert BatchedWeightsPass().run(gm.graph).rewritten == 6
        gm.graph.lint()
        gm.graph.eliminate_dead_code()
        self.assertExpectedInline(
            text(gm),
            """\
view = aten.view.default(s_1, [-1, 1, 1, 1])
view_1 = aten.view.default(t_1, [-1, 1, 1, 1])
view_2 = aten.view.default(t_1, [-1, 1, 1, 1])
neg_2 = aten.neg.default(t_1,)
_foreach_mul_list = aten._foreach_mul.List([a_1, b_1, a_1, neg_2], [view, view_1, view_2, m_1])
getitem = <built-in function getitem>(_foreach_mul_list, 0)
getitem_1 = <built-in function getitem>(_foreach_mul_list, 1)
getitem_2 = <built-in function getitem>(_foreach_mul_list, 2)
getitem_3 = <built-in function getitem>(_foreach_mul_list, 3)
neg = aten.neg.default(s_1,)
mul_1 = aten.mul.Tensor(neg, m_1)
neg_1 = aten.neg.default(t_1,)
mul_3 = aten.mul.Tensor(neg_1, m_1)
_foreach_add_list = aten._foreach_add.List([mul_1, mul_3], [m_1, n_1])
getitem_4 = <built-in function getitem>(_foreach_add_list, 0)
getitem_5 = <built-in function getitem>(_foreach_add_list, 1)
convolution_relu = convolution_relu(x_1, getitem, getitem_4)
convolution_relu_1 = convolution_relu(convolution_relu, getitem_1, getitem_5)
convolution_relu_2 = convolution_relu(convolution_relu_1, getitem_2, getitem_3)""",
        )


def folded(x, a, b, s, t, m, n):
    """As forward folding leaves three layers, the last without a shift of its own."""
    for weight, scale, shift in ((a, s, m), (b, t, n), (a, t, None)):
        product = weight * scale.view(-1, 1, 1, 1)
        bias = -scale * m if shift is None else -scale * m + shift
        geometry = ([1, 1], [1, 1], [1, 1], 1)
        x = convolution_relu(x, product, bias, None, *geometry)
    return x


FOLDED = [INPUTS[0], *WEIGHTS[:2], (4,), (4,), (4,), (4,)]


@pytest.mark.parametrize(
    ("function", "shapes"), [(three, INPUTS), (folded, FOLDED)], ids=["three", "folded"]
)
def test_same_bits(function, shapes):
    gm = traced(function, shapes)
    # Of such numbers every sum is exact, in whatever order.
    inputs = [torch.randint(1, 3, shape).float() for shape in shapes]
    expected = function(*inputs)
    assert BatchedWeightsPass().run(gm.graph).rewritten > 1
    gm.recompile()
    assert torch.equal(gm(*inputs), expected)


@pytest.mark.parametrize("is_fused", [True, False])
def test_half_precision_is_cast_after(is_fused, monkeypatch):
    """Where Inductor asserts that nothing is fused with a list (torch 2.11), there is none."""
    monkeypatch.setattr(compat, "LISTS_MAY_BE_FUSED", is_fused)

    def function(x, a, b, s, t):
        for weight, scale in ((a, s), (b, t)):
            product = weight * scale.view(-1, 1, 1, 1)
            x = conv(x, product.to(torch.bfloat16))
        return x

    gm = traced(function, [INPUTS[0], *WEIGHTS[:2], (4,), (4,)])
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert BatchedWeightsPass().run(gm.graph).rewritten == 2 * is_fused
    gm.graph.lint()


@pytest.mark.parametrize("watch", [lambda w: w.as_strided((9,), (1,)), torch.neg])
def test_only_what_is_a_weight_alone_is_laid_out_as_one(watch, monkeypatch):
    """Who else reads a product would find its elements in another order."""
    monkeypatch.setattr(compat, "LISTS_MAY_BE_FUSED", True)

    def function(x, a, b, s, t):
        first, second = a * s.view(-1, 1, 1, 1), b * t.view(-1, 1, 1, 1)
        return conv(conv(x, first), second), watch(first)

    gm = traced(function, [INPUTS[0], *WEIGHTS[:2], (4,), (4,)])
    assert BatchedWeightsPass().run(gm.graph).rewritten == 2
    gm.graph.lint()
    assert "convolution = aten.convolution.default(x_1, getitem, None)" in text(gm)
    assert "convolution_1 = aten.convolution.default(convolution, laid_out, None)" in text(gm)


def test_a_list_ends_where_it_is_large(monkeypatch):
    monkeypatch.setattr(batched_weights, "_MOST_BYTES", 2 * 4 * 4 * 9 * 4)
    gm = traced(three)
    # Two in a list; the third, alone, stays as it is.
    assert BatchedWeightsPass().run(gm.graph).rewritten == 2
    assert len(gm.graph.find_nodes(op="call_function", target=aten._foreach_mul.List)) == 1


def written(x, a, b, s, t):
    """The second product reads what was written."""
    x = conv(x, a * s.view(-1, 1, 1, 1))
    b.mul_(2)
    return conv(x, b * t.view(-1, 1, 1, 1))


def one_product_of_another(x, a, b, s, t):
    weight = a * s.view(-1, 1, 1, 1)
    return conv(conv(x, weight), weight * t.view(-1, 1, 1, 1))


def the_other_product_first(x, a, b, s, t):
    weight = a * s.view(-1, 1, 1, 1)
    return conv(conv(x, weight * t.view(-1, 1, 1, 1)), weight)


def random(x, a, b, s, t):
    x = conv(x, a * s.view(-1, 1, 1, 1))
    return conv(x, b * aten.bernoulli.p(b, 0.5))


def test_a_product_of_two_lists_is_taken_once(monkeypatch):
    """A weight that is used again after its list has ended."""
    monkeypatch.setattr(batched_weights, "_MOST_BYTES", 2 * 4 * 4 * 9 * 4)

    def function(x, a, b, c, s, t, u):
        weight = a * s.view(-1, 1, 1, 1)
        x = conv(conv(x, weight), b * t.view(-1, 1, 1, 1))
        return conv(conv(x, c * u.view(-1, 1, 1, 1)), weight)

    gm = traced(function)
    assert BatchedWeightsPass().run(gm.graph).rewritten == 2
    gm.graph.lint()


def test_what_was_read_before_a_write_stays_there():
    def function(x, a, b, s, t):
        early = a.neg()
        x = x + 1
        a.mul_(2)
        x = conv(x, early * s.view(-1, 1, 1, 1))
        return conv(x, b * t.view(-1, 1, 1, 1))

    shapes = [INPUTS[0], *WEIGHTS[:2], (4,), (4,)]
    gm = traced(function, shapes)
    inputs = [torch.randn(shape) for shape in shapes]
    expected = function(*(t.clone() for t in inputs))
    assert BatchedWeightsPass().run(gm.graph).rewritten == 2
    gm.graph.lint()
    gm.recompile()
    assert torch.equal(gm(*inputs), expected)


def on_what_is_computed(x, a, b, s, t):
    x = conv(x, a * s.view(-1, 1, 1, 1))
    return conv(x, b * x.mean((0, 2, 3)).view(-1, 1, 1, 1))


def one_bias_of_another(x, a, b, s, t):
    """The second sum reads the first."""
    first = s + t
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    x = convolution_relu(x, a, first, None, *geometry)
    return convolution_relu(x, b, first + t, None, *geometry)


def written_between_biases(x, a, b, s, t):
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    x = convolution_relu(x, a, s + t, None, *geometry)
    t.mul_(2)
    return convolution_relu(x, b, s + t, None, *geometry)


def by_a_number(x, a, b, s, t):
    return conv(conv(x, a * 2.0), b * 3.0)


def not_scaled(x, a, b, s, t):
    return conv(conv(x, a + s.view(-1, 1, 1, 1)), b) * t.view(-1, 1, 1)


def the_same_weight_twice(x, a, b, s, t):
    weight = a * s.view(-1, 1, 1, 1)
    return conv(conv(x, weight), weight)


@pytest.mark.parametrize(
    "function",
    [
        *(
            one_bias_of_another,
            written_between_biases,
            on_what_is_computed,
            by_a_number,
            not_scaled,
            the_same_weight_twice,
        ),
        *(written, one_product_of_another, the_other_product_first, random),
    ],
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
