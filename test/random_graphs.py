"""Random functions of layers, batch norms and everything that may go wrong around them.

A function is drawn as Python source, so that a failing example prints as something that can
be pasted and run, and so that Dynamo traces plain code. With it comes a list of tensors:
inputs, parameters and statistics, some aliasing each other.

The draws lean towards graphs in which a pair is fused: one hazard here and there, not all at
once. Everything is tiny, since an example costs two compilations.
"""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["WRITES", "WRITES_STATISTICS", "RandomFunction", "TensorSpec", "random_functions"]


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One argument. ``alias`` names an earlier argument, and how this one is made of it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    requires_grad: bool = False
    kind: str = "normal"
    channels_last: bool = False
    alias: tuple[str, str] | None = None

    def make(self, made: dict[str, Tensor], double: bool) -> Tensor:
        if self.alias is not None:
            source, how = self.alias
            tensor = made[source]
            return {"same": tensor, "detach": tensor.detach(), "data": tensor.data}[how]
        generator = torch.Generator().manual_seed(sum(self.name.encode()))
        value = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        if self.kind == "positive":
            value = value.abs() + 0.5
        elif self.kind == "zero":
            value = torch.zeros_like(value)
        elif self.kind == "weight":
            value = value / math.sqrt(max(1, math.prod(self.shape[1:])))
        # Rounded first, so that the double run computes on the same numbers.
        value = value.to(self.dtype)
        if double:
            value = value.double()
        if self.channels_last:
            formats = {4: torch.channels_last, 5: torch.channels_last_3d}
            value = value.contiguous(memory_format=formats[len(self.shape)])
        return value.requires_grad_(self.requires_grad)


@dataclasses.dataclass(frozen=True)
class RandomFunction:
    """A drawn function: ``source`` defines ``f`` with the arguments ``tensors``."""

    source: str
    tensors: tuple[TensorSpec, ...]
    ambient_autocast: bool = False
    dynamic: bool | None = False

    def arguments(self, *, double: bool = False) -> dict[str, Tensor]:
        """Fresh arguments by name, the same numbers in every call."""
        made: dict[str, Tensor] = {}
        for spec in self.tensors:
            made[spec.name] = spec.make(made, double)
        return made

    def function(self, *, double: bool = False) -> Callable[..., Any]:
        """A fresh function object, with nothing compiled for it yet.

        With ``double`` the one for float64 arguments: a view of the bits, which is drawn for
        bfloat16, takes integers as wide as those.
        """
        source = self.source.replace("torch.int16", "torch.int64") if double else self.source
        scope: dict[str, Any] = {"torch": torch, "F": F, "checkpoint": checkpoint}
        exec(compile(source, "<random function>", "exec"), scope)
        return scope["f"]

    def __str__(self) -> str:
        lines = [self.source]
        lines += [f"# {spec}" for spec in self.tensors]
        lines += [f"# ambient_autocast={self.ambient_autocast} dynamic={self.dynamic}"]
        return "\n".join(lines)

    __repr__ = __str__


_AUTOCAST = 'torch.autocast("cpu", dtype=torch.bfloat16)'

# Ways to write to a tensor ``{t}``, most of them behind autograd's back: what autograd sees
# raises in eager mode too, which is less of a test.
WRITES = (
    "{t}.data.mul_(0.5)",
    "{t}.data.add_(1.0)",
    "with torch.no_grad():\n    {t}.mul_(0.5)",
    "{t}.detach().add_(0.5)",
    "{t}.mul_(0.5)",
    "{t}.data.view(-1)[:1].fill_(0.25)",
    "{t}.data[..., :1] = 0.5",
    "{t}.data.copy_({t}.data.flip(0))",
    "out = {t}.data\ntorch.add(out, 1.0, out=out)",
    "alias = {t}.data\nalias += 0.5",
    "alias = {t}.data.view(torch.int16)\nalias &= 0",
    "alias = {t}.data.view(torch.int16)\nalias |= 1",
    "F.relu({t}.data, inplace=True)",
    "torch.relu_(input={t}.data)",
    "alias = {t}.detach().numpy()\nalias += 1",
    "torch._foreach_add_([{t}.data], 0.5)",
    "torch.ops.aten.add_.Tensor({t}.data, {t}.data)",
    "torch.ops.aten.mul.out({t}.data, {t}.data, out={t}.data)",
    "{t}.data.transpose(0, -1).mul_(2.0)",
    "{t}.data.requires_grad_(False).neg_()",
)
WRITES_STATISTICS = (
    "F.batch_norm(torch.ones(3, {c}, 2).to({t}.dtype), {t}.data, {t}.data.abs(), training=True)",
    "torch.ops.aten.batch_norm.default(torch.ones(3, {c}, 2).to({t}.dtype), None, None, {t}.data,"
    " {t}.data.abs(), True, 0.3, 1e-5, False)",
    "torch._native_batch_norm_legit(torch.ones(3, {c}, 2).to({t}.dtype), None, None, {t}.data,"
    " {t}.data.abs(), True, 0.3, 1e-5)",
    "F.instance_norm(torch.ones(3, {c}, 2).to({t}.dtype), {t}.data, {t}.data.abs(),"
    " use_input_stats=True)",
)
_NO_OPS = (
    "F.dropout({c}, 0.5, training=False)",
    "F.dropout({c}, 0.0, False, False)",
    "{c}.contiguous()",
    "{c}.to({c}.dtype)",
    "{c}.type_as({c})",
    "{c}.to(memory_format=torch.preserve_format)",
    "{c}.view({c}.shape)",
    "{c}.detach().requires_grad_()",
    "{c} * 1.0",
)
_ACTIVATIONS = (
    "{y} = F.relu({y})",
    "{y} = F.relu({y}, inplace=True)",
    "{y} = {y}.relu_()",
    "{y} = F.silu({y})",
    "{y} = F.silu({y}, inplace=True)",
    "{y}.mul_(0.5)",
    "{y} = {y} * 2 - 1",
    "{y} = torch.sigmoid({y}) * {y}",
)


class _Drawer:
    """Holds the state of one draw: the lines so far, the tensors, the current activation."""

    def __init__(self, draw: Callable[[st.SearchStrategy], Any]) -> None:
        self.draw = draw
        self.lines: list[str] = []
        self.tensors: list[TensorSpec] = []
        self.returned: list[str] = []
        # name -> shape of every activation that may be used again
        self.activations: dict[str, tuple[int, ...]] = {}
        self.convs: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
        self.bns: list[tuple[str, ...]] = []

    def pick(self, *values: Any) -> Any:
        return self.draw(st.sampled_from(values))

    def chance(self, percent: int) -> bool:
        return self.draw(st.integers(0, 99)) >= 100 - percent

    def tensor(self, name: str, shape: tuple[int, ...], **options: Any) -> str:
        options.setdefault("dtype", self.dtype)
        self.tensors.append(TensorSpec(name, shape, **options))
        return name

    def channel_tensor(self, name: str, channels: int, percent: int, **options: Any) -> str:
        """A [channels] tensor that requires a gradient with some probability, maybe an alias."""
        options.setdefault("dtype", self.bn_dtype)
        like = [
            t
            for t in self.tensors
            if t.shape == (channels,) and t.dtype == options["dtype"] and t.alias is None
        ]
        if like and self.chance(4):
            how = self.pick("same", "detach", "data")
            return self.tensor(name, (channels,), alias=(self.pick(*like).name, how), **options)
        return self.tensor(
            name, (channels,), requires_grad=percent > 0 and self.chance(percent), **options
        )

    # -- layers ----------------------------------------------------------------------------

    def settings(self) -> None:
        dtypes = [torch.float32] * 5 + [torch.float64] * 3 + [torch.bfloat16]
        self.dtype = self.pick(*dtypes)
        self.bn_dtype = self.dtype
        if self.dtype is torch.bfloat16 and self.chance(70):
            self.bn_dtype = torch.float32
        self.ambient = self.dtype is torch.float32 and self.chance(12)
        self.spatial = self.pick(2, 2, 2, 1, 1, 3, 0, 0)
        self.channels_last = self.spatial >= 2 and self.chance(15)
        self.dynamic = self.pick(False, False, False, False, True, None)

    def input(self) -> str:
        batch = self.pick(2, 2, 2, 1, 3, 0)
        self.empty = batch == 0
        channels = self.pick(2, 4, 3)
        self.levit = self.spatial == 0 and self.chance(50)
        if self.spatial == 0:
            shape = (batch, 3, channels) if self.levit else (batch, channels)
        else:
            size = 3 if self.spatial == 3 else 5
            shape = (batch, channels, *(self.pick(size, size - 1) for _ in range(self.spatial)))
        self.tensor(
            "x",
            shape,
            requires_grad=self.chance(50),
            channels_last=self.channels_last,
        )
        if self.chance(10):
            self.tensor("x_alias", shape, alias=("x", self.pick("same", "detach", "data")))
        name = "x"
        if self.chance(35):
            name = "x0"
            self.lines.append(f"x0 = {self.pick('x * 1.5', 'x.clone()', 'F.relu(x)')}")
        self.activations[name] = shape
        return name

    def layer(self, x: str, i: int) -> tuple[str, tuple[int, ...], list[str], str]:
        """Draw a layer; returns its expression, output shape, tensors, and the call's input."""
        shape = self.activations[x]
        shared = [c for c in self.convs if c[1] == shape]
        if shared and self.chance(25):
            template, _, out = self.pick(*shared)
            return template.replace("INPUT", x), out, [], x
        if self.spatial == 0:
            template, out, used = self.linear(shape, i)
        else:
            template, out, used = self.conv(shape, i)
        self.convs.append((template, shape, out))
        return template.replace("INPUT", x), out, used, x

    def bias(self, i: int, channels: int) -> tuple[str, list[str]]:
        if not self.chance(60):
            return "None", []
        name = self.channel_tensor(f"b{i}", channels, 75, dtype=self.dtype)
        return name, [name]

    def linear(self, shape: tuple[int, ...], i: int) -> tuple[str, tuple[int, ...], list[str]]:
        channels = self.pick(4, 3, 1, shape[-1])
        if len(shape) == 3 and self.chance(10):
            channels = shape[1]  # dimension 1 and the last are then easily confused
        w = self.tensor(
            f"w{i}", (channels, shape[-1]), requires_grad=self.chance(92), kind="weight"
        )
        b, biases = self.bias(i, channels)
        template = self.pick(
            f"F.linear(INPUT, {w}, {b})",
            f"F.linear(weight={w}, input=INPUT, bias={b})",
            f"torch.ops.aten.linear.default(INPUT, {w}, {b})",
        )
        return template, (*shape[:-1], channels), [w, *biases]

    def conv(self, shape: tuple[int, ...], i: int) -> tuple[str, tuple[int, ...], list[str]]:
        d, c_in, sizes = self.spatial, shape[1], shape[2:]
        groups = self.pick(1, 1, 1, *(g for g in (2, c_in) if c_in % g == 0))
        c_out = groups * self.pick(1, 2, 3) if groups > 1 else self.pick(4, 3, 2, 1, c_in)
        transposed = self.chance(25)
        kernel = tuple(self.pick(1, 2, 3) for _ in range(d))
        stride = tuple(self.pick(1, 1, 2) for _ in range(d))
        # Of a kernel of one element it changes nothing, but may crash (docs/pytorch-faults.md).
        dilation = tuple(1 if k == 1 else self.pick(1, 1, 2) for k in kernel)
        padding: Any = tuple(self.pick(0, 1) for _ in range(d))
        output_padding = (0,) * d
        reach = [dl * (k - 1) for dl, k in zip(dilation, kernel, strict=True)]
        if transposed:
            weight_shape = (c_in, c_out // groups, *kernel)
            if self.chance(30):
                output_padding = tuple(
                    min(1, max(s, dl) - 1) for s, dl in zip(stride, dilation, strict=True)
                )
            out = tuple(
                max(1, (n - 1) * s - 2 * p + r + op + 1)
                for n, s, p, r, op in zip(
                    sizes, stride, padding, reach, output_padding, strict=True
                )
            )
        else:
            weight_shape = (c_out, c_in // groups, *kernel)
            padding = tuple(
                max(p, (r - n + 2) // 2) for p, r, n in zip(padding, reach, sizes, strict=True)
            )
            out = tuple(
                (n + 2 * p - r - 1) // s + 1
                for n, p, r, s in zip(sizes, padding, reach, stride, strict=True)
            )
            if self.chance(15):
                padding = self.pick("same", "valid")
                same = padding == "same" or any(r >= n for r, n in zip(reach, sizes, strict=True))
                padding = "same" if same else "valid"
                stride = (1,) * d if same else stride
                out = tuple(
                    n if same else (n - r - 1) // s + 1
                    for n, r, s in zip(sizes, reach, stride, strict=True)
                )
        w = self.tensor(
            f"w{i}",
            weight_shape,
            requires_grad=self.chance(92),
            kind="weight",
            channels_last=self.channels_last and self.chance(70),
        )
        b, biases = self.bias(i, c_out)
        name = f"conv_transpose{d}d" if transposed else f"conv{d}d"
        rest = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        if transposed:
            rest["output_padding"] = output_padding
        form = self.pick("keywords", "keywords", "positional", "aten", "convolution", "defaults")
        if form == "convolution" and not isinstance(padding, str):
            lists = [list(values) for values in (stride, padding, dilation, output_padding)]
            values = f"{lists[0]}, {lists[1]}, {lists[2]}, {transposed}, {lists[3]}, {groups}"
            template = f"torch.ops.aten.convolution.default(INPUT, {w}, {b}, {values})"
        elif form == "positional" or (form == "aten" and isinstance(padding, str)):
            order = (
                ("stride", "padding", "output_padding", "groups", "dilation")
                if transposed
                else ("stride", "padding", "dilation", "groups")
            )
            values = ", ".join(repr(rest[k]) for k in order)
            template = f"F.{name}(INPUT, {w}, {b}, {values})"
        elif form == "aten":
            overload = "input" if transposed and d > 1 else "default"
            values = ", ".join(f"{k}={v!r}" for k, v in rest.items())
            template = f"torch.ops.aten.{name}.{overload}(INPUT, {w}, {b}, {values})"
        else:
            if form == "defaults":
                usual = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "output_padding": 0}
                usual = {k: (v if k == "groups" else (v,) * d) for k, v in usual.items()}
                rest = {k: v for k, v in rest.items() if v != usual[k]}
            rest = {k: (v[0] if v == (v[0],) * d else v) if isinstance(v, tuple) else v
                    for k, v in rest.items()}  # fmt: skip
            values = "".join(f", {k}={v!r}" for k, v in rest.items())
            template = (
                f"{self.pick('F', 'torch')}.{name}(input=INPUT, weight={w}, bias={b}{values})"
            )
        return template, (shape[0], c_out, *out), [w, *biases]

    # -- batch norms -----------------------------------------------------------------------

    def batch_norm(self, c: str, channels: int, i: int) -> tuple[str, list[str]]:
        shared = [b for b in self.bns if b[0] == str(channels)]
        if shared and self.chance(20):
            g, b, m, v = self.pick(*shared)[1:]
        else:
            g = b = "None"
            if self.chance(95):
                g = self.channel_tensor(
                    f"g{i}", channels, 92, kind=self.pick("normal", "normal", "zero")
                )
            if self.chance(90):
                b = self.channel_tensor(f"beta{i}", channels, 85)
            m = self.channel_tensor(f"m{i}", channels, 0)
            v = self.channel_tensor(f"v{i}", channels, 0, kind="positive")
            self.bns.append((str(channels), g, b, m, v))
        eps = self.pick(1e-5, 1e-3, 0.1)
        training = self.chance(2)
        if v not in {t.name for t in self.tensors if t.kind == "positive" and t.alias is None}:
            v = f"{v}.abs()"
        forms = (
            f"F.batch_norm({c}, {m}, {v}, {g}, {b}, {training}, 0.1, {eps})",
            f"F.batch_norm({c}, running_mean={m}, running_var={v}, weight={g}, bias={b}, eps={eps},"
            f" training={training})",
            f"F.batch_norm(input={c}, running_var={v}, running_mean={m}, bias={b}, weight={g})",
            f"torch.batch_norm({c}, {g}, {b}, {m}, {v}, {training}, 0.1, {eps}, True)",
            f"torch.ops.aten.batch_norm.default({c}, {g}, {b}, {m}, {v}, {training}, 0.1, {eps},"
            " False)",
            f"torch.native_batch_norm({c}, {g}, {b}, {m}, {v}, {training}, 0.1, {eps})[0]",
            f"torch.ops.aten.native_batch_norm.default({c}, {g}, {b}, {m}, {v}, {training}, 0.1,"
            f" {eps})[0]",
            f"torch.ops.aten._native_batch_norm_legit_no_training.default({c}, {g}, {b}, {m}, {v},"
            f" 0.1, {eps})[0]",
        )
        # The last three divide by zero on an empty batch, in eager mode, and end the process.
        forms = forms[:5] if self.empty else forms
        return self.pick(*forms[:3], *forms), [n for n in (g, b, m) if n != "None"]

    # -- hazards ---------------------------------------------------------------------------

    def write(self, targets: list[str]) -> list[str]:
        """Statements that write to one of ``targets``."""
        target = self.pick(*targets)
        spec = next((t for t in self.tensors if t.name == target), None)
        if spec is not None and len(spec.shape) == 1 and self.chance(15):
            text = self.pick(*WRITES_STATISTICS).format(t=target, c=spec.shape[0])
        else:
            text = self.pick(*WRITES).format(t=target)
        return text.split("\n")

    def block(self, x: str, i: int) -> str:
        """A layer and what follows it; returns the name of the result."""
        c, y = f"c{i}", f"y{i}"
        call, shape, layer_tensors, _ = self.layer(x, i)
        conv_lines = [f"{c} = {call}"]
        normalised, channels = c, shape[1] if self.spatial else shape[-1]
        between: list[str] = []
        if self.levit:
            normalised = f"rows{i}"
            form = self.pick("{c}.flatten(0, 1)", f"{{c}}.view(-1, {channels})",
                             f"{{c}}.reshape(-1, {channels})", "torch.flatten({c}, 0, 1)",
                             "{c}.transpose(1, 2)", "{c}")  # fmt: skip
            channels = shape[1] if form == "{c}" else channels
            between.append(f"{normalised} = {form.format(c=c)}")
        if self.chance(20):
            between.append(f"{normalised} = {self.pick(*_NO_OPS).format(c=normalised)}")
        bn_call, bn_tensors = self.batch_norm(normalised, channels, i)
        targets = [x, *layer_tensors, *layer_tensors, *bn_tensors, c]
        if any(t.name == "x_alias" for t in self.tensors):
            targets.append("x_alias")
        if self.chance(15):
            between.insert(self.pick(0, len(between)), "")
            at = between.index("")
            between[at : at + 1] = self.write(targets)
        if self.chance(6):
            between.append(self.pick(
                f"with torch.no_grad():\n    u{i} = {x} + 1",
                f"with {_AUTOCAST}:\n    u{i} = {x} + 1",
                "torch.set_grad_enabled(True)",
            ))  # fmt: skip
        between = [line for text in between for line in text.split("\n")]
        bn_lines = [f"{y} = {bn_call}"]
        if self.levit and shape[1] and self.chance(70) and "transpose" not in between[0]:
            bn_lines.append(f"{y} = {y}.reshape_as({c})")
        if self.chance(6):
            bn_lines.append(f"{y} = {y} * {c}.shape[0] + {c}.size(-1) + {c}.dim()")
        if self.chance(4):
            bn_lines.append(f"{y} = {y} + {c}" if not self.levit else f"{y} = {y} + {c}.sum()")
        if self.chance(3):
            self.returned.append(c)
        if self.chance(6):
            bn_lines += self.write([*targets, c, y])
        self.lines += self.arrange(conv_lines, between, bn_lines)
        self.activations[c] = shape
        return y

    def arrange(self, conv: list[str], between: list[str], bn: list[str]) -> list[str]:
        """Put regions around the parts of a block."""

        def inside(context: str, lines: list[str]) -> list[str]:
            return [f"with {context}:", *("    " + line for line in lines)]

        region = self.pick(_AUTOCAST, "torch.no_grad()", "torch.enable_grad()")
        where = self.pick(*["nowhere"] * 14, "conv", "bn", "all", "all", "checkpoint")
        if where == "conv":
            return [*inside(region, conv), *between, *bn]
        if where == "bn":
            return [*conv, *between, *inside(region, bn)]
        if where == "all":
            return inside(self.pick(_AUTOCAST, region), [*conv, *between, *bn])
        if where == "checkpoint" and not self.returned:
            y, x = bn[0].split(" = ")[0], self.block_input
            body = [f"def body({x}):", *("    " + li for li in (*conv, *between, *bn)),
                    f"    return {y}"]  # fmt: skip
            return [*body, f"{y} = checkpoint(body, {x}, use_reentrant=False)"]
        return [*conv, *between, *bn]

    def function(self) -> RandomFunction:
        self.settings()
        x = self.input()
        results = []
        for i in range(self.pick(1, 1, 2, 2, 3)):
            self.block_input = x
            before = self.activations[x]
            y = self.block(x, i)
            for _ in range(self.pick(0, 1, 1)):
                self.lines.append(self.pick(*_ACTIVATIONS).format(y=y))
            shape = self.activations[f"c{i}"]
            if self.levit and any(f"rows{i}.transpose" in li for li in self.lines):
                results.append(y)
                break
            self.lines.append(f"{y} = {y}.reshape(c{i}.shape)" if self.levit else "")
            self.activations[y] = shape
            if shape == before and self.chance(40):
                self.lines.append(self.pick(f"{y} = {y} + {x}", f"{y} += {x}"))
            if self.chance(25):
                results.append(y)
            else:
                x = y
            last = y
        else:
            results.append(last)
        body = "\n".join(
            line
            for line in (*self.lines, f"return {', '.join((*results, *self.returned))},")
            if line
        )
        names = ", ".join(t.name for t in self.tensors)
        return RandomFunction(
            f"def f({names}):\n{textwrap.indent(body, '    ')}",
            tuple(self.tensors),
            self.ambient,
            self.dynamic,
        )


@st.composite
def random_functions(draw: Callable[[st.SearchStrategy], Any]) -> RandomFunction:
    """Strategy for :class:`RandomFunction`."""
    return _Drawer(draw).function()
