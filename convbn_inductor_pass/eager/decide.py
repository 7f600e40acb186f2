"""Decide which batch norms of an eager forward do not save their input, and say why others do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import functional
from .._torch import eager as torch_eager
from ..codes import Code
from ..config import get_options
from .calls import BatchNormCall, is_plain
from .events import Event

__all__ = ["decide", "why_as_written"]


def why_as_written(before: Event | None) -> str:
    """Why a layer is only watched, from the same call in the forward before."""
    if before is None:
        return ""
    if before.used:
        return "it was in the forward before this one; if it no longer is, the next will be fused"
    if before.code is None:
        return "no batch norm took it in the forward before this one; the next will be fused"
    return ""


def decide(bn: BatchNormCall, event: Event | None) -> tuple[Code, str]:
    """Whether a batch norm may leave its input unsaved, and a detail.

    ``event`` is the layer's, if it ran in this region. As PyTorch writes it, a batch norm whose
    weight is frozen saves its input in eager mode, too: it need not, after a layer or not.
    """
    if bn.training or bn.running_mean is None or bn.running_var is None:
        return Code.BATCH_STATISTICS, ""
    if not bn.wants_gradient:
        return Code.NO_GRAD, ""
    trained = bn.weight is not None and bn.weight.requires_grad
    if trained and (reason := _why_not_after_layer(bn.input, event)) is not None:
        return reason
    c = bn.input
    if not is_plain(c):
        return Code.UNSUPPORTED_TENSOR, "input of the batch norm"
    for name in ("running_mean", "running_var", "weight", "bias"):
        if (tensor := getattr(bn, name)) is None:
            continue
        if not is_plain(tensor) or tensor.device != c.device:
            return Code.UNSUPPORTED_TENSOR, f"{name} of the batch norm"
        if (dtype := tensor.dtype) != c.dtype:
            mixed = c.dtype in (torch.float16, torch.bfloat16) and dtype == torch.float32
            if not mixed:
                return Code.UNSUPPORTED_DTYPE, f"{name} is {dtype}, the layer's {c.dtype}"
        if tensor.ndim != 1 or tensor.numel() != c.shape[1]:
            return Code.UNSUPPORTED_SHAPE, f"{name} has shape {tuple(tensor.shape)}"
    if bn.running_mean.requires_grad or bn.running_var.requires_grad:
        return Code.STATISTICS_REQUIRE_GRAD, ""
    follows_layer = event is not None or functional.layer_before(c) is not None
    return Code.FUSED if follows_layer else Code.SHAPE_ONLY, ""


def _why_not_after_layer(c: Tensor, event: Event | None) -> tuple[Code, str] | None:
    """Why the gradient of a batch norm's weight cannot come from the layer that gave ``c``."""
    node = functional.layer_before(c)
    layer: Any = event or node
    if layer is None:
        return Code.NOT_AFTER_LAYER, ""
    x, weight = layer.input(), layer.weight()
    if weight is not None and torch_eager.storage_is_freed(weight):
        return Code.WEIGHT_FREED, ""
    if node is not None and not node.has_input:
        return Code.LAYER_FROZEN, ""
    if event is not None and event.used:
        return Code.LAYER_OUTPUT_USED, ""
    if event is not None and event.as_written:
        return Code.LAYER_OUTPUT_USED, event.as_written
    if weight is not None and not weight.requires_grad and not get_options().fuse_frozen_layers:
        return Code.LAYER_FROZEN, ""
    if node is None:
        return Code.REGION, "the layer ran without a graph"
    if c._backward_hooks or c.retains_grad:
        return Code.LAYER_OUTPUT_USED, "a hook takes its gradient"
    if x is not None and torch_eager.storage_is_foreign(x):
        return Code.INPUT_MUTATED, "NumPy or others hold the memory of the layer's input"
    if node.conv is None and c.ndim != 2:
        return Code.UNBATCHED, f"{c.ndim} dimensions with channels last"
    return None
