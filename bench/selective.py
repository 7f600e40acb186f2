"""Which parameters are trained, and what is saved for backward then: eager and compiled.

    python -m bench selective

The cases are those of "Lowering PyTorch's Memory Consumption for Selective Differentiation" (arXiv
2404.12406): all parameters have a gradient, only the input, only convolutions, only normalization
layers. Bytes are exact: in eager mode what saved-tensor hooks see, each storage once, without
parameters, buffers and the input; compiled, what the partitioned graph hands to the backward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import convbn_inductor_pass as cbn
from convbn_inductor_pass.saved_tensors import saved_for_backward

from .eager_coverage import prepare, saved_bytes
from .libraries import require
from .protocols import is_batch_norm
from .reporting.tables import markdown

__all__ = ["CASES", "NETWORKS", "measure", "table"]

NETWORKS = (
    *("resnet18", "resnet101", "resnext101_32x8d", "vgg16_bn", "mobilenet_v3_large"),
    *("efficientnet_v2_s", "segmentation.deeplabv3_resnet101"),
)
SHAPE = (2, 3, 224, 224)

CASES: dict[str, Callable[[nn.Module], bool]] = {
    "all": lambda m: True,
    "input": lambda m: False,
    "conv": lambda m: isinstance(m, nn.Conv2d),
    "norm": is_batch_norm,
}


class _Output(nn.Module):
    """A network's output, without a dictionary around it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        y = self.network(x)
        return y["out"] if isinstance(y, dict) else y


def build(name: str) -> nn.Module:
    """A network of torchvision's in eval mode.

    Raises:
        MissingLibrary: torchvision is not there.
    """
    folder, _, last = name.rpartition(".")
    models = require("torchvision.models" + (f".{folder}" if folder else ""))
    kwargs = {"weights_backbone": None} if folder else {}
    torch.manual_seed(0)
    return prepare(_Output(getattr(models, last)(weights=None, **kwargs)))


def measure(name: str) -> Iterator[dict[str, Any]]:
    """A row for each case: bytes saved by eager eval mode, and ``turn_on``; compiled, too."""
    for case, is_trained in CASES.items():
        model = build(name)
        for module in model.modules():
            for p in module.parameters(recurse=False):
                p.requires_grad_(is_trained(module))
        x = torch.randn(SHAPE).requires_grad_(case in ("all", "input"))
        compiled = {}
        for mode in ("eval", "tune"):
            torch._dynamo.reset()
            compiled[mode] = saved_for_backward(model, x, mode=mode).new_bytes
        yield {
            "network": name.rpartition(".")[2],
            "case": case,
            "eager": saved_bytes(model, x),
            "turn_on": saved_bytes(cbn.turn_on(copy.deepcopy(model)), x),
            "compiled": compiled["eval"],
            "compiled, ours": compiled["tune"],
        }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, in MB."""
    header = list(rows[0])
    cells = [[v if isinstance(v, str) else f"{v / 1e6:,.1f}" for v in row.values()] for row in rows]
    return markdown(header, cells)
