"""The verdict of ``oracle`` on narrow gradients: rounding passes, a wrong formula never does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from random_graphs import RandomFunction, TensorSpec
from torch import Tensor

from convbn_inductor_pass import Code
from convbn_inductor_pass.passes.scale_gradient import rewrite


def bf16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def linear_bn(x, w, g, beta, m, v):
    return F.batch_norm(F.linear(x, w), m, v, g, beta)


def arguments(seed: int, mean: float, double: bool = False) -> dict[str, Tensor]:
    """Rows around ``mean``, normalized by the mean that they have."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(256, 16, generator=generator) + mean
    w = torch.randn(1, 16, generator=generator) / 4
    g, beta, _, v = (torch.randn(1, generator=generator) for _ in range(4))
    m = (x.double() * w.double()).sum(1).mean().float().reshape(1)
    made = {"x": x, "w": w, "g": g, "beta": beta, "m": m, "v": v.abs() + 0.5}
    if double:
        made = {name: tensor.double() for name, tensor in made.items()}
    for name in ("w", "g", "beta"):
        made[name].requires_grad_()
    return made


# <dW', W> and mean * dbeta all but cancel: bfloat16 leaves a third of the gradient wrong.
CANCELLING = partial(arguments, 46, 4.0)
PLAIN = partial(arguments, 0, 0.0)

# Drawn at random. What reaches g0 all but cancels in the second layer: the gradient is off by 0.17
# with the pass and by 0.02 without it, and only a float64 run tells how much of that is either's.
# Viewing float64's bits as int16 raises here, so that run needs int64.
DRAWN = RandomFunction(
    """
def f(x, w0, g0, beta0, m0, v0, w1, b1, g1, beta1, m1, v1):
    c0 = F.conv_transpose2d(x, w0, None, padding=(0, 1))
    y0 = F.batch_norm(c0, m0, v0, g0, beta0, False, 0.1, 1e-05)
    y0 = y0 * c0.shape[0] + c0.size(-1) + c0.dim()
    alias = y0.data.view(torch.int16)
    alias &= 0
    y0 = y0 * 2 - 1
    c1 = F.conv_transpose2d(y0, w1, b1, stride=2, padding=1, groups=2, output_padding=1)
    y1 = F.batch_norm(c1, m1, v1, g1, beta1, False, 0.1, 1e-05)
    return y1,
""",
    (
        TensorSpec("x", (2, 4, 5, 5), channels_last=True),
        TensorSpec("w0", (4, 2, 1, 3), kind="weight"),
        TensorSpec("g0", (2,), requires_grad=True),
        TensorSpec("beta0", (2,)),
        TensorSpec("m0", (2,)),
        TensorSpec("v0", (2,), kind="positive"),
        TensorSpec("w1", (2, 2, 2, 2), requires_grad=True, kind="weight"),
        TensorSpec("b1", (4,)),
        TensorSpec("g1", (4,), requires_grad=True),
        TensorSpec("beta1", (4,)),
        TensorSpec("m1", (4,)),
        TensorSpec("v1", (4,), kind="positive"),
    ),
    ambient_autocast=True,
)


def check(make: Callable[..., dict[str, Tensor]]) -> None:
    recorder = oracle.assert_same_as_unfused(
        linear_bn,
        make,
        double=partial(make, double=True),
        context=bf16,
        computed_in=torch.bfloat16,
    )
    assert recorder.codes == [Code.FUSED]


@pytest.fixture
def noises(monkeypatch):
    """What ``oracle.rounding_noise`` returned so far."""
    returned = []
    noise = oracle.rounding_noise

    def recorded(*args: Any) -> dict[str, float]:
        returned.append(noise(*args))
        return returned[-1]

    monkeypatch.setattr(oracle, "rounding_noise", recorded)
    return returned


class TestRounding:
    def test_cancelling_terms(self, noises):
        check(CANCELLING)
        assert len(noises) == 1
        assert noises[0].keys() == {"w", "g", "beta"}

    def test_only_where_needed(self, noises):
        check(PLAIN)
        assert not noises

    def test_drawn(self):
        recorder = oracle.assert_same_as_unfused(
            DRAWN.function(),
            DRAWN.arguments,
            double=partial(DRAWN.arguments, double=True),
            make_double_function=partial(DRAWN.function, double=True),
            context=bf16,
            computed_in=torch.bfloat16,
        )
        assert recorder.fused == 1

    def test_nothing_in_float64_to_compare_with(self, noises):
        """A function that float64 arguments do not fit gets no more room."""

        def raises(*_: Tensor):
            raise RuntimeError("not in float64")

        with pytest.raises(AssertionError, match="gradient of g: error"):
            oracle.assert_same_as_unfused(
                linear_bn,
                CANCELLING,
                double=partial(CANCELLING, double=True),
                make_double_function=lambda: raises,
                context=bf16,
                computed_in=torch.bfloat16,
            )
        assert noises == [{}]


class TestWrongFormulas:
    """A batch norm weight's gradient that is wrong, in the very places where it is rounded most."""

    def break_dgamma(
        self, monkeypatch, factor: float, shift: float, only: torch.dtype | None = None
    ) -> None:
        """Multiply ``<dW', W>`` and what the batch norm's shift adds to it."""
        right_inner, right_sum = rewrite._Rewriting._inner_product, rewrite._Rewriting._sum_g

        def times(rewriting, node, by):
            narrow = rewriting.layer.out.dtype
            wrong = only is None or narrow is only
            return rewriting.build.call(torch.ops.aten.mul.Tensor, node, by if wrong else 1.0)

        monkeypatch.setattr(
            rewrite._Rewriting,
            "_inner_product",
            lambda self, weight_gradient: times(self, right_inner(self, weight_gradient), factor),
        )
        monkeypatch.setattr(
            rewrite._Rewriting, "_sum_g", lambda self: times(self, right_sum(self), shift)
        )

    WRONG = {  # noqa: RUF012
        "times 1.3": (PLAIN, 1.3, 1.3),
        "times 1.3, cancelling": (CANCELLING, 1.3, 1.3),
        "times 1.01, cancelling": (CANCELLING, 1.01, 1.01),
        "negated": (PLAIN, -1.0, -1.0),
        "negated, cancelling": (CANCELLING, -1.0, -1.0),
        "without <dW, W>": (PLAIN, 0.0, 1.0),
        "without <dW, W>, cancelling": (CANCELLING, 0.0, 1.0),
        "without the mean": (CANCELLING, 1.0, 0.0),
    }

    @pytest.mark.parametrize("name", WRONG)
    def test_in_every_dtype(self, monkeypatch, name):
        make, factor, shift = self.WRONG[name]
        self.break_dgamma(monkeypatch, factor, shift)
        with pytest.raises(AssertionError, match="gradient of g"):
            check(make)

    @pytest.mark.parametrize(
        "name", ["times 1.3", "negated", "without <dW, W>", "without the mean"]
    )
    def test_in_bfloat16_only(self, monkeypatch, name):
        """Which float64 does not show: the terms are what the error is too large for."""
        make, factor, shift = self.WRONG[name]
        self.break_dgamma(monkeypatch, factor, shift, only=torch.bfloat16)
        with pytest.raises(AssertionError, match="gradient of g: error"):
            check(make)


@pytest.mark.parametrize(("factor", "accepted"), [(3.0, True), (100.0, False)])
def test_a_gradient_that_is_zero_but_for_rounding(factor, accepted):
    """As a bias's before a batch norm in training mode: nothing but its size can be judged."""
    unfused = torch.tensor([7e-6, -2e-7])

    def outcome(gradient):
        return oracle.Outcome([], {"b": gradient}, {})

    def judge():
        fused, exact = outcome(-factor * unfused), outcome(torch.tensor([1e-15, 0.0]).double())
        oracle.compare(fused, outcome(unfused), outcome(unfused), exact)

    if accepted:
        judge()
    else:
        with pytest.raises(AssertionError, match="gradient of b"):
            judge()


@pytest.mark.parametrize(("size", "accepted"), [(1e-15, True), (1e-12, False)])
def test_a_gradient_that_is_zero_but_for_rounding_in_float64(size, accepted):
    """Then no run is more exact: it is held against the size of the other gradients. Drawn."""
    weight = torch.tensor([0.5, -2.0]).double()

    def outcome(bias):
        return oracle.Outcome([], {"w": weight, "b": torch.tensor([bias]).double()}, {})

    def judge():
        unfused = outcome(-0.7 * size)
        oracle.compare(outcome(size), unfused, unfused, unfused)

    if accepted:
        judge()
    else:
        with pytest.raises(AssertionError, match="gradient of b"):
            judge()
