"""Bytes saved for backward of whole networks, by one ruler for this package and for the change.

``python -m test.upstream.saved_bytes WHAT...`` prints a line of JSON a network, of the torch that
it runs on.
WHAT is "eval" (no pass), "builtin" (PyTorch's own pass of the flag, this package's not there),
"scale_gradient" (this package's pass of that name alone) or "tune" (all that it does by default).
The ruler is ``convbn_inductor_pass.saved_tensors``: the graphs as Inductor partitions them.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import fx

from bench.cases import CASES
from bench.workload import Settings, setup
from convbn_inductor_pass._torch.tracing import trace
from convbn_inductor_pass.saved_tensors import SavedForBackward, saved_by_graph

__all__ = ["WORKLOADS", "saved_bytes"]

# Network and precision; autocast has casts between layers and batch norms.
WORKLOADS = (
    ("resnet18", "float32"),
    ("resnet50", "float32"),
    ("mobilenet_v2", "float32"),
    ("regnet_y_1_6gf", "float32"),
    ("unet", "float32"),
    ("dcgan_generator", "float32"),
    ("dcgan_discriminator", "float32"),
    ("levit_128", "float32"),
    ("resnet18", "bf16-autocast"),
    ("mobilenet_v2", "bf16-autocast"),
    ("dcgan_generator", "bf16-autocast"),
)
_BATCH = 4


def saved_bytes(network: str, precision: str, what: list[str]) -> dict[str, int]:
    """Bytes saved for backward, by WHAT, in a step in which all parameters train."""
    case = CASES[network]
    shape = case.shape if network.startswith(("dcgan", "levit")) else case.small_shape
    workload = setup(Settings(network, _BATCH, shape, precision=precision), fake=True)
    saved = {each: SavedForBackward(()) for each in what}

    def on_graph(gm: fx.GraphModule, inputs: list[Any]) -> None:
        for each in what:
            mode: Any = each
            saved[each] += saved_by_graph(gm, inputs, mode)

    with workload.region():
        trace(workload.model, workload.inputs, on_graph)
    return {each: s.new_bytes for each, s in saved.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, precision in WORKLOADS:
        row = saved_bytes(name, precision, sys.argv[1:])
        print(json.dumps([f"{name} {precision}", row]), flush=True)
