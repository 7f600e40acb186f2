"""Decide which batch norms of an eager forward do not save their input, and say why others do."""

import torch
from torch import Tensor

from ..codes import Code
from ..config import get_options
from ..functional.conv_bn import node_of_layer
from .calls import BatchNormCall, is_plain
from .events import Event


def decide(
    bn: BatchNormCall, layer: Event | None, *, was_used: bool, hooked: bool
) -> tuple[Code, str]:
    """Whether a batch norm may leave its input unsaved, and a detail.

    ``layer`` is the call of the layer before it, if that ran in this region, ``was_used`` if its
    output was used elsewhere in the previous forward, ``hooked`` if others' hooks are active.
    """
    if bn.batch_statistics:
        return Code.BATCH_STATISTICS, ""
    if bn.running_mean.requires_grad or bn.running_var.requires_grad:
        return Code.STATISTICS_REQUIRE_GRAD, ""  # where PyTorch raises
    x, weight, bias = bn.input, bn.weight, bn.bias
    trained = weight is not None and weight.requires_grad
    wanted = trained or x.requires_grad or (bias is not None and bias.requires_grad)
    if not (wanted and torch.is_grad_enabled()):
        return Code.NO_GRAD, ""
    if trained and (reason := _why_not_from_layer(x, layer, was_used, hooked)) is not None:
        return reason
    if not all(t is None or is_plain(t) for t in (x, weight, bias)):
        return Code.UNSUPPORTED_TENSOR, "of the batch norm"
    return Code.SHAPE_ONLY if layer is None else Code.FUSED, ""


def _why_not_from_layer(
    c: Tensor, event: Event | None, was_used: bool, hooked: bool
) -> tuple[Code, str] | None:
    """Why the gradient of a batch norm's weight cannot come from the layer that gave ``c``."""
    if event is None:
        ended = c.grad_fn is not None and node_of_layer(c) is c.grad_fn
        return (Code.REGION, "the layer's region ended") if ended else (Code.NOT_AFTER_LAYER, "")
    weight = event.weight()
    # FSDP gives the memory back.
    if weight is not None and weight.numel() and not weight.untyped_storage().nbytes():
        return Code.WEIGHT_FREED, ""
    if event.used or was_used:
        return Code.LAYER_OUTPUT_USED, "" if event.used else "or was in the previous forward"
    if weight is not None and not weight.requires_grad and not get_options().fuse_frozen_layers:
        return Code.LAYER_FROZEN, ""
    if c.grad_fn is None:
        return Code.REGION, "the layer ran without grad mode"
    layer = event.layer
    if layer is None:
        return Code.NOT_AFTER_LAYER, "the type of the layer's autograd node is unknown"
    if not layer.is_conv and c.ndim != 2:
        return Code.UNBATCHED, f"{c.ndim} dimensions with channels last"
    if not layer.gave(c):
        return Code.NOT_AFTER_LAYER, ""
    if not layer.is_unchanged(c):
        return Code.INPUT_MUTATED, "or requires_grad is set, between the layer and the batch norm"
    if not all(t is None or is_plain(t) for t in (layer.input, layer.weight, layer.bias)):
        return Code.UNSUPPORTED_TENSOR, "of the layer"
    if c._backward_hooks or c.retains_grad:
        return Code.LAYER_OUTPUT_USED, "its gradient is used by a hook or retained"
    # Memory that PyTorch does not let be resized is others', or shared with another process. Under
    # hooks, such as checkpointing's, what backward reads may be a copy or recomputed.
    memory = layer.input.untyped_storage()
    if not (hooked or memory.resizable() or memory.is_shared()):
        return Code.INPUT_MUTATED, "NumPy, a file or another library owns the layer's input"
    return None
