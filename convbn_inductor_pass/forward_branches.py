"""Decide which parallel branches become one convolution, once every layer was decided about."""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from . import choice, epilogue, kernels
from .branches import Branches, find_branches
from .codes import ForwardCode
from .config import Options
from .epilogue import Activation, Residual
from .forward_decision import ForwardDecision, Surroundings
from .origin import layer_path, module_path
from .strides import part_is_returned, strides_are_used

__all__ = ["with_merged"]

aten = torch.ops.aten


def with_merged(
    decisions: list[ForwardDecision],
    graph: fx.Graph,
    around: Surroundings,
    options: Options,
    measure: bool,
) -> list[ForwardDecision]:
    """``decisions`` with those about parallel branches that become one convolution replaced."""
    by_layer = {d.chain.layer.node: d for d in decisions if d.code.sound}
    for branches in find_branches(graph, [d.chain for d in by_layer.values()]):
        mine = [by_layer[c.layer.node] for c in branches.chains]
        for merged in _merge(branches, mine, around, options, measure) or ():
            by_layer[merged.chain.layer.node] = merged
    return [by_layer.get(d.chain.layer.node, d) for d in decisions]


def _merge(
    branches: Branches,
    decisions: list[ForwardDecision],
    around: Surroundings,
    options: Options,
    measure: bool,
) -> list[ForwardDecision] | None:
    """Decisions that take the place of these, one for each branch; None to leave them."""
    wide, *contained = decisions
    activation, residual = _after(branches)
    last = next(x.last for x in (activation, residual, branches) if x is not None)
    paths = [layer_path(d.chain.layer.node) for d in decisions]
    paths += [module_path(s.node) for d in decisions for s in d.chain.steps]
    if not options.permits(*paths):
        return None
    if part_is_returned(last, around.parts) or strides_are_used(branches.last):
        return None
    if strides_are_used(last) or not kernels.can_merge(branches, activation):
        return None
    known = [d.seconds for d in decisions if d.seconds is not None]
    if len(known) < len(decisions):
        return None
    seconds = choice.seconds_merged(
        *(branches, sum(known), activation, residual),
        is_channels_last=around.is_channels_last,
        measure=measure,
    )
    if seconds is None:
        return None
    merged = dataclasses.replace(
        wide,
        code=ForwardCode.FOLDED,
        kernel=kernels.PACKED,
        activation=activation,
        residual=residual,
        detail=f"with parallel branches: {', '.join(map(_name, contained))}",
        seconds_folded=seconds,
        branches=branches,
    )
    return [merged, *(_contained_in(merged, d) for d in contained)]


def _after(branches: Branches) -> tuple[Activation | None, Residual | None]:
    """What oneDNN's convolution computes after the sum: an activation, or its other terms."""
    if not branches.others:
        return epilogue.activation_after(branches.last, branches.wide.out.dtype), None
    relu = [u for u in branches.last.users if u.target is aten.relu.default]
    if len(branches.last.users) != 1 or not relu:
        return None, Residual(branches.others[0], branches.last, relu=False)
    return None, Residual(branches.others[0], relu[0], relu=True)


def _contained_in(merged: ForwardDecision, decision: ForwardDecision) -> ForwardDecision:
    return dataclasses.replace(
        decision,
        code=ForwardCode.MERGED,
        kernel=merged.kernel,
        activation=None,
        residual=None,
        detail=_name(merged),
        bytes_folded=0,
        seconds_folded=0.0,
    )


def _name(decision: ForwardDecision) -> str:
    node = decision.chain.layer.node
    return layer_path(node) or str(node)
