"""Put a layer with a scaled weight in the place of a layer and what follows it.

A rewrite cannot refuse: everything that could speak against it has been decided before, in
``forward``.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from GONE.branches import Branches, emit_weight_and_bias
from torch import fx

from ..._torch import compat, inductor
from ...graph import affine, layers
from ...graph.affine import AffineChain
from ...graph.builder import Builder, erase_unused
from ...graph.layers import CHANNELS_LAST, Layer, tensor_of
from ...graph.strides import views_of
from . import kernels, operators
from .epilogue import Activation, Residual

__all__ = ["compute_as_linear", "fold_forward", "merge_branches"]

aten = torch.ops.aten


def fold_forward(
    chain: AffineChain,
    activation: Activation | None,
    residual: Residual | None,
    kernel: str,
    build: Builder,
) -> None:
    """Put one layer call in the place of a layer, its affine chain and what its kernel computes.

    Calls are added where ``build`` adds them, which has to be before the last node that is
    replaced. ``activation`` and ``residual`` need a kernel that computes them.
    """
    layer = chain.layer
    weight, bias, scale = layer.weight, layer.bias, None
    if chain.steps:
        scale, bias = affine.emit_scale_and_shift(chain, build)
        if bias is not None:
            bias = build.cast(bias, layer.out.dtype)
    packs = kernel == kernels.PACKED
    if scale is not None:
        weight = _scaled_weight(layer, scale, build, relaid=not packs)
    if packs:
        weight = _packed(layer, weight, build)
    if kernel in (kernels.ONEDNN, kernels.PACKED):
        new = _onednn_call(layer, activation, weight, bias, build)
    elif kernel == kernels.LINEAR:
        new = _linear_call(layer, activation, weight, bias, build)
    elif kernel == kernels.CUDNN:
        new = _cudnn_call(layer, residual, weight, bias, build)
    else:
        new = _plain_call(layer, weight, bias, build)
    new.meta = {**layer.node.meta, "val": new.meta["val"]}
    for step in chain.steps:
        if step.kind == "move":
            new = build.call(step.node.target, new, *step.node.args[1:], **step.node.kwargs)
    replaced = chain.last if activation is None else activation.last
    if kernel == kernels.CUDNN and residual is not None:
        replaced = residual.last
    result = tensor_of(replaced)
    if result is not None:
        new = build.cast(new, result.dtype)
    if new is not replaced:
        new.meta = {**replaced.meta, "val": new.meta["val"]}
    build.replace(replaced, new)
    erase_unused(replaced)


def merge_branches(branches: Branches, activation: Activation | None, build: Builder) -> None:
    """Put one convolution, with a weight that is kept, in the place of parallel branches.

    Calls are added where ``build`` adds them, which has to be before the sum of the branches.
    """
    layer = branches.wide
    weight, bias = emit_weight_and_bias(branches, build)
    new = _onednn_call(layer, activation, _packed(layer, weight, build), bias, build)
    new.meta = {**layer.node.meta, "val": new.meta["val"]}
    if branches.others:
        others = functools.reduce(functools.partial(build.call, aten.add.Tensor), branches.others)
        new = build.call(aten.add.Tensor, new, others)
    replaced = branches.last if activation is None else activation.last
    new.meta = {**replaced.meta, "val": new.meta["val"]}
    build.replace(replaced, new)
    erase_unused(replaced)


def compute_as_linear(layer: Layer, build: Builder) -> None:
    """Put a linear layer in the place of a layer, and leave what follows as it is."""
    new = _linear_call(layer, None, layer.weight, layer.bias, build)
    new.meta = {**layer.node.meta, "val": new.meta["val"]}
    build.replace(layer.node, new)
    erase_unused(layer.node)


def _scaled_weight(layer: Layer, scale: fx.Node, build: Builder, *, relaid: bool = True) -> fx.Node:
    """``s * W``: scaled in the wide dtype and rounded once.

    On CPU in the memory format that Inductor gives convolutions' weights; with ``relaid`` False in
    the weight's own.
    """
    narrow = tensor_of(layer.weight)
    if narrow is None:
        raise AssertionError(f"{layer.node} has no metadata")
    weight = layers.without_casts(layer.weight)
    if relaid and layer.is_conv and weight is layer.weight:
        # Inductor vectorises a change of memory format, but not together with the scaling.
        weight = _channels_last(weight, build)
    return build.cast(affine.emit_scaled_weight(layer, scale, build, weight), narrow.dtype)


def _packed(layer: Layer, weight: fx.Node, build: Builder) -> fx.Node:
    """A weight for ``layer`` in oneDNN's layout, in a form that :mod:`kept` knows."""
    stride, padding, dilation = layer.node.args[3:6]
    geometry = (padding, stride, dilation, layer.layout.groups, list(_shape(layer.input)))
    return build.call(operators.pack, weight, *geometry)


def _onednn_call(
    layer: Layer,
    activation: Activation | None,
    weight: fx.Node,
    bias: fx.Node | None,
    build: Builder,
) -> fx.Node:
    stride, padding, dilation = layer.node.args[3:6]
    # The addition of a residual is left to Inductor, which knows whether it may be in place.
    return build.call(
        torch.ops.mkldnn._convolution_pointwise.default,
        *(_input(layer, build), _channels_last(weight, build), bias and _dense(bias, build)),
        *(padding, stride, dilation, layer.layout.groups, *_post_op(activation)),
    )


def _post_op(activation: Activation | None) -> tuple[object, ...]:
    if activation is None:
        return "none", [], ""
    return activation.name, list(activation.scalars), activation.algorithm


def _linear_call(
    layer: Layer,
    activation: Activation | None,
    weight: fx.Node,
    bias: fx.Node | None,
    build: Builder,
) -> fx.Node:
    x, size = _input(layer, build), layer.out.shape
    if layer.is_conv:
        for dim, step in enumerate(layer.node.args[3], 2):  # type: ignore[arg-type]
            if step != 1:
                x = build.call(aten.slice.Tensor, x, dim, 0, sys.maxsize, step)
        rows = build.call(aten.permute.default, x, [0, *range(2, len(size)), 1])
        x = build.call(aten.reshape.default, rows, [-1, _shape(layer.input)[1]])
        weight = build.call(aten.reshape.default, weight, [size[1], -1])
    else:
        weight = build.call(aten.permute.default, weight, [1, 0])
        if bias is not None and _shape(bias) != (size[1],):  # addmm's may broadcast
            bias = build.call(aten.reshape.default, bias, [-1])
            bias = build.call(aten.expand.default, bias, [size[1]])
    bias = bias and _dense(bias, build)
    out = build.call(operators.linear_pointwise, x, weight, bias, *_post_op(activation))
    if not layer.is_conv:
        return out
    rows = build.call(aten.reshape.default, out, [-1, *size[2:], size[1]])
    return build.call(aten.permute.default, rows, [0, len(size) - 1, *range(1, len(size) - 1)])


def _shape(node: fx.Node) -> tuple[Any, ...]:
    tensor = tensor_of(node)
    if tensor is None:
        raise AssertionError(f"{node} has no metadata")
    return tuple(tensor.shape)


def _cudnn_call(
    layer: Layer,
    residual: Residual | None,
    weight: fx.Node,
    bias: fx.Node | None,
    build: Builder,
) -> fx.Node:
    stride, padding, dilation = layer.node.args[3:6]
    return build.call(
        operators.convolution_relu,
        *(_laid_out(build.current(layer.input), build), _laid_out(weight, build)),
        *(bias and _dense(bias, build), residual and _laid_out(residual.other, build)),
        *(stride, padding, dilation, layer.layout.groups),
    )


def _plain_call(layer: Layer, weight: fx.Node, bias: fx.Node | None, build: Builder) -> fx.Node:
    if layer.is_conv:
        args = (layer.input, weight, bias, *layer.node.args[3:])
        return build.call(aten.convolution.default, *args)
    if bias is None:
        return build.call(aten.mm.default, layer.input, weight)
    return build.call(aten.addmm.default, bias, layer.input, weight)


def _input(layer: Layer, build: Builder) -> fx.Node:
    """The layer's input, as a copy if the graph returns it, or writes to it later.

    Inductor makes what goes into oneDNN's convolution channels-last, also where that is an
    output with strides of its own, and where it is an input of the graph: a later write then
    goes to the copy. A plain convolution makes such a copy anyway.
    """
    node = build.current(layer.input)
    if node.op == "placeholder":
        needed = any(compat.is_mutable(u.target) for u in node.users)
    else:
        needed = any(u.op == "output" for n in (node, *views_of(node)) for u in n.users)
    tensor = tensor_of(node)
    memory_format = None if tensor is None else CHANNELS_LAST.get(tensor.ndim)
    if not needed or tensor is None or memory_format is None:
        return node
    if tensor.is_contiguous(memory_format=memory_format):
        return node
    return build.call(aten.clone.default, node, memory_format=memory_format)


def _channels_last(weight: fx.Node, build: Builder) -> fx.Node:
    """A weight in the memory format that Inductor gives convolutions' weights on CPU.

    oneDNN takes any that has no gaps or repeats, but brings others into its own format slowly.
    """
    tensor = tensor_of(weight)
    on_cpu = tensor is not None and tensor.device.type == "cpu"
    return _laid_out(weight, build) if on_cpu else weight


def _laid_out(node: fx.Node, build: Builder) -> fx.Node:
    """``node`` in a channels-last memory format, if there is one: its producer's choice or a copy.

    What the producer's metadata says is what was written, not what Inductor makes of it.
    """
    tensor = tensor_of(build.current(node))
    if tensor is None or tensor.ndim not in CHANNELS_LAST:
        return node
    memory_format = CHANNELS_LAST[tensor.ndim]
    if tensor.is_contiguous(memory_format=memory_format):
        return node
    strides = torch.empty(tensor.shape, device="meta", memory_format=memory_format).stride()
    return build.call(inductor.force_stride_order, node, list(strides))


def _dense(bias: fx.Node, build: Builder) -> fx.Node:
    """A bias in memory without gaps or repeats: oneDNN reads past the strides of others."""
    tensor = tensor_of(bias)
    if tensor is None or tensor.is_contiguous():
        return bias
    return build.call(aten.clone.default, bias, memory_format=torch.contiguous_format)
