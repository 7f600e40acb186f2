"""The epilogue of a folded layer: an activation, or the addition of a residual, after it.

An activation is recognized by its decomposition: its functional form is traced once with Inductor's
decompositions of the running version of PyTorch, and the nodes after a layer are compared with
that, so that no spelling is written down here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..._torch import compat, inductor
from ...graph.layers import is_cast, same_sizes, tensor_of, value_of

__all__ = ["Epilogue", "activation_after", "residual_after"]

aten = torch.ops.aten
_MAX_NODES = 16  # of an activation; tanh's GELU in bfloat16 has 12


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """What a layer's kernel computes after the affine map; ``last`` is the result.

    An activation, whose ``name``, ``scalars`` and ``algorithm`` are as oneDNN's convolution takes
    them; or the addition of ``other``, a residual: "add", or "add+relu" if a ReLU comes after it.
    """

    name: str
    last: fx.Node
    scalars: tuple[float, ...] = ()
    algorithm: str = ""
    other: fx.Node | None = None


def activation_after(node: fx.Node, dtype: torch.dtype) -> Epilogue | None:
    """The longest activation of ``node``, if ``node`` has no other use; its result is in ``dtype``.

    Where ``node`` is in another dtype, as one that is not rounded to the layer's dtype yet, the
    activation ends with the cast.
    """
    tensor = value_of(node)
    if tensor.dtype not in _TABLED:
        return None
    table = _table(tensor.dtype)
    region, found = [node], None
    while len(region) <= _MAX_NODES:
        outside = {u for n in region for u in n.users if u not in region}
        user = min(outside, default=None)
        if user is None or not _is_pointwise_of(user, region, tensor):
            break
        region.append(user)
        if all(u in region for n in region[:-1] for u in n.users):
            result: Any = user if tensor.dtype == dtype else user.args[0]
            if result is not user and not _casts_to(user, dtype):
                continue
            template, constants = _expression(result, node)
            for entry in table.get(template, ()):
                scalars = entry.match(constants)
                if scalars is not None:
                    found = Epilogue(entry.name, user, scalars, entry.algorithm)
    return found


def residual_after(node: fx.Node) -> Epilogue | None:
    """The addition of another tensor of the same shape and dtype to ``node``, with its ReLU."""
    add = _only_user(node)
    if add is None or add.target is not aten.add.Tensor or add.kwargs.get("alpha", 1) != 1:
        return None
    other = next((a for a in add.all_input_nodes if a is not node), None)
    mine, added = value_of(node), tensor_of(other)
    if added is None or mine.dtype != added.dtype or not same_sizes(mine.shape, added.shape):
        return None
    relu = _only_user(add)
    if relu is None or relu.target is not aten.relu.default:
        return Epilogue("add", add, other=other)
    return Epilogue("add+relu", relu, other=other)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_pointwise_of(node: fx.Node, region: list[fx.Node], like: Tensor) -> bool:
    """Whether ``node`` is computed element by element from nodes of ``region`` alone."""
    value = tensor_of(node)
    return (
        node.op == "call_function"
        and value is not None
        and same_sizes(value.shape, like.shape)
        and all(n in region for n in node.all_input_nodes)
        and compat.is_pointwise(node.target)
    )


def _casts_to(node: fx.Node, dtype: torch.dtype) -> bool:
    return is_cast(node) and value_of(node).dtype == dtype


def _expression(node: fx.Node, x: fx.Node) -> tuple[str, tuple[float, ...]]:
    """``node`` as an expression of ``x``: text with a # for each constant, and the constants."""
    constants: list[float] = []

    def text(value: Any) -> str:
        if value is x:
            return "x"
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            constants.append(value)
            return "#"
        if not isinstance(value, fx.Node):
            return str(value)
        before = tensor_of(value.args[0] if value.args else None)
        if before is not None and _casts_to(value, before.dtype):
            return text(value.args[0])
        arguments = [text(a) for a in value.args]
        arguments += [f"{k}={text(v)}" for k, v in sorted(value.kwargs.items())]
        return f"{value.target}({', '.join(arguments)})"

    return text(node), tuple(constants)


class _Entry(NamedTuple):
    """One spelling of an activation: the constants in it, and which of them are parameters."""

    name: str
    algorithm: str
    constants: tuple[float, ...]
    parameters: tuple[int, ...]

    def match(self, constants: tuple[float, ...]) -> tuple[float, ...] | None:
        """The activation's parameters, if the constants are those of this spelling."""
        pairs = enumerate(zip(constants, self.constants, strict=True))
        if any(a != b for i, (a, b) in pairs if i not in self.parameters):
            return None
        parameters = tuple(float(constants[i]) for i in self.parameters)
        if self.name == "hardtanh" and not parameters[0] <= parameters[1]:
            return None  # well defined as written; oneDNN refuses it
        return parameters


_TABLED = (torch.float32, torch.bfloat16)
# Constants that no spelling contains by itself, to see where parameters end up.
_A, _B = -0.71828, 0.31416
_ACTIVATIONS: tuple[tuple[str, str, tuple[float, ...], Callable[[Tensor], Tensor]], ...] = (
    ("relu", "", (), F.relu),
    ("relu", "", (), lambda x: x.clamp(min=0)),
    ("sigmoid", "", (), torch.sigmoid),
    ("tanh", "", (), torch.tanh),
    ("swish", "", (), F.silu),
    ("swish", "", (), lambda x: x * torch.sigmoid(x)),
    ("hardswish", "", (), F.hardswish),
    ("hardswish", "", (), lambda x: x * F.relu6(x + 3) / 6),
    ("hardsigmoid", "", (), F.hardsigmoid),
    ("hardsigmoid", "", (), lambda x: F.relu6(x + 3) / 6),
    ("gelu", "none", (), F.gelu),
    ("gelu", "tanh", (), lambda x: F.gelu(x, approximate="tanh")),
    ("leaky_relu", "", (_A,), lambda x: F.leaky_relu(x, _A)),
    ("hardtanh", "", (_A, _B), lambda x: F.hardtanh(x, _A, _B)),
    ("hardtanh", "", (_A, _B), lambda x: x.clamp(_A, _B)),
)


@functools.cache
def _table(dtype: torch.dtype) -> dict[str, list[_Entry]]:
    """Spellings of the activations for tensors of ``dtype``, by their text."""
    table: dict[str, list[_Entry]] = {}
    for name, algorithm, parameters, function in _ACTIVATIONS:
        graph = inductor.trace_decomposed(function, torch.empty(2, dtype=dtype))
        (x,), (output,) = (graph.find_nodes(op=op) for op in ("placeholder", "output"))
        template, constants = _expression(output.args[0], x)
        if len(parameters) != sum(c in parameters for c in constants):
            continue  # a spelling in which a parameter stands twice
        where = tuple(constants.index(p) for p in parameters)
        entry = _Entry(name, algorithm, constants, where)
        if entry not in table.setdefault(template, []):
            table[template].append(entry)
    return table
