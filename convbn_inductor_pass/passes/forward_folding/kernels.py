"""The ways to compute a layer and what follows it, and which of them can take a given layer.

To add one: its name and its condition here, what it emits in ``forward_rewrite``, and the
calls to time in ``ways``.
"""

from __future__ import annotations

import torch
from GONE.branches import Branches
from GONE.kept import is_parameter, made_of_parameters
from torch import fx

from ..._torch import compat, inductor
from ...graph import layers
from ...graph.affine import AffineChain
from ...graph.layers import CHANNELS_LAST, Layer, tensor_of
from .epilogue import Activation, Residual

__all__ = [
    "ADDING",
    "ATEN",
    "CUDNN",
    "LINEAR",
    "ONEDNN",
    "PACKED",
    "UNFOLDED_LINEAR",
    "can_merge",
    "folding_kernels",
    "takes_activation",
]

aten = torch.ops.aten

ATEN = "aten"
"""The layer's own operator with a scaled weight and shifted bias; no activation inside."""
ONEDNN = "onednn"
"""oneDNN's convolution, the activation inside; a residual is added by Inductor's patterns."""
PACKED = "onednn, packed"
"""The same with a weight that is kept in oneDNN's layout, see :mod:`kept`."""
CUDNN = "cudnn"
"""cuDNN's convolution, with the ReLU and a residual before it inside."""
LINEAR = "linear"
"""oneDNN's linear layer, also for convolutions with a kernel of one; the activation inside."""
UNFOLDED_LINEAR = "unfolded linear"
"""The same with the weight as it is; what follows is left to generated code."""

ADDING = (ONEDNN, PACKED, CUDNN)
"""Those that add a residual, the first two where Inductor's own patterns see to it."""


def folding_kernels(
    chain: AffineChain,
    activation: Activation | None,
    residual: Residual | None,
    *,
    may_pack: bool,
    is_channels_last: bool,
) -> tuple[str, ...]:
    """Kernels that can compute the folded layer; the first one is the default.

    ``may_pack`` says whether weights may be kept between calls, ``is_channels_last`` whether
    Inductor makes what goes through a convolution channels-last.
    """
    layer, kernels = chain.layer, []
    takes_post_ops = _takes_post_ops(layer) and (
        activation is not None or not _may_raise(layer, chain.last)
    )
    if takes_post_ops and _is_channels_last(layer):
        kernels.append(ONEDNN)
    kernels.append(ATEN)
    if takes_post_ops and may_pack and _may_stay_packed(chain):
        kernels.append(PACKED)
    if _takes_linear(layer):
        kernels.append(LINEAR)
    ends_in_relu = (
        residual.relu if residual else activation is not None and activation.name == "relu"
    )
    if is_channels_last and ends_in_relu and _takes_cudnn(layer):
        kernels.append(CUDNN)
    return tuple(kernels)


def can_merge(branches: Branches, activation: Activation | None) -> bool:
    """Whether oneDNN's convolution can take the place of branches, with a weight that is kept."""
    wide = branches.wide
    adds_safely = wide.out.dtype != torch.bfloat16 or not branches.others
    return (
        _takes_post_ops(wide)
        and (activation is not None or (adds_safely and not _may_raise(wide, branches.last)))
        and all(map(_may_stay_packed, branches.chains))
    )


def takes_activation(layer: Layer) -> bool:
    """Whether some kernel can compute an activation after this layer."""
    return _takes_post_ops(layer) or _takes_linear(layer) or _takes_cudnn(layer)


def _takes_post_ops(layer: Layer) -> bool:
    """Whether oneDNN's convolution with post-ops can compute this layer."""
    return (
        layer.is_conv
        and not layer.layout.transposed
        and layer.out.ndim in (4, 5)
        and layer.out.dtype in (torch.float32, torch.bfloat16)
        and layer.out.device.type == "cpu"
        and inductor.has_onednn_epilogues(layer.out.dtype)
    )


def _takes_cudnn(layer: Layer) -> bool:
    """Whether cuDNN may have a convolution with an epilogue for this layer; a trial tells."""
    sizes = (*layer.out.shape, *_sizes(layer.input), *_sizes(layer.weight))
    return (
        layer.is_conv
        and not layer.layout.transposed
        and layer.out.ndim == 4  # of others, Inductor makes nothing channels-last on GPUs
        and layer.out.dtype in (torch.float32, torch.bfloat16)
        # What is right for one size may not be there. Nothing to compute, nothing to gain.
        and all(isinstance(size, int) and size > 0 for size in sizes)
        and inductor.has_cudnn_epilogues(layer.out.device)
        and inductor.for_python()
    )


def _sizes(node: fx.Node) -> tuple[int | torch.SymInt, ...]:
    tensor = tensor_of(node)
    return () if tensor is None else tuple(tensor.shape)


def _is_channels_last(layer: Layer) -> bool:
    """Whether oneDNN's convolution sees that its input is channels-last, as Inductor made it.

    One channel, or maps of one number, are contiguous as well, and oneDNN's result then is, which
    Inductor does not expect. A packed weight tells.
    """
    x = tensor_of(layer.input)
    surely = compat.surely  # and no guard on sizes that are not known
    return x is not None and surely(x.shape[1] != 1) and any(surely(n != 1) for n in x.shape[2:])


def _may_raise(layer: Layer, last: fx.Node) -> bool:
    """Whether Inductor might let oneDNN's convolution add what comes after ``last``, and raise.

    Where oneDNN does not both add and rectify (a grouped convolution; an input that counts as
    contiguous, as 1x1 maps do), PyTorch does it with a kernel that has no bfloat16 and raises
    (2.11 to 2.15).
    """
    is_narrow = layer.out.dtype == torch.bfloat16
    return is_narrow and any(u.target is aten.add.Tensor for u in last.users)


def _may_stay_packed(chain: AffineChain) -> bool:
    """Whether the scaled weight is the same in many calls, as far as the graph tells.

    It is made of parameters alone. The layout that oneDNN wants depends on the input's size, which
    has to be known; another one makes it slow, up to forty times.
    """
    layer = chain.layer
    weight = layers.without_casts(layer.weight)
    x, live = tensor_of(layer.input), tensor_of(weight)
    if x is None or live is None or not inductor.for_python():
        return False
    return (
        all(isinstance(size, int) for size in x.shape)
        and is_parameter(weight)
        and _is_dense(live)
        and all(made_of_parameters(n, layer.channels) for n in chain.scaling_operands)
    )


def _is_dense(weight: torch.Tensor) -> bool:
    """Whether a convolution's weight lies in memory without gaps and repeats, in a usual order."""
    channels_last = CHANNELS_LAST[weight.ndim]
    return weight.is_contiguous() or weight.is_contiguous(memory_format=channels_last)


def _takes_linear(layer: Layer) -> bool:
    """Whether the layer is a matrix product that oneDNN's linear layer can compute."""
    weight = tensor_of(layer.weight)
    on_cpu = layer.out.device.type == "cpu" and layer.out.dtype in (torch.float32, torch.bfloat16)
    if weight is None or not on_cpu or not inductor.has_onednn_epilogues(layer.out.dtype):
        return False
    if not inductor.for_python():
        return False
    if not layer.is_conv:
        return True
    padding = layer.node.args[4]
    return (
        not layer.layout.transposed
        and layer.layout.groups == 1
        and all(isinstance(size, int) for size in (*layer.out.shape[1:], *weight.shape))
        and all(size == 1 for size in weight.shape[2:])
        and all(p == 0 for p in padding)  # type: ignore[union-attr]
    )
