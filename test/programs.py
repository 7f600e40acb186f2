"""Small functions of a layer, a batch norm and what may go wrong around them, and how to run one.

A program takes ``x, w, b`` of the layer and ``g, beta, m, v`` of the batch norm: weight, bias,
mean and variance.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from oracle import PassRecorder, assert_same_as_unfused, relative_error
from torch import Tensor, nn

from convbn_inductor_pass import Code, Record, testing

SHAPES = {
    "x": (2, 3, 6, 6),
    "w": (4, 3, 3, 3),
    "b": (4,),
    "g": (4,),
    "beta": (4,),
    "m": (4,),
    "v": (4,),
}
PARAMETERS = ("w", "b", "g", "beta")
Arguments = dict[str, Tensor]


def arguments(
    frozen: tuple[str, ...] = (), grad: tuple[str, ...] = (), **changes: Any
) -> Callable[[], Arguments]:
    """A factory of the same arguments; ``changes`` are shapes, or functions of the arguments."""

    def make() -> Arguments:
        generator = torch.Generator().manual_seed(0)
        made: Arguments = {}
        for name, shape in {**SHAPES, **changes}.items():
            if callable(shape):
                made[name] = shape(made)
                continue
            value = torch.randn(shape, generator=generator)
            value = value.abs() + 0.5 if name == "v" else value * 0.5
            needs_grad = name in grad or (name in PARAMETERS and name not in frozen)
            made[name] = value.requires_grad_(needs_grad)
        return made

    return make


def carried(**changes: Any) -> Callable[[], Arguments]:
    """Arguments of a layer whose output has its input's shape, as a loop carries it."""
    return arguments(x=(2, 4, 6, 6), w=(4, 4, 1, 1), **changes)


def in_dtype(make: Callable[[], Arguments], dtype: torch.dtype, names: str) -> Any:
    """The factory ``make``, with the arguments called ``names`` cast to ``dtype``."""

    def cast() -> Arguments:
        return {
            n: t.detach().to(dtype).requires_grad_(t.requires_grad) if n in names.split() else t
            for n, t in make().items()
        }

    return cast


def double(tensor: Tensor) -> Tensor:
    """A tensor in float64, if it has a floating-point dtype."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


def check(
    fn: Callable[..., Any],
    make: Callable[[], Arguments],
    *codes: Code,
    exact: bool = True,
    **kwargs: Any,
) -> PassRecorder:
    """Compare ``fn`` with and without the pass, and assert the codes of its batch norms."""

    def in_float64() -> Arguments:
        return {n: double(t) for n, t in make().items()}

    recorder = assert_same_as_unfused(fn, make, double=in_float64 if exact else None, **kwargs)
    if recorder.codes != list(codes):
        records = [r for result in recorder.results for r in result.records]
        given = ", ".join(f"{r.code.name} ({r.kind}, {r.detail})" for r in records)
        raise AssertionError(f"{given}; expected {[code.name for code in codes]}")
    return recorder


def check_model(
    model: nn.Module,
    *inputs: Tensor,
    factor: float = 4.0,
    autocast: bool = False,
    dynamic: bool | None = None,
) -> list[Record]:
    """Compare a model with and without the pass, and return the records of tune mode's decisions.

    Outputs have the bits that they have without the pass, and the error of each gradient against
    float64 is at most ``factor`` times the largest without it.
    """
    parameters = dict(model.named_parameters())
    inputs = tuple(i.detach().clone().requires_grad_(i.requires_grad) for i in inputs)
    runs = []
    for backend in (recorder := PassRecorder(), testing.fast_backend(fuse=False)):
        torch._dynamo.reset()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            compiled = torch.compile(model, backend=backend, dynamic=dynamic)
            runs.append(testing.outputs_and_gradients(compiled, parameters, inputs))
    (outputs, gradients), (plain_outputs, plain_gradients) = runs
    torch.testing.assert_close(outputs, plain_outputs, rtol=0, atol=0)
    reference = copy.deepcopy(model).double()
    parameters = dict(reference.named_parameters())
    _, exact = testing.outputs_and_gradients(reference, parameters, tuple(map(double, inputs)))
    names = (gradients.keys(), plain_gradients.keys(), exact.keys())
    if not names[0] == names[1] == names[2]:
        raise AssertionError(f"gradients {names}")
    largest = max(relative_error(plain_gradients[n], exact[n]) for n in exact)
    eps = torch.finfo(torch.bfloat16 if autocast else inputs[0].dtype).eps
    for name, value in exact.items():
        if gradients[name].dtype != plain_gradients[name].dtype:
            raise AssertionError(f"{name} is {gradients[name].dtype}")
        error, allowed = relative_error(gradients[name], value), factor * largest + 8 * eps
        if not error <= allowed:
            raise AssertionError(f"{name}: error {error:.2e}, allowed {allowed:.2e}")
    records = [r for result in recorder.results for r in result.records]
    return [r for r in records if r.pass_name == "scale_gradient"]


def bn(c: Any, g: Any, beta: Any, m: Any, v: Any) -> Any:
    return F.batch_norm(c, m, v, g, beta)


def conv_bn(x: Any, w: Any, b: Any, g: Any, beta: Any, m: Any, v: Any) -> Any:
    return bn(F.conv2d(x, w, b), g, beta, m, v)


def bf16() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def written_function(
    write: str, where: str, extra: str = "", layer: str = "conv2d"
) -> Callable[..., Any]:
    """layer, [write], batch norm, [write] as a function of its own code."""
    lines = [f"c = F.{layer}(x, w, b)", "y = F.batch_norm(c, m, v, g, beta)", "return y * 2"]
    at = 1 if where == "between" else 2
    lines[at:at] = write.split("\n")
    source = f"def fn(x, w, b, g, beta, m, v{extra}):\n" + "\n".join("    " + li for li in lines)
    scope: dict[str, Any] = {"torch": torch, "F": F}
    exec(source, scope)
    return scope["fn"]


class Norm(nn.Module):
    """Batch norm in eval mode, written by hand, channels in dimension 1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.rand(channels) + 0.5) for _ in range(2))
        self.register_buffer("mean", torch.randn(channels))
        self.register_buffer("var", torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        ones = [1] * (x.ndim - 2)
        gamma, beta, mean, var = (
            t.view(-1, *ones) for t in (self.gamma, self.beta, self.mean, self.var)
        )
        return (x - mean) / torch.sqrt(var + 1e-5) * gamma + beta


class Scale(nn.Module):
    """Multiplication with one trained number per channel, in one of several spellings."""

    def __init__(self, channels: int, form: str = "index") -> None:
        super().__init__()
        self.gamma, self.form = nn.Parameter(torch.rand(channels) + 0.5), form
        self.other = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        ones = [1] * (x.ndim - 2)
        v = self.gamma.view(-1, *ones)
        if self.form == "index":
            return x * self.gamma[(slice(None), *[None] * (x.ndim - 2))]
        if self.form == "left":
            return v * x
        if self.form == "expanded":
            return x * v.expand(x.shape)
        if self.form == "divide":
            return x / (v + 1)
        if self.form == "addcmul":
            return torch.addcmul(self.other.view(-1, *ones), x, v, value=0.5)
        if self.form == "last":
            return (x.movedim(1, -1) * self.gamma).movedim(-1, 1)
        if self.form == "two":
            return -(x * v + 1) * self.other.view(-1, *ones) - 2
        if self.form == "number":
            return x * self.gamma[:1].exp()
        if self.form == "in place":
            return x.clone().mul_(v)
        raise ValueError(self.form)


class Residual(nn.Module):
    """``x + inner(x)``."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)
