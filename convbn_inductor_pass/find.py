"""Find batch norms and the layers before them. Nothing is judged here.

Between the two there may be nodes that do nothing: eval-mode dropout, a ``contiguous`` of
what is contiguous, a ``to`` the dtype that it has. After a linear layer there may also be
the view that makes rows of its result, as in ``bn(linear(x).flatten(0, 1))``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn

from . import _compat, effects, torch_ir
from .torch_ir import BatchNormCall, ConvCall, Unreadable

__all__ = ["Candidate", "find_candidates"]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A batch norm, what it follows, and the nodes that do nothing in between.

    ``layer`` is a :class:`ConvCall`, an :class:`Unreadable` one, or None if the batch norm
    follows something else; ``source`` is the node that it follows in any case. ``path`` are
    the nodes between the layer and the batch norm, nearest to the batch norm first.
    """

    batch_norm: BatchNormCall | Unreadable
    layer: ConvCall | Unreadable | None
    source: fx.Node | None
    path: tuple[fx.Node, ...] = ()

    @property
    def pair(self) -> tuple[ConvCall, BatchNormCall] | None:
        """The layer and the batch norm, if there are both and both can be read."""
        if isinstance(self.layer, ConvCall) and isinstance(self.batch_norm, BatchNormCall):
            return self.layer, self.batch_norm
        return None


def find_candidates(graph: fx.Graph) -> Iterator[Candidate]:
    """Every batch norm of ``graph`` in order, each with the layer that it follows, if any."""
    for node in graph.nodes:
        batch_norm = torch_ir.batch_norm_call(node)
        if batch_norm is None:
            continue
        if isinstance(batch_norm, Unreadable):
            yield Candidate(batch_norm, None, None)
            continue
        source, path = batch_norm.input, []
        layer = torch_ir.conv_call(source)
        while layer is None and (inner := _through(source)) is not None:
            path.append(source)
            source = inner
            layer = torch_ir.conv_call(source)
        yield Candidate(batch_norm, layer, source, tuple(path))


def _through(node: fx.Node) -> fx.Node | None:
    """The input of a node that passes its input on, or makes rows of it; else None."""
    input = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(input, fx.Node) or effects.effect_of(node) != effects.PURE:
        return None
    if torch_ir.is_idle_dropout(node):
        return input
    if node.op == "call_module":
        module = torch_ir._attribute(node.graph.owning_module, str(node.target))
        return input if type(module) is nn.Identity else None
    before, after = torch_ir.tensor_of(input), torch_ir.tensor_of(node)
    if before is None or after is None:
        return None
    if _is_same(node, before, after) or _is_rows(node, before, after):
        return input
    return None


_SAME_METHODS = {"contiguous", "to", "type", "float", "half", "bfloat16", "double", "type_as"}
_SAME_FUNCTIONS = {torch.ops.aten.contiguous.default}
_VIEWS = {"view", "reshape", "flatten"}


def _is_same(node: fx.Node, before: Tensor, after: Tensor) -> bool:
    """Whether this call returned the very tensor that it got: same storage, same view of it."""
    known = node.target in (_SAME_METHODS if node.op == "call_method" else _SAME_FUNCTIONS)
    key = _compat.storage_key(before)
    return (
        known
        and key is not None
        and key == _compat.storage_key(after)
        and before.dtype == after.dtype
        and before.shape == after.shape
        and before.stride() == after.stride()
        and before.requires_grad == after.requires_grad
    )


def _is_rows(node: fx.Node, before: Tensor, after: Tensor) -> bool:
    """Whether this is ``[..., C]`` viewed as ``[rows, C]``."""
    name = str(getattr(node.target, "__name__", node.target)).split(".")[0]
    return (
        name in _VIEWS
        and before.ndim > 2
        and after.ndim == 2
        and before.shape[-1] == after.shape[-1]
        and before.dtype == after.dtype
    )
