"""The kernel half: a layer and the affine map after it become one layer with a scaled weight.

    y = act(affine(conv(x, W, b)) [+ other])   =>   y = conv(x, s * W, shift) with act and + inside

The scaled weight is computed in each call from the live parameters, so that nothing goes
stale after an optimizer step, unlike with ``freezing=True``. On CPU the layer becomes oneDNN's
convolution with a fused epilogue; the addition of a residual is fused by Inductor's own
patterns for it. On GPUs it may become cuDNN's, with the residual. Runs on aten IR as a post-grad
pass: find, decide, choose, rewrite.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator

import torch
from GONE.forward_branches import with_merged
from torch import fx

from ..._torch import compat, inductor
from ...codes import ForwardCode
from ...config import Options
from ...graph import affine, layers
from ...graph.affine import AffineChain
from ...graph.builder import Builder
from ...graph.layers import tensor_of
from ...graph.provenance import layer_path, module_path
from ...graph.strides import part_is_returned, strides_are_used

# GONE import choice
# GONE import kept
from . import epilogue, kernels
from .candidate import ForwardDecision, Surroundings
from .epilogue import Activation
from .rewrite import compute_as_linear, fold_forward, merge_branches

__all__ = ["analyze", "apply"]

aten = torch.ops.aten


def analyze(graph: fx.Graph, options: Options, *, measure: bool = False) -> list[ForwardDecision]:
    """Decide about every layer of ``graph`` that something foldable follows; changes nothing.

    ``measure`` lets ``forward="auto"`` time what was not timed before on this machine.
    """
    if any(n.op == "placeholder" and n.name.startswith("tangents_") for n in graph.nodes):
        return []  # a backward graph
    surroundings = Surroundings.of(graph)
    decisions: list[ForwardDecision] = []
    for chain in affine.find_chains(graph):
        decision = _decide(chain, surroundings, options, measure)
        if decision is not None:
            decisions.append(decision)
            if decision.kernel == kernels.CUDNN and decision.residual is not None:
                surroundings.taken.add(decision.residual.last)
    if surroundings.may_keep(options):
        decisions = with_merged(decisions, graph, surroundings, options, measure)
    # In the order in which they are rewritten: scaled weights are shared forwards.
    return sorted(decisions, key=lambda d: surroundings.order[d.place])


def _decide(
    chain: AffineChain, around: Surroundings, options: Options, measure: bool
) -> ForwardDecision | None:
    layer, order, writes = chain.layer, around.order, around.writes
    chain, activation = _with_activation(chain)
    residual = epilogue.residual_after(chain.last) if activation is None else None
    result = tensor_of(chain.last)
    # The layer's kernel would add it to numbers where the layer has them, before any move.
    is_moved = any(s.kind == "move" for s in chain.steps)
    if result is None or result.dtype != layer.out.dtype or is_moved:
        residual = None
    if residual is not None and residual.last in around.taken:
        residual = None
    folding = kernels.folding_kernels(
        chain,
        activation,
        residual,
        may_pack=around.may_keep(options),
        is_channels_last=around.is_channels_last,
    )
    if not chain.steps and activation is None and kernels.CUDNN not in folding:
        return None  # nothing to gain
    if options.forward == "fold" and folding[0] == kernels.ATEN and not chain.steps:
        return None  # its own operator computes no activation
    whole = ForwardDecision(
        chain,
        ForwardCode.FOLDED,
        folding[0],
        activation,
        residual,
        "",
        *choice.bytes_moved(chain, activation, residual, folding[0]),
    )

    def decision(code: ForwardCode, detail: str = "") -> ForwardDecision:
        return dataclasses.replace(whole, code=code, detail=detail)

    paths = (layer_path(layer.node), *(module_path(s.node) for s in chain.steps))
    if not options.permits(*paths):
        return decision(ForwardCode.DENIED, " and ".join(filter(None, dict.fromkeys(paths))))
    if layer.out.dtype not in _DTYPES or not _DTYPES[layer.out.dtype].issuperset(_dtypes(chain)):
        code = ForwardCode.UNSUPPORTED_DTYPE
        if layer.out.dtype == torch.float16:
            code = ForwardCode.FLOAT16_RANGE
        return decision(code, str(layer.out.dtype))
    if layers.is_quantised(layer.weight):
        return decision(ForwardCode.QUANTISED, str(layer.weight))
    if not affine.numbers_fit(chain):
        return decision(ForwardCode.NUMBER_RANGE)
    end = chain.last if activation is None else activation.last
    ends = (end,) if residual is None else (end, residual.last)
    first, last = order[layer.node], order[ends[-1]]
    if bisect.bisect_right(writes, first) != bisect.bisect_left(writes, last):
        return decision(ForwardCode.WRITE_BETWEEN, f"between {layer.node} and {ends[-1]}")
    if inductor.in_subgraph():
        return decision(ForwardCode.SUBGRAPH)
    if part_is_returned(end, around.parts):
        return decision(ForwardCode.VIEW_RETURNED, str(chain.last))
    if any(strides_are_used(node) for node in ends):
        return decision(ForwardCode.STRIDES_USED, str(end))
    if options.forward == "fold":
        return _computed_by(whole, folding[0])
    # From here on only speed decides: codes that are ``sound``.
    costs = choice.choose(
        chain,
        activation,
        residual,
        folding,
        is_channels_last=around.is_channels_last,
        measure=measure,
    )
    whole = dataclasses.replace(
        whole, seconds_exact=costs.seconds_exact, seconds_folded=costs.seconds_folded
    )
    return (
        decision(ForwardCode.SLOWER) if costs.kernel is None else _computed_by(whole, costs.kernel)
    )


def _computed_by(decision: ForwardDecision, kernel: str) -> ForwardDecision | None:
    """``decision`` to rewrite, for a kernel and with the epilogue that it computes."""
    activation = None if kernel in (kernels.ATEN, kernels.UNFOLDED_LINEAR) else decision.activation
    adds = kernel in kernels.ADDING
    residual = decision.residual if adds else None
    is_linear = kernel == kernels.UNFOLDED_LINEAR
    code = ForwardCode.AS_LINEAR if is_linear else ForwardCode.FOLDED
    if kernel == kernels.ATEN and not decision.chain.steps:
        return None  # nothing to gain
    return dataclasses.replace(
        decision, code=code, kernel=kernel, activation=activation, residual=residual
    )


# What a layer's dtype may meet in its chain.
_DTYPES = {
    torch.float32: {torch.float32},
    torch.bfloat16: {torch.bfloat16, torch.float32},
    torch.float64: {torch.float64},
}


def _dtypes(chain: AffineChain) -> Iterator[torch.dtype]:
    for node in (chain.layer.input, chain.layer.weight, *(s.node for s in chain.steps)):
        tensor = tensor_of(node)
        if tensor is not None:
            yield tensor.dtype


def _with_activation(chain: AffineChain) -> tuple[AffineChain, Activation | None]:
    """The chain up to where an activation begins, and the activation.

    Some begin with a step of an affine map themselves, as hardsigmoid does with ``x + 3``: the
    cut that leaves least behind is taken.
    """
    if not kernels.takes_activation(chain.layer):
        return chain, None
    best: tuple[AffineChain, Activation | None] = chain, None
    for end in range(len(chain.steps), -1, -1):
        cut = dataclasses.replace(chain, steps=chain.steps[:end])
        found = None
        if _has_shape_of(cut, chain.layer.out):
            found = epilogue.activation_after(cut.last, chain.layer.out.dtype)
        if found is not None and (best[1] is None or best[1].last < found.last):
            best = cut, found
        if end and chain.steps[end - 1].reads_a_tensor:
            break
    return best


def _has_shape_of(chain: AffineChain, out: torch.Tensor) -> bool:
    """Whether the chain's result has the layer's shape, as what is computed number by number."""
    result = tensor_of(chain.last)
    return result is not None and layers.same_sizes(result.shape, out.shape)


def apply(decisions: list[ForwardDecision], graph: fx.Graph) -> int:
    """Rewrite the graph as decided; returns the number of layers rewritten.

    Weights scaled in the same way are scaled once: a head that is applied to several levels
    of a pyramid shares them.
    """
    wanted = [d for d in decisions if d.code.rewritten]
    if not wanted:
        return 0
    writes = any(compat.is_mutable(n.target) for n in graph.nodes)
    build = Builder(graph, share=not writes)
    with inductor.update_metadata(graph):
        try:
            for decision in wanted:
                chain, activation, residual = decision.chain, decision.activation, decision.residual
                with graph.inserting_before(decision.place), compat.fake_mode_of(chain.layer.out):
                    if decision.branches is not None:
                        merge_branches(decision.branches, activation, build)
                    elif decision.code is ForwardCode.MERGED:
                        continue  # gone with the widest of its branches, or soon to go
                    elif decision.code is ForwardCode.AS_LINEAR:
                        compute_as_linear(chain.layer, build)
                    else:
                        fold_forward(chain, activation, residual, decision.kernel, build)
        finally:
            # If one fails, too: Inductor must not see packed weights.
            kept.keep_packed(graph)
    return len(wanted)
