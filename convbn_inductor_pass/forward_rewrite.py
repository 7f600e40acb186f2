"""Put a layer with a scaled weight in the place of a layer and what follows it.

A rewrite cannot refuse: everything that could speak against it has been decided before, in
``forward``.
"""

from __future__ import annotations

import torch
from torch import fx

from . import _compat, affine, aten_ir
from .affine import AffineChain
from .aten_ir import Layer, tensor_of
from .build import Builder
from .epilogue import Activation
from .fold import views_onto_output_axis

__all__ = ["fold_forward", "views_of"]

aten = torch.ops.aten


def fold_forward(
    chain: AffineChain, activation: Activation | None, use_onednn: bool, build: Builder
) -> None:
    """Put one layer call in the place of a layer, its affine chain and the activation after it.

    Calls are added where ``build`` adds them, which has to be before the chain's last node.
    ``activation`` needs ``use_onednn``.
    """
    layer = chain.layer
    weight, bias = layer.weight, layer.bias
    if chain.steps:
        scale, bias = affine.emit_scale_and_shift(chain, build)
        if scale is not None:
            weight = _scaled_weight(layer, scale, build)
        if bias is not None:
            bias = build.cast(bias, layer.out.dtype)
    if use_onednn:
        new = _onednn_call(layer, activation, weight, bias, build)
    else:
        new = _plain_call(layer, weight, bias, build)
    new.meta = {**layer.node.meta, "val": new.meta["val"]}
    for step in chain.steps:
        if step.kind == "move":
            new = build.call(step.node.target, new, *step.node.args[1:], **step.node.kwargs)
    replaced = chain.last if activation is None else activation.last
    result = tensor_of(replaced)
    if result is not None:
        new = build.cast(new, result.dtype)
    if new is not replaced:
        new.meta = {**replaced.meta, "val": new.meta["val"]}
    build.replace(replaced, new)
    _erase_unused(replaced)


def _scaled_weight(layer: Layer, scale: fx.Node, build: Builder) -> fx.Node:
    """``s * W``: scaled in the wide dtype, rounded once, in the weight's memory format."""
    narrow, wide = tensor_of(layer.weight), tensor_of(scale)
    if narrow is None or wide is None:
        raise AssertionError(f"{layer.node} has no metadata")
    for view, sizes in views_onto_output_axis(narrow.shape, layer.layout):
        scale = build.call(getattr(aten, view).default, scale, sizes)
    weight = build.cast(aten_ir.without_casts(layer.weight), wide.dtype)
    return build.cast(build.call(aten.mul.Tensor, weight, scale), narrow.dtype)


def _onednn_call(
    layer: Layer,
    activation: Activation | None,
    weight: fx.Node,
    bias: fx.Node | None,
    build: Builder,
) -> fx.Node:
    post_op: tuple[object, ...] = ("none", [], "")
    if activation is not None:
        post_op = (activation.name, list(activation.scalars), activation.algorithm)
    stride, padding, dilation = layer.node.args[3:6]
    # The addition of a residual is left to Inductor, which knows whether it may be in place.
    return build.call(
        torch.ops.mkldnn._convolution_pointwise.default,
        *(_input(layer, build), _dense(weight, build), bias and _dense(bias, build)),
        *(padding, stride, dilation, layer.layout.groups, *post_op),
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
        needed = any(_compat.is_mutable(u.target) for u in node.users)
    else:
        needed = any(u.op == "output" for n in (node, *views_of(node)) for u in n.users)
    tensor = tensor_of(node)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    memory_format = None if tensor is None else formats.get(tensor.ndim)
    if not needed or tensor is None or memory_format is None:
        return node
    if tensor.is_contiguous(memory_format=memory_format):
        return node
    return build.call(aten.clone.default, node, memory_format=memory_format)


def _dense(node: fx.Node, build: Builder) -> fx.Node:
    """``node`` in memory without gaps or repeats: oneDNN reads past the strides of others."""
    tensor = tensor_of(node)
    if (
        tensor is None
        or tensor.is_contiguous()
        or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
    ):
        return node
    return build.call(aten.clone.default, node, memory_format=torch.contiguous_format)


def _erase_unused(node: fx.Node) -> None:
    """Erase ``node`` and what only it used; placeholders stay."""
    pending = [node]
    while pending:
        node = pending.pop()
        if (
            node._erased
            or node.users
            or node.op == "placeholder"
            or _compat.is_mutable(node.target)
        ):
            continue
        pending += node.all_input_nodes
        node.graph.erase_node(node)


def views_of(node: fx.Node) -> list[fx.Node]:
    """All views of ``node``, and views of those."""
    found = [u for u in node.users if _compat.is_view(u.target)]
    for view in found:
        found += [u for u in view.users if _compat.is_view(u.target) and u not in found]
    return found
