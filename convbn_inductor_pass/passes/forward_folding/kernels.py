"""Candidate kernels for a folded layer: which of them can take it, and the bytes moved.

To add one: a row of ``KERNELS`` here, and what it emits in :mod:`rewrite`.

The cost model counts what is read and written besides the layer's own input and output. As
written, a generated kernel reads the layer's output and writes the result of the affine map and its
epilogue. Folded, that kernel is gone if the layer's own computes all of it; instead the weight is
read and written once more. Where a user of the result is computed in the same generated kernel as
the affine map anyway (a reduction, another pointwise function), nothing is gained.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from ..._torch import compat, inductor
from ...graph import layers
from ...graph.layers import Layer, value_of
from .candidate import FoldCandidate

__all__ = ["ATEN", "CUDNN", "ONEDNN", "bytes_moved", "has_epilogue", "kernel_for"]

CUDNN = "cudnn"
"""cuDNN's convolution, with the ReLU and a residual before it inside."""
ONEDNN = "onednn"
"""oneDNN's convolution, the activation inside; a residual is added by Inductor's own patterns."""
ATEN = "aten"
"""The layer's own operator with a scaled weight and a shifted bias, without an epilogue."""


def kernel_for(candidate: FoldCandidate, *, is_channels_last: bool) -> str:
    """The first kernel that takes ``candidate`` with all of its epilogue.

    "" if there is none, or it computes no more than the layer as written. ``is_channels_last`` says
    whether Inductor makes what goes through convolutions channels-last.
    """
    kernel = next((name for name, takes in KERNELS if takes(candidate, is_channels_last)), "")
    gains = candidate.chain.steps or candidate.activation is not None or kernel == CUDNN
    return kernel if gains else ""


def has_epilogue(layer: Layer) -> bool:
    """Whether a kernel can compute an activation after this layer."""
    return _is_onednn_layer(layer) or _is_cudnn_layer(layer)


def _cudnn_takes(c: FoldCandidate, is_channels_last: bool) -> bool:
    is_relu = c.activation is not None and c.activation.name == "relu"
    ends_in_relu = is_relu if c.residual is None else c.residual.relu
    return is_channels_last and ends_in_relu and _is_cudnn_layer(c.layer)


def _onednn_takes(c: FoldCandidate, _: bool) -> bool:
    may_add = c.activation is None and _may_add_and_raise(c.layer, c.chain.last)
    return _is_onednn_layer(c.layer) and _is_known_channels_last(c.layer) and not may_add


def _aten_takes(c: FoldCandidate, _: bool) -> bool:
    return c.activation is None and c.residual is None


KERNELS: tuple[tuple[str, Callable[[FoldCandidate, bool], bool]], ...] = (
    (CUDNN, _cudnn_takes),
    (ONEDNN, _onednn_takes),
    (ATEN, _aten_takes),
)


def _is_cudnn_layer(layer: Layer) -> bool:
    """Whether cuDNN may have a convolution with an epilogue for this layer."""
    nodes = (layer.node, layer.input, layer.weight)
    sizes = [size for node in nodes for size in value_of(node).shape]
    return (
        layer.is_conv
        and not layer.layout.transposed
        and layer.layout.groups == 1  # of others, it has few
        and layer.out.ndim == 4  # of others, Inductor makes nothing channels-last on GPUs
        and layer.out.dtype in (torch.float32, torch.bfloat16)
        # There may be none for another size. Nothing to compute, nothing to gain.
        and all(isinstance(size, int) and size > 0 for size in sizes)
        and inductor.has_cudnn_epilogues(layer.out.device)
        and inductor.for_python()
    )


def _is_onednn_layer(layer: Layer) -> bool:
    """Whether oneDNN has a convolution with an epilogue for this layer."""
    return (
        layer.is_conv
        and not layer.layout.transposed
        and layer.out.ndim in (4, 5)
        and layer.out.dtype in (torch.float32, torch.bfloat16)
        and layer.out.device.type == "cpu"
        and inductor.has_onednn_epilogues(layer.out.dtype)
    )


def _is_known_channels_last(layer: Layer) -> bool:
    """Whether oneDNN's convolution sees that its input is channels-last, as Inductor made it.

    An input of one channel, or of 1x1 maps, is contiguous as well. oneDNN's result then is, too,
    which Inductor does not expect.
    """
    _, channels, *maps = value_of(layer.input).shape
    surely = compat.surely  # makes no guard on symbolic sizes
    return surely(channels != 1) and any(surely(size != 1) for size in maps)


def _may_add_and_raise(layer: Layer, last: fx.Node) -> bool:
    """Whether Inductor might let oneDNN's convolution add what comes after ``last``, and raise.

    Where oneDNN does not both add and rectify (a grouped convolution; an input that counts as
    contiguous, as 1x1 maps do), PyTorch does so with a kernel that has no bfloat16 and raises
    (2.11 to 2.15).
    """
    is_narrow = layer.out.dtype == torch.bfloat16
    return is_narrow and any(u.target is torch.ops.aten.add.Tensor for u in last.users)


def bytes_moved(candidate: FoldCandidate) -> tuple[int, int]:
    """Bytes moved as written and folded, besides the layer's own input and output.

    Hints where sizes are symbolic.
    """
    chain, out = candidate.chain, candidate.layer.out
    fused = bool(candidate.epilogue)
    kernel_goes = fused or (_ends_a_kernel(chain.last) and not _adds_bias_apart(candidate))
    exact = 2 * compat.size_hint(out.numel()) * out.element_size() if kernel_goes else 0
    return exact, _weight_bytes(candidate.layer) if chain.scales else 0


def _weight_bytes(layer: Layer) -> int:
    """Bytes that scaling the weight reads and writes."""
    # A weight that autocast casts down is read and written anyway, in the same kernel.
    if layers.without_casts(layer.weight) is not layer.weight:
        return 0
    weight = value_of(layer.weight)
    return 2 * compat.size_hint(weight.numel()) * weight.element_size()


def _adds_bias_apart(candidate: FoldCandidate) -> bool:
    """Whether Inductor takes the bias off the layer and into a generated kernel, as on GPUs."""
    layer = candidate.layer
    has_bias = candidate.chain.shifts or layer.bias is not None
    return layer.is_conv and has_bias and layer.out.device.type != "cpu"


def _ends_a_kernel(node: fx.Node) -> bool:
    """Whether ``node`` is written to memory, since a user of it is not generated code."""
    return any(u.op == "output" or not inductor.is_generated(u.target) for u in node.users)
