"""Tensors that are not plain: subclasses, inference tensors, tensors without storage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import PassRecorder
from programs import (
    SHAPES,
    arguments,
    check,
    conv_bn,
)
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from convbn_inductor_pass import Code, testing


class Doubling(Tensor):
    """``conv2d`` of it gives twice the result."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
        return out * 2 if func is torch.conv2d else out


def two(shape: tuple[int, ...], **options: Any) -> TwoTensor:
    a, b = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    return TwoTensor(a.requires_grad_(False), b).requires_grad_(**options)


@pytest.mark.parametrize("name", ["x", "w"])
def test_wrapper_subclass(name):
    """Its parts are tensors of the graph like any others: two pairs, and both are fused."""
    runs = []
    for backend in (recorder := PassRecorder(), testing.fast_backend(fuse=False)):
        torch._dynamo.reset()
        made = arguments(**{name: lambda _: two(SHAPES[name], requires_grad=name == "w")})()
        leaves = {n: t for n, t in made.items() if t.requires_grad}
        out = torch.compile(conv_bn, backend=backend)(*made.values())
        out.sin().sum().backward()
        tensors = [out.detach(), *(t.grad for t in leaves.values())]
        runs.append([(t.a, t.b) if isinstance(t, TwoTensor) else (t,) for t in tensors])
    assert recorder.codes == [Code.FUSED, Code.FUSED]
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-5)


def test_torch_function_subclass():
    """Dynamo traces what the subclass does."""
    make = arguments(x=lambda made: torch.ones(2, 3, 6, 6).as_subclass(Doubling))
    with torch._dynamo.config.patch(traceable_tensor_subclasses={Doubling}):
        check(conv_bn, make, Code.FUSED, exact=False)


def test_inference_tensor_as_input():
    """It cannot be saved for backward, fused or not."""

    def inference(made):
        with torch.inference_mode():
            return torch.randn(2, 3, 6, 6)

    check(conv_bn, arguments(x=inference), Code.FUSED)


def test_meta_device():
    def fn(*args):
        return conv_bn(*args).sum()

    made = {
        n: t.detach().to("meta").requires_grad_(t.requires_grad) for n, t in arguments()().items()
    }
    compiled = torch.compile(fn, backend=(recorder := PassRecorder()))
    compiled(*made.values()).backward()
    assert recorder.codes == [Code.FUSED]
    assert made["g"].grad.shape == (4,)
