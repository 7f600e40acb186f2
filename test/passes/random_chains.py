"""Random functions of layers, affine chains, and everything that may look like one.

As in ``random_graphs``, a function is drawn as Python source, with tensors. Each line is run as
it is drawn, and left out if it raises: what fits is found by trying. Sizes are drawn from few
values, so that channels, batch, rows and columns are often as many as each other, and
operands along the wrong dimension fit.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from random_graphs import RandomFunction, TensorSpec
from torch import Tensor

__all__ = ["random_chains"]


@torch.library.custom_op("convbn_chains::bump", mutates_args={"x"})
def bump(x: Tensor) -> None:
    """A write that stays in the graph."""
    x.add_(1)


# Affine in y, with an operand o that may be anything.
_STEPS = (
    "{y} * {o}", "{o} * {y}", "{y} + {o}", "{o} + {y}", "{y} - {o}", "{o} - {y}",
    "{y} / ({o}.abs() + 1)", "torch.add({y}, {o}, alpha=2)", "torch.sub({y}, {o}, alpha=3)",
    "torch.sub({o}, {y}, alpha=2)", "torch.addcmul({o}, {y}, {o}, value=0.5)",
    "torch.addcmul({y}, {o}, {o}, value=2)", "torch.addcdiv({y}, {o}, {o}.abs() + 1)",
    "torch.lerp({y}, {o}.expand_as({y}), 0.25)", "torch.rsub({y}, {o})", "{y}.mul_({o})",
    "{y}.add_({o})",
)  # fmt: skip
# With numbers, casts, and calls that move elements.
_OTHERS = (
    "-{y}", "{y} * 0.5", "3 - {y}", "{y} / 2", "{y} + 1", "2 * {y} - 1", "{y} * 0", "{y} * True",
    "{y} * {y}", "{y} + {y}", "{y}.contiguous()", "{y}.clone()", "{y}.detach()", "{y}.flip(1)",
    "{y}.to(torch.float64).to({y}.dtype)", "{y}.float().to({y}.dtype)", "{y}.float()",
    "{y}.flatten(1).view({y}.shape)", "{y}.transpose(0, -1).contiguous().transpose(0, -1)",
    "{y}.movedim(1, -1).contiguous().movedim(-1, 1)", "{y}.reshape(-1).reshape({y}.shape)",
    "{y}[None].squeeze(0)", "{y}.transpose(0, 1).reshape({y}.shape)", "{y}.flatten(2)",
    "{y}.neg_().mul_(0.5)", "F.dropout({y}, 0.5, training=False)", "{y}.permute(0, 2, 1)",
    "{y}.unflatten(1, (2, -1))", "{y}.flatten(0, 1)", "{y}.cumsum(0)", "{y}.mT",
)  # fmt: skip
_ACTIVATIONS = (
    "F.relu({y})", "{y}.relu_()", "F.silu({y})", "F.hardswish({y})", "F.relu6({y})",
    "{y}.clamp(-1, 1.5)", "{y}.clamp(min=0.25)", "torch.sigmoid({y})", "F.leaky_relu({y}, 0.1)",
    "F.gelu({y})", "F.hardsigmoid({y})", "{y}.tanh()", "F.softplus({y})",
    "{y} * torch.sigmoid({y})", "{y}.abs()", "{y} * F.relu6({y} + 3) / 6", "F.relu6({y} + 3) / 6",
)  # fmt: skip
_WRITES = (
    "{t}.data.mul_(0.5)", "{t}.detach().add_(1)", "torch.ops.convbn_chains.bump({t}.detach())",
    "torch.ops.convbn_chains.bump({t}.detach()[:1])",
)  # fmt: skip
_RESULTS = (
    "{y}",
    "{y}",
    "{y}[:, :1]",
    "{y}[1:]",
    "{y}.mean()",
    "{y}.transpose(0, -1)",
    "{y}.sin()",
)


class _Drawer:
    """One draw: the lines so far, the tensors, and what running the lines has given."""

    def __init__(self, draw: Callable[[st.SearchStrategy], Any], trained: bool, relu: bool) -> None:
        self.draw, self.relu = draw, relu
        self.lines: list[str] = []
        self.tensors: list[TensorSpec] = []
        self.layers: list[str] = []
        self.results: list[str] = []
        self.scope: dict[str, Any] = {"torch": torch, "F": F}
        self.dtype = self.pick(torch.float64, torch.float64, torch.float32, torch.bfloat16)
        if self.relu:
            self.dtype = self.pick(torch.float32, torch.float32, torch.bfloat16)
        self.autocast = self.dtype is torch.float32 and self.chance(25)
        self.trained, self.grad = trained, trained
        if not (relu or trained):
            self.grad = self.chance(20)

    def pick(self, *values: Any) -> Any:
        return self.draw(st.sampled_from(values))

    def chance(self, percent: int) -> bool:
        return self.draw(st.integers(0, 99)) >= 100 - percent

    def tensor(self, shape: tuple[int, ...], name: str = "", **options: Any) -> str:
        name = name or f"t{len(self.tensors)}"
        spec = TensorSpec(
            name,
            shape,
            self.dtype,
            self.grad and self.chance(90 if self.trained else 70),
            **options,
        )
        self.tensors.append(spec)
        self.scope[name] = spec.make({}, False)
        return name

    def run(self, line: str) -> bool:
        """Add a line, if it runs and gives something of moderate size."""
        before = dict(self.scope)
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                exec(line, self.scope)
        except Exception:
            self.scope = before
            return False
        made = self.scope.get(line.split(" = ")[0])
        if isinstance(made, Tensor) and made.numel() > 4000:
            self.scope = before
            return False
        self.lines.append(line)
        return True

    def layer(self, y: str, x: str) -> None:
        if self.layers and self.chance(35) and self.run(f"{y} = {self.pick(*self.layers)(x)}"):
            return
        shape = self.scope[x].shape
        d, channels = len(shape) - 2, self.pick(4, 4, 2, 1, 5)
        bias = self.tensor((channels,)) if self.chance(60) else "None"
        if not d or (d == 1 and self.chance(60)):
            w = self.tensor((channels, shape[-1]), kind="weight")
            form = self.pick(
                f"F.linear({{x}}, {w}, {bias})", f"F.linear({{x}}, {w} * 0.5, {bias})",
                f"torch.mm({{x}}, {w}.t())", f"({{x}} @ {w}.t())",
                f"torch.addmm({bias}, {{x}}, {w}.t())", f"({{x}} @ {w}.t().contiguous() + {bias})",
                f"torch.addmm({bias}, {{x}}, {w}.t(), beta=0.5, alpha=2)",
            )  # fmt: skip
        else:
            c_in, transposed = shape[1], self.chance(10 if self.relu else 30)
            kernel = (self.pick(1, 1, 3, 2),) * d
            groups = self.pick(1, 1, *(g for g in (2, c_in) if not (c_in % g or channels % g)))
            ends = (c_in, channels // groups) if transposed else (channels, c_in // groups)
            w = self.tensor(
                (*ends, *kernel), kind="weight", channels_last=d > 1 and self.chance(20)
            )
            made = self.pick(w, w, w, f"({w} * 2)", f"({w} - {w}.mean(0, keepdim=True))",
                             f"{w}.transpose(-1, -2)")  # fmt: skip
            rest = f"padding={kernel[0] - 1}, groups={groups}, stride={self.pick(1, 1, 2)}"
            rest += ", dilation=2" * (not transposed and self.chance(20))
            form = f"F.conv{'_transpose' * transposed}{d}d({{x}}, {made}, {bias}, {rest})"
        if self.run(f"{y} = {form.format(x=x)}"):
            self.layers.append(lambda x, form=form: form.format(x=x))
        else:
            self.run(f"{y} = {x}.sin()")

    def operand(self, y: str) -> str:
        """Something to add to or multiply with ``y``."""
        shape = tuple(self.scope[y].shape)
        if len(shape) < 2:
            return self.tensor(shape)
        ones = (1,) * (len(shape) - 2)
        dim = self.pick(1, 1, 1, -1, 0)
        v = self.tensor((shape[dim],), kind=self.pick("normal", "normal", "zero"))
        index = ", ".join([":", *["None"] * len(ones)])
        per_channel = (
            f"{v}[{index}]", f"{v}[None, {index}]", f"{v}.reshape(1, -1, *{ones})", f"{v}",
            f"{v}[{index}].expand({y}.shape[1:])", f"{v}[None, {index}].expand_as({y})",
            f"{v}.exp()[{index}]", f"({v} + 1.5)[{index}]",
        )  # fmt: skip
        b, c, size = shape[0], shape[1], shape[2:]
        other = self.pick(
            (), (1,), (b, c, *ones), (1, 1, *size), shape[1:], shape, (b, 1, *ones), size, (c,),
        )  # fmt: skip
        dims = tuple(range(2, len(shape)))
        others = (
            *[self.tensor(other)] * 6, f"{v}.sum()", f"{v}[:1]", f"{v}.view(-1, 1, *{ones})",
            f"{y}.mean({dims or 0}, keepdim=True)", f"{y}.mean(0, keepdim=True)", f"{y}[:, :1]",
            f"x.mean().to({y}.dtype)", f"torch.full((), 0.5, dtype={y}.dtype)", "x",
            f"torch.arange(float({y}.shape[-1])).to({y}.dtype)", self.pick(*self.activations),
            f"{self.pick(*self.activations)}.mean((0, -1), keepdim=True)",
        )  # fmt: skip
        return f"({self.pick(*per_channel * (12 if self.trained else 3), *others)})"

    def norm(self, y: str) -> str:
        c = self.scope[y].shape[min(1, self.scope[y].ndim - 1)] if self.scope[y].ndim else 1
        m, w, b = (self.tensor((c,)) for _ in range(3))
        v = self.tensor((c,), kind="positive")
        return f"F.batch_norm({y}, {m}, {v}, {w}, {b})"

    def block(self, x: str, y: str) -> None:
        self.layer(y, x)
        if self.trained and self.chance(80):
            step = self.pick("{y} * {o}", "{o} * {y}", "{y}.mul_({o})", "{y} / ({o} + 3)")
            self.run(f"{y} = {step}".format(y=y, o=self.operand(y)))
        for _ in range(self.pick(0, 1, 1, 2, 2, 3, 5)):
            others = ["other"] * (1 if self.relu else 5)
            kind = self.pick(*["step"] * 10, *others, *["norm"] * 3, "write", "result")
            if kind == "write" and self.relu:
                continue
            if kind == "step":
                line = f"{y} = {self.pick(*_STEPS).format(y=y, o=self.operand(y))}"
            elif kind == "other":
                line = f"{y} = {self.pick(*_OTHERS).format(y=y)}"
            elif kind == "norm":
                line = f"{y} = {self.norm(y)}"
            elif kind == "write":
                line = self.pick(*_WRITES).format(t=self.pick(*(t.name for t in self.tensors)))
            else:
                line = f"r{len(self.lines)} = {self.pick(*_RESULTS).format(y=y)}"
            if self.run(line) and kind == "result":
                self.results.append(line.split(" = ")[0])
        if self.chance(35):
            other = self.pick(*self.activations, *(f"{a}.sin()" for a in self.activations))
            self.run(
                f"{y} = {self.pick('{y} + {o}', '{o} + {y}', '{y}.add_({o})')}".format(y=y, o=other)
            )
        if self.relu and self.chance(70):
            self.run(f"{y} = F.relu({y})")
        elif self.chance(60):
            self.run(f"{y} = {self.pick(*_ACTIVATIONS).format(y=y)}")

    def function(self) -> RandomFunction:
        dims = (2,) if self.relu else (2, 2, 2, 1, 3, 0, 0)
        d = self.pick(*dims)
        batch, sizes = self.pick(1, 1, 2, 4, 0), [self.pick(4, 1, 5, 2) for _ in range(d)]
        self.tensor(
            (batch, self.pick(4, 2, 1), *sizes), "x", channels_last=d > 1 and self.chance(20)
        )
        self.activations = ["x"]
        for i in range(self.pick(1, 1, 2, 2, 3)):
            y = f"y{i}"
            self.block(self.pick("x", self.activations[-1]), y)
            self.activations.append(y)
            if self.chance(40):
                line = f"r{len(self.lines)} = {self.pick(*_RESULTS).format(y=y)}"
                if self.run(line):
                    self.results.append(line.split(" = ")[0])
        lines = [*self.lines, f"return {', '.join([*self.results, y])},"]
        names = ", ".join(t.name for t in self.tensors)
        body = textwrap.indent("\n".join(lines), "    ")
        dynamic = not self.relu and self.pick(False, False, False, True)
        return RandomFunction(
            f"def f({names}):\n{body}", tuple(self.tensors), self.autocast, dynamic
        )


@st.composite
def random_chains(
    draw: Callable[[st.SearchStrategy], Any], *, trained: bool = False, relu: bool = False
) -> RandomFunction:
    """Strategy for functions around affine chains; they run in eager mode.

    With ``trained`` most tensors require a gradient; ``relu`` draws less of what speaks against a
    ReLU in the layer's kernel.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _Drawer(draw, trained, relu).function()
