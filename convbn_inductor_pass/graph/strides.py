"""Where the strides of a layer's result can be observed: another kernel may choose other ones."""

from collections.abc import Callable, Iterator

import torch
from torch import fx

from .._torch import compat, inductor
from . import layers
from .layers import tensor_of, value_of

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def has_returned_view(node: fx.Node, parts_of_subclasses: set[fx.Node]) -> bool:
    """Whether the graph returns a view of a part of ``node``, or of what is generated from it.

    Inductor restores the strides of an output that is dense. A slice gets those of the memory that
    it is cut from. Nor does Inductor restore the strides of each of ``parts_of_subclasses``. With
    another rank they do not depend on how images are laid out.
    """
    rank = value_of(node).ndim
    for whole, views in _laid_out_like(node):
        size = tensor_of(whole)
        for returned in (whole, *views):
            part = tensor_of(returned)
            is_part = (
                part is None or size is None or not layers.known_equal(part.numel(), size.numel())
            )
            if is_part and any(u.op == "output" for u in returned.users):
                return True
            if returned in parts_of_subclasses and part is not None and part.ndim == rank:
                return True
    return False


def is_observed(node: fx.Node) -> bool:
    """Whether an operator may depend on the strides of ``node``, or of what is generated from it.

    A library's kernel may lay its result out otherwise than the graph says. Inductor accounts for
    that in aten's operators, but not in ``as_strided`` and in custom operators. What lies in
    memory in the order of channels-last as traced, as 1x1 maps do, stays so.
    """
    laid_out = _laid_out_like(node, but_not=_is_channels_last)
    values = (n for whole, views in laid_out for n in (whole, *views))
    users = (u for n in values for u in n.users if u.op == "call_function")
    return any(compat.reads_strides(u.target) for u in users)


def _laid_out_like(
    node: fx.Node, but_not: Callable[[fx.Node], bool] = lambda node: False
) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """``node`` and what is generated from it, laid out as its inputs are, each with its views."""
    pending, seen = [node], {node}
    while pending:
        node = pending.pop()
        if but_not(node):
            continue
        views = views_of(node)
        yield node, views
        made = {u for n in (node, *views) for u in n.users if inductor.is_generated(u.target)}
        pending += made - seen
        seen |= made


def _is_channels_last(node: fx.Node) -> bool:
    tensor = tensor_of(node)
    is_static = tensor is not None and all(isinstance(size, int) for size in tensor.shape)
    memory_format = CHANNELS_LAST.get(tensor.ndim) if tensor is not None and is_static else None
    return memory_format is not None and value_of(node).is_contiguous(memory_format=memory_format)


def views_of(node: fx.Node) -> list[fx.Node]:
    """All views of ``node``, and views of those."""
    found = [u for u in node.users if compat.is_view(u.target)]
    for view in found:
        found += [u for u in view.users if compat.is_view(u.target) and u not in found]
    return found
