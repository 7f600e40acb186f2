"""Find the layers of a graph that something foldable follows."""

from __future__ import annotations

import dataclasses

from torch import fx

from ..._torch import inductor
from ...graph import affine, layers
from ...graph.affine import AffineChain
from ...graph.layers import value_of
from . import epilogue, kernels
from .candidate import FoldCandidate
from .epilogue import Activation, Residual

__all__ = ["find_candidates"]


def find_candidates(graph: fx.Graph) -> list[FoldCandidate]:
    """Every layer of ``graph`` with what a kernel could compute with it; changes nothing.

    A backward graph has none. The addition of a residual, which may have a layer on both sides, is
    part of one candidate for cuDNN at most.
    """
    if inductor.is_backward(graph):
        return []
    is_channels_last = inductor.makes_channels_last(graph)
    added: set[fx.Node] = set()
    candidates = []
    for chain in affine.find_chains(graph):
        candidate = _candidate(chain, added, is_channels_last)
        if candidate is None:
            continue
        candidates.append(candidate)
        if candidate.kernel == kernels.CUDNN and candidate.residual is not None:
            added.add(candidate.residual.last)
    return candidates


def _candidate(
    chain: AffineChain, added: set[fx.Node], is_channels_last: bool
) -> FoldCandidate | None:
    """The layer with its whole epilogue if a kernel takes that, else with its chain alone."""
    cut, activation = _cut_at_activation(chain)
    residual = _residual(cut) if activation is None else None
    if residual is not None and residual.last in added:
        residual = None
    whole = FoldCandidate(cut, activation=activation, residual=residual)
    for candidate in (whole, FoldCandidate(chain)):
        kernel = kernels.kernel_for(candidate, is_channels_last=is_channels_last)
        if kernel:
            return dataclasses.replace(candidate, kernel=kernel)
    return None


def _cut_at_activation(chain: AffineChain) -> tuple[AffineChain, Activation | None]:
    """The chain up to where an activation begins, and the activation.

    Some begin with a step of an affine map themselves, as hardsigmoid does with ``x + 3``: of the
    possible cuts, the one that leaves the least behind.
    """
    if not kernels.has_epilogue(chain.layer):
        return chain, None
    best: tuple[AffineChain, Activation | None] = chain, None
    for end in range(len(chain.steps), -1, -1):
        cut = dataclasses.replace(chain, steps=chain.steps[:end])
        out = chain.layer.out
        if layers.same_sizes(value_of(cut.last).shape, out.shape):
            found = epilogue.activation_after(cut.last, out.dtype)
            if found is not None and (best[1] is None or best[1].last < found.last):
                best = cut, found
        if end and chain.steps[end - 1].reads_a_tensor:
            break
    return best


def _residual(chain: AffineChain) -> Residual | None:
    """The residual added to a chain, where it can as well be added to the layer's own elements."""
    is_moved = any(s.kind == "move" for s in chain.steps)
    if is_moved or value_of(chain.last).dtype != chain.layer.out.dtype:
        return None
    return epilogue.residual_after(chain.last)
