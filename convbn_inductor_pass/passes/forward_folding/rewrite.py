"""Put one layer call in the place of a layer, its affine chain and its epilogue.

Cannot refuse: everything that could speak against it was checked by :mod:`decide`.
"""

from collections.abc import Sequence

import torch
from torch import fx

from ..._torch import compat, inductor
from ...graph import layers
from ...graph.affine import AffineChain, Emitter
from ...graph.builder import Builder
from ...graph.layers import Layer, value_of
from ...graph.operators import convolution_relu
from ...graph.strides import keep_observed, laid_out
from ...graph.uses import reachable
from .find import FoldCandidate

aten = torch.ops.aten

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def rewrite(graph: fx.Graph, candidates: Sequence[FoldCandidate]) -> None:
    """Fold each of ``candidates``, in place; a head that is applied twice is scaled once."""
    writes = any(compat.is_mutable(n.target) for n in graph.nodes)
    names = _names(graph)
    made: dict[str, tuple[fx.Node, fx.Node | None]] = {}
    with inductor.update_metadata(graph), Builder(graph) as build:
        keep_observed(graph, [c.end for c in candidates], build)
        for candidate in sorted(candidates, key=lambda c: c.end):
            with graph.inserting_before(candidate.end):
                key = _key(candidate.chain, names)
                if writes or key not in made:
                    made[key] = _parameters(candidate.chain, build)
                _fold(candidate, *made[key], build)


def _names(graph: fx.Graph) -> dict[fx.Node, str]:
    """The name of each node, or of the first that is computed in the same way."""
    names: dict[fx.Node, str] = {}
    first: dict[str, str] = {}
    for node in graph.nodes:
        names[node] = node.name
        if compat.is_pure(node.target):
            call = f"{node.target} {fx.map_arg((node.args, node.kwargs), names.get)}"
            names[node] = first.setdefault(call, node.name)
    return names


def _key(chain: AffineChain, names: dict[fx.Node, str]) -> str:
    """Equal for chains whose weight and bias are folded in the same way."""
    layer = chain.layer
    read = [(s.kind, s.operand, s.factor) for s in chain.steps if s.operand is not None]
    return str(fx.map_arg((layer.weight, layer.bias, layer.layout, read), names.get))


def _parameters(chain: AffineChain, build: Builder) -> tuple[fx.Node, fx.Node | None]:
    """The folded layer's weight and bias."""
    layer, emit = chain.layer, Emitter(build, chain.layer)
    weight, dtype = layer.weight, value_of(layer.weight).dtype
    if not chain.steps:
        return weight, layer.bias
    scale, bias = emit.scale(chain.steps), emit.shift(chain.steps, narrowed=False)
    if scale is not None:
        weight = layers.without_casts(weight)
        if layer.is_conv and weight is layer.weight and layer.out.device.type == "cpu":
            # Inductor vectorizes a change of memory format, but not together with the scaling.
            weight = _channels_last(weight, build)
        weight = emit.scaled(weight, scale, layer.layout, dtype)
    return weight, bias and build.cast(bias, layer.out.dtype)


def _fold(c: FoldCandidate, weight: fx.Node, bias: fx.Node | None, build: Builder) -> None:
    """Replace one candidate; the builder's insertion point is before the node that is replaced."""
    layer, replaced = c.layer, c.end
    new = _call(c, weight, bias, build)
    new.meta = {**layer.node.meta, "val": new.meta["val"]}
    for step in c.chain.steps:
        if step.kind == "move":
            new = build.call(step.node.target, new, *step.node.args[1:], **step.node.kwargs)
    out = build.cast(new, value_of(replaced).dtype)
    for cast in filter(layers.is_cast, list(replaced.users) if out is not new else ()):
        # One cast of the layer's own result, as Inductor's patterns for oneDNN have it.
        build.replace(cast, build.cast(new, value_of(cast).dtype))
    out.meta = {**replaced.meta, "val": out.meta["val"]}
    build.replace(replaced, out)


def _call(c: FoldCandidate, weight: fx.Node, bias: fx.Node | None, build: Builder) -> fx.Node:
    """The candidate's kernel; oneDNN's gets its epilogue from Inductor."""
    layer, args = c.layer, c.layer.node.args
    if c.kernel == "aten" and layer.is_conv:
        return build.call(aten.convolution.default, layer.input, weight, bias, *args[3:])
    if c.kernel == "aten":
        if bias is None:
            return build.call(aten.mm.default, layer.input, weight)
        return build.call(aten.addmm.default, bias, layer.input, weight)
    stride, padding, dilation = args[3:6]
    if c.kernel == "cudnn":
        other = c.epilogue and c.epilogue.other
        return build.call(
            convolution_relu,
            *(_channels_last(build.current(layer.input), build), _channels_last(weight, build)),
            *(bias and build.dense(bias), other and _channels_last(other, build)),
            *(stride, padding, dilation, layer.layout.groups),
        )
    return build.call(
        torch.ops.mkldnn._convolution_pointwise.default,
        # oneDNN takes any weight that has no gaps or repeats, but reorders others slowly; of a bias
        # it ignores the strides.
        *(_input(layer, build), _channels_last(weight, build), bias and build.dense(bias)),
        *(padding, stride, dilation, layer.layout.groups, "none", [], ""),
    )


def _input(layer: Layer, build: Builder) -> fx.Node:
    """The layer's input, as a copy if the graph returns it, or writes to it later.

    Inductor makes the input of oneDNN's convolution channels-last, also where that is an output
    with strides of its own, or an input of the graph: a later write then goes to the copy.
    """
    node = build.current(layer.input)
    if node.op == "placeholder":
        needed = any(compat.is_mutable(u.target) for u in node.users)
    else:
        views = reachable([node], lambda n: (u for u in n.users if compat.is_view(u.target)))
        needed = any(u.op == "output" for n in (layer.input, *views) for u in n.users)
    return build.dense(node, _CHANNELS_LAST[layer.out.ndim]) if needed else node


def _channels_last(node: fx.Node, build: Builder) -> fx.Node:
    """``node`` in channels-last, if there is such a format: its producer's choice or a copy."""
    tensor = value_of(build.current(node))
    memory_format = _CHANNELS_LAST.get(tensor.ndim)
    if memory_format is None or tensor.is_contiguous(memory_format=memory_format):
        return node
    like = torch.empty(tensor.shape, device="meta", memory_format=memory_format)
    return laid_out(node, like.stride(), build)
