"""Guard Inductor's own folding of constants under ``freezing=True``.

Freezing folds what is added to or multiplied with a layer's output into its weight
(``torch._inductor.fx_passes.binary_folding``). On torch 2.11 to 2.15 it assumes that a weight's
first dimension is the output channels and an operand's dimension 1 the channels: some graphs give
wrong results or do not compile. What the stricter check here rejects is computed as written. Can be
removed once theirs compares the operand with the channels.
"""

import contextlib
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..graph import layers
from ..records import log

aten = torch.ops.aten
_LAYERS = (aten.convolution.default, aten.mm.default, aten.addmm.default)


def fold_what_is_right(
    graph: Any, builtin_apply: Callable[[Any], int], patterns: Mapping[Any, list[Any]]
) -> int:
    """Run Inductor's binary folding on ``graph`` where :func:`why_wrong` has no objection."""
    with contextlib.ExitStack() as stack:
        for entry in itertools.chain(*patterns.values()):
            check = entry.extra_check
            stack.callback(setattr, entry, "extra_check", check)
            entry.extra_check = lambda match, check=check: _is_right(match) and check(match)
        return builtin_apply(graph)


def _is_right(match: Any) -> bool:
    node = match.output_node()
    reason = why_wrong(node)
    if reason:
        log.debug("freezing leaves %s as written: %s", node, reason)
    return not reason


def why_wrong(binary: torch.fx.Node) -> str:
    """Why Inductor must not fold ``binary``, a call on a layer's output; "" if it may.

    Any other call is left to Inductor's own check.
    """
    result, other = binary.args[:2]
    node: Any = result
    if isinstance(node, torch.fx.Node) and node.target is aten.reshape.default:
        node = node.args[0]
    if not isinstance(node, torch.fx.Node) or node.target not in _LAYERS:
        return ""
    shaped = layers.tensor_of(result)
    if shaped is None:
        return "no metadata"
    if binary.kwargs:
        return "alpha is dropped"  # the pattern ignores keywords
    is_conv = node.target is aten.convolution.default
    if is_conv and node.args[6]:
        return "a transposed convolution's output channels are not its weight's first dimension"
    if isinstance(other, torch.fx.Node):
        # None, too, where the operand is what gives the result its shape.
        dim = 1 if is_conv else shaped.ndim - 1
        if layers.operand_per_channel(other, shaped.shape, dim) is None:
            return "the operand does not vary along the channels alone"
        return ""
    weight = layers.tensor_of(node.args[2 if node.target is aten.addmm.default else 1])
    dtype = torch.float32 if weight is None else weight.dtype
    is_narrow = dtype.itemsize < 4 and isinstance(other, float)
    if is_narrow and torch.tensor(other, dtype=dtype).item() != other:
        return "the constant does not fit the weight's dtype"
    # Every constant is stored under this one name: a second overwrites the first, which is gone
    # after the next round of constant folding; then it is the second's turn.
    if any(n.op == "get_attr" and n.target == "other_tensor" for n in binary.graph.nodes):
        return "another constant is being folded"
    return ""
