"""float16: no gradient leaves its range where eval mode's does not, and small ones are not lost."""

import itertools

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from common import fuzz
from hypothesis import strategies as st

from convbn_inductor_pass.functional.conv_bn import batch_norm, layer
from convbn_inductor_pass.functional.gradients import gradient_scale

TINY = 1e-30  # an epsilon; torch 2.11 refuses 0
GAMMAS = (0.0, 1e-4, 1e-3, 1.0, 100.0, 6e4)
VARIANCES = (1e-9, 1e-2, 1.0, 1e6)
LOSS_SCALES = (1.0, 2.0**10, 2.0**16, 2.0**20)
NAMES = ("x", "weight", "bias", "gamma", "beta")


@fuzz(examples=200)
@hypothesis.given(
    st.integers(0, 99),
    st.integers(1, 3),
    st.floats(-20, 12),
    st.lists(st.floats(-40, 22) | st.just(None), min_size=4, max_size=4),
)
def test_bounds_that_its_docstring_states(seed, rank, log2_g, log2_scales):
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(5, 4, *[7] * (rank - 1), generator=generator) * 2.0**log2_g
    g = g.half()
    g[:, 0] = 0
    scale = torch.tensor([0.0 if s is None else 2.0**s for s in log2_scales])
    t = gradient_scale(g, scale)
    assert t.dtype == torch.float32
    assert torch.equal(t.frexp().mantissa, torch.full_like(t, 0.5))  # powers of two
    assert torch.equal(t.half().float(), t)
    assert t[0] == 1
    norm = (g.double() * t.double().reshape(1, -1, *[1] * (rank - 1))).transpose(0, 1)
    norm = norm.flatten(1).norm(dim=1)
    for c in range(1, 4):
        if t[c] < 2**15 and norm[c] > 0:
            by_gradient, by_scale = 1 / 8 < norm[c] <= 1 / 4, 128 < scale[c] / t[c] <= 256
            assert by_gradient or (by_scale and norm[c] > 1 / 8)
        assert scale[c] / t[c] <= 256 or norm[c] == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite(bad):
    """It stays so, where it was, and nowhere else; and ``t`` is finite all the same."""
    g = torch.ones(3, 3, dtype=torch.float16)
    g[0, 1] = bad
    t = gradient_scale(g, torch.tensor([1.0, 1.0, bad]))
    assert t.isfinite().all()
    assert (g * t.half()).isfinite().all(0).tolist() == [True, False, True]


def pair(written, tensors, *of_norm):
    """A layer and a batch norm after it, whose output in between nobody looks at."""
    of_layer = layer(lambda: written(*tensors), *tensors)
    return batch_norm(*of_layer, *of_norm, lambda: (False, []))


def arguments(kind):
    """Tensors and layer; gamma and variance come later."""
    torch.manual_seed(0)
    if kind == "linear":
        x, weight = torch.randn(128, 16), torch.randn(16, 16) / 4
        written = F.linear
    else:
        x, weight = torch.randn(4, 16, 20, 20), torch.randn(16, 16, 3, 3) / 12
        function = F.conv_transpose2d if kind == "transposed" else F.conv2d

        def written(x, weight, bias):
            return function(x, weight, bias, padding=1)

    channels = weight.shape[0]
    tensors = [x, weight, torch.randn(channels) / 8, None, torch.zeros(channels)]
    return tensors, torch.randn(channels) / 8, written


def gradients(call, tensors, dy):
    y = call(*tensors)
    return torch.autograd.grad(y, tensors, dy.to(y.dtype))


@pytest.mark.parametrize("layers", ["autocast", "half"])
@pytest.mark.parametrize("kind", ["conv", "transposed", "linear"])
def test_range_and_accuracy(kind, layers):
    """Wherever eval mode's step is finite, so is tune mode's; dgamma is float64's within 1e-3."""
    given, mean, written = arguments(kind)
    dtype = torch.float32 if layers == "autocast" else torch.float16
    finite = 0
    for gamma, variance, loss_scale in itertools.product(GAMMAS, VARIANCES, LOSS_SCALES):
        cell = f"gamma {gamma}, variance {variance}, loss scale {loss_scale}"
        given[3] = torch.full_like(mean, gamma)
        var = torch.full_like(mean, variance)
        tensors = [
            t.to(dtype if i < 3 else torch.float32).requires_grad_() for i, t in enumerate(given)
        ]

        def by_eval(x, weight, bias, gamma, beta, mean=mean, var=var):
            return F.batch_norm(written(x, weight, bias), mean, var, gamma, beta, False, 0.1, 1e-5)

        def by_tune(x, weight, bias, gamma, beta, var=var):
            return pair(written, (x, weight, bias), mean, var, gamma, beta, 1e-5)

        with torch.autocast("cpu", torch.float16, enabled=layers == "autocast"):
            y = by_eval(*tensors).detach()
            # Of a mean squared error, as far as the output is finite.
            target = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
            dy = (y.float() - target) * (2 * loss_scale / y[0].numel())
            dy = dy.clamp(-60000, 60000).half()
            expected, got = gradients(by_eval, tensors, dy), gradients(by_tune, tensors, dy)
        if not all(g.isfinite().all() for g in expected):
            continue
        finite += 1
        for name, g in zip(NAMES, got, strict=True):
            assert g.isfinite().all(), f"{name} at {cell}"
        rounded = [t.detach().half().double() for t in given[:3]]
        doubles = [t.requires_grad_() for t in [*rounded, *(t.double() for t in given[3:])]]
        exact = gradients(
            lambda *ts, var=var: by_eval(*ts, mean=mean.double(), var=var.double()), doubles, dy
        )
        largest = exact[3].abs().max()
        error = (got[3].double() - exact[3]).abs().max() / largest
        assert error <= 1e-3, f"dgamma at {cell}: {error:.1e}"
    assert finite > 48  # of 96


def test_many_positions_of_one_sign():
    """A scale that bounds the elements of ``g`` only would let their sum over a map overflow."""
    x = torch.full((1 << 20, 1), 16.0, dtype=torch.float16)
    weight = torch.ones(1, 1, dtype=torch.float16, requires_grad=True)
    gamma, zero = torch.zeros(1, requires_grad=True), torch.zeros(1)
    y = pair(F.linear, (x, weight), zero, torch.ones(1), gamma, zero, TINY)
    dgamma, dweight = torch.autograd.grad(y, (gamma, weight), torch.full_like(y, 0.5))
    torch.testing.assert_close(dgamma.item(), 2.0**23)
    assert dweight == 0


def test_second_derivatives():
    """They go through ``t * g`` and ``A / t``, whatever ``t`` is."""
    given, mean, written = arguments("conv")
    given[3] = torch.linspace(0.5, 1.5, 16)

    def penalty(dtype):
        tensors = [t.detach().to(dtype).requires_grad_() for t in given]
        x, weight, bias, gamma, beta = tensors
        var = torch.ones(16, dtype=dtype)
        y = pair(written, (x, weight, bias), mean.to(dtype), var, gamma, beta, TINY)
        first = torch.autograd.grad(y.double().square().mean(), tensors[1:4], create_graph=True)
        return torch.autograd.grad(sum(g.double().square().sum() for g in first), tensors[:4])

    for got, exact in zip(penalty(torch.float16), penalty(torch.float64), strict=True):
        assert (got.double() - exact).abs().max() <= 2e-2 * exact.abs().max()
