"""Bytes saved for backward, exact and without running anything.

The network is traced once on fake tensors, so that batches fit that no machine here could
hold, and the graph is then partitioned as each provider would. The figures depend on the
network and on PyTorch's version, not on the machine: they repeat bit for bit.
"""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._functorch import config as functorch_config

import convbn_inductor_pass
from convbn_inductor_pass._torch.tracing import trace
from convbn_inductor_pass.saved_tensors import SavedForBackward, saved_by_graph

from ..protocols import NotApplicable
from ..providers import Provider
from ..workload import Settings, setup

__all__ = ["saved_bytes"]

KINDS = ("activation", "weight", "mask")


def saved_bytes(settings: Settings, providers: list[Provider]) -> dict[str, dict[str, Any]]:
    """By provider: new bytes saved for backward, in all and by kind, and how many tensors.

    Raises:
        NotApplicable: nothing has a gradient, or a provider is not compiled.
        MissingLibrary: as :func:`bench.workload.setup`.
    """
    workload = setup(settings, fake=True)
    if not workload.protocol.trains:
        raise NotApplicable("nothing is saved for backward where there is none")
    if eager := [p.name for p in providers if not p.compiled]:
        raise NotApplicable(f"{', '.join(eager)}: only compiled graphs can be looked at")
    saved = {p.name: SavedForBackward(()) for p in providers}
    graphs = 0

    def on_graph(gm: fx.GraphModule, inputs: list[Any]) -> None:
        nonlocal graphs
        graphs += 1
        for provider in providers:
            with (
                functorch_config.patch(**provider.functorch),
                convbn_inductor_pass.options(**provider.options),
            ):
                saved[provider.name] += saved_by_graph(gm, inputs, provider.mode)

    with workload.region():
        trace(workload.model, workload.inputs, on_graph, dynamic=settings.dynamic)
    return {
        name: {
            "bytes": tensors.new_bytes,
            **{f"{kind}_bytes": tensors.bytes_of(kind) for kind in KINDS},
            "tensors": len(tensors.tensors),
            "graphs": graphs,
        }
        for name, tensors in saved.items()
    }
