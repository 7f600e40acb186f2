"""Custom autograd functions, which take tensors without telling ``__torch_function__``."""

import pytest
import torch
from eager_helpers import Fn, run

from convbn_inductor_pass import turn_on


class WritesInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x.mul_(2)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy


class Doubles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return 2 * x * dy


@pytest.mark.parametrize("function", [WritesInPlace, Doubles])
@pytest.mark.parametrize("where", ["before_norm", "after_layer", "after_itself"])
def test_custom_autograd_function(function, where):
    """They take tensors without telling __torch_function__; no gradient may be lost."""

    def forward(m, x):
        c = m.conv(x)
        if where == "before_norm":
            return m.bn(function.apply(c))
        c = m.conv(c if where == "after_layer" else m.bn(c).relu())  # its input needs its weight
        return function.apply(c) * m.bn(m.conv(x))

    def twice(m, x):
        leaves = list(m.parameters())
        first = torch.autograd.grad(m(x).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    model, x = Fn(forward).double(), torch.randn(2, 4, 6, 6).double()
    expected, gradients = run(model, x)
    second = twice(model, x)
    turn_on(model)
    # Twice first: the second forward knows of the other use.
    torch.testing.assert_close(twice(model, x), second, rtol=1e-9, atol=1e-9)
    got, tune_gradients = run(turn_on(model), x)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert tune_gradients.keys() == gradients.keys()
    for n, g in gradients.items():
        torch.testing.assert_close(tune_gradients[n], g, rtol=1e-9, atol=1e-9)


def test_write_in_an_autograd_function():
    def forward(m, x):
        x = x * 1
        c = m.conv(x)
        WritesInPlace.apply(x)
        return m.bn(c)

    model, x = Fn(forward).requires_grad_(False), torch.randn(2, 4, 6, 6)
    expected = model(x)
    assert torch.equal(turn_on(model)(x), expected)


def test_write_that_torch_does_not_show():
    """What an extension writes after the layer comes after the layer."""

    def forward(m, x):
        x = x * 1
        c = m.conv(x)
        with torch._C.DisableTorchFunction():
            x.mul_(2)
        return m.bn(c)

    model, x = Fn(forward), torch.randn(2, 4, 6, 6)
    expected = model(x)
    out = turn_on(model)(x)
    assert torch.equal(out, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
