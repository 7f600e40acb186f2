# mypy: allow-untyped-defs
"""
Gradients of eval-mode batch norms from the weight gradient of the layer before them.

For ``c = layer(x, W, b)`` and ``y = A * c + B``, with one A and one B per channel, the
gradient of the batch norm's weight has ``c`` saved for backward:

    dot_p = sum(g * (c - mean))
    dx, dW, db = layer_backward(A * g, x, W)

A layer is linear in its weight, so that the weight gradient for ``g`` holds the same
sum. This pass puts in the joint graph, with ``<,>`` per output channel,

    dx, dWg = layer_backward(g, x, A * W)    dW = A * dWg    db = A * sum(g)
    dot_p = <dWg, W> + (b - mean) * sum(g)

The forward stays as it is. From "Efficient ConvBN Blocks for Transfer Learning and
Beyond", https://arxiv.org/abs/2305.11624

Layers are convolutions (transposed and grouped ones, too) and linear layers. What is
not exactly of this form is left as it is; DEBUG logs say why. So is float16: ``dWg`` is
``dW / A``, and may leave its range where ``dW`` does not.

NOTE [efficient_conv_bn_eval is not a register_graph_pattern handler]: what depends on
a tangent and which inputs are written to are found once per graph, not once per match.
"""

import logging
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch._functorch._aot_autograd.descriptors import InputMutationAOTOutput
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq
from torch.utils._ordered_set import OrderedSet

from ..pattern_matcher import CallFunction, KeywordArg, stable_topological_sort


log = logging.getLogger(__name__)
aten = torch.ops.aten
Node = torch.fx.Node

# As native_batch_norm_backward is decomposed.
_CENTERED = CallFunction(aten.sub.Tensor, KeywordArg("value"), KeywordArg("mean"))
_PRODUCT = CallFunction(aten.mul.Tensor, KeywordArg("grad"), _CENTERED)
_DOT_P = CallFunction(aten.sum.dim_IntList, _PRODUCT, KeywordArg("dims"))
_CAST = torch.ops.prims.convert_element_type.default
_VIEWS = (_CAST, aten.view.default, aten._unsafe_view.default)


class CantFuse(RuntimeError): ...


def efficient_conv_bn_eval_pass(graph: torch.fx.Graph) -> int:
    """Rewrites the joint graph; returns the number of batch norms that were fused."""
    inputs = graph.find_nodes(op="placeholder")
    tangents = [n for n in inputs if str(n.target).startswith("tangents")]
    if not tangents:
        return 0
    backward, written = _depending_on(tangents), _written_inputs(graph)
    count = 0
    for node in graph.find_nodes(op="call_function", target=aten.sum.dim_IntList):
        match = _DOT_P.match(node)
        origin = str(node.meta.get("original_aten"))
        if not match or "batch_norm_backward" not in origin:
            continue
        try:
            found = _find(node, **match.kwargs, backward=backward, written=written)
        except CantFuse as reason:
            log.debug("%s is left as it is: %s", node, reason)
        else:
            _rewrite(node, *found, backward)
            count += 1
    if count:
        counters["inductor"]["efficient_conv_bn_eval"] += count
        stable_topological_sort(graph)
        graph.eliminate_dead_code()
    return count


def _find(dot_p, grad, value, mean, dims, backward, written) -> tuple[Any, ...]:
    """What _rewrite takes; ``layer_grad`` is ``scale * grad``."""
    layer = _source(value)
    _, weight, bias = _tensors_of(layer)
    if grad not in backward or layer in backward:
        raise CantFuse("not a gradient times a value of the forward")
    rank, channels = _val(grad).ndim, _val(layer).shape[1]
    per_channel = [channels if dim == 1 else 1 for dim in range(rank)]
    for call, layer_grad in _weight_gradients(layer):
        scaled = _source(layer_grad)
        if scaled.target is aten.mul.Tensor and scaled.args[0] is grad:
            scale = scaled.args[1]
            if _has_shape(scale, per_channel):
                break
    else:
        raise CantFuse("the layer's gradient is not a multiple of the batch norm's")
    if sorted(dims) != [dim for dim in range(rank) if dim != 1]:
        raise CantFuse("not one sum per channel")
    if not _has_shape(mean, per_channel):
        raise CantFuse(f"{mean} is not one number per channel")
    # A symbolic number in the layer's arguments or sizes would need a node of its own.
    numbers = [n for n in layer.all_input_nodes if not isinstance(_val(n), torch.Tensor)]
    if numbers or not all(isinstance(n, int) for n in _val(weight).shape):
        raise CantFuse(f"{layer} has symbolic arguments or weights")
    for each in (value, grad):
        if not statically_known_true(sym_eq(_val(each).shape, _val(layer).shape)):
            raise CantFuse("the layer's output is viewed in another shape")
    dtype = _val(layer).dtype
    allowed = (dtype, torch.promote_types(dtype, torch.float32))
    for each in (*layer.all_input_nodes, grad, value, layer_grad, scale, mean, dot_p):
        if dtype == torch.float16 or _val(each).dtype not in allowed:
            raise CantFuse(f"{dtype} is used with {each}: {_val(each).dtype}")
    for each in filter(None, (weight, bias)):
        parameter = _source(each, aten.permute.default)
        if parameter.op != "placeholder" or parameter in written:
            raise CantFuse(f"{each} is computed or written to")
    if reader := _other_reader(layer, dot_p.args[0], backward):
        raise CantFuse(f"{layer} is saved for {reader} anyway")
    return grad, mean, layer, scale, layer_grad, call


def _rewrite(dot_p, grad, mean, layer, scale, layer_grad, old, backward) -> None:
    x, weight, bias = _tensors_of(layer)
    wide, narrow = _val(dot_p).dtype, _val(layer_grad).dtype
    own = ("val", "tensor_meta", "from_node")
    meta = {k: v for k, v in old.meta.items() if k not in own}

    def call(target, *args, **kwargs) -> Node:
        node = layer.graph.call_function(target, args, kwargs)
        node.meta.update(meta)
        if not backward.isdisjoint(node.all_input_nodes):
            backward.add(node)
        fakes = torch.fx.map_arg((args, kwargs), _val)
        with _val(layer).fake_mode, torch.no_grad(), torch._C._DisableAutocast():
            node.meta["val"] = target(*fakes[0], **fakes[1])
        return node

    def cast(node: Node, dtype: torch.dtype) -> Node:
        return node if _val(node).dtype == dtype else call(_CAST, node, dtype)

    def view(node: Node, sizes) -> Node:
        same = list(_val(node).shape) == list(sizes)
        return node if same else call(aten.reshape.default, node, list(sizes))

    def mul(a: Node, b: Node) -> Node:
        return call(aten.mul.Tensor, a, b)

    def times_scale(like_weight: Node) -> Node:
        factor = view(scale, [s if d in channels else 1 for d, s in enumerate(split)])
        product = mul(view(cast(like_weight, wide), split), factor)
        return cast(view(product, _val(weight).shape), _val(like_weight).dtype)

    def replace(node: Node, new: Node) -> None:
        node.replace_all_uses_with(cast(new, _val(node).dtype))

    with layer.graph.inserting_before(old):
        scale, mean = (cast(view(v, [-1]), wide) for v in (scale, mean))
        dims = [dim for dim in range(_val(grad).ndim) if dim != 1]
        # Reuse the sum computed for the batch norm's bias: CSE skips graph outputs.
        sums = (u for u in grad.users if u.target is aten.sum.dim_IntList)
        same = [u for u in sums if u.args == (grad, dims) and _val(u).dtype == wide]
        sum_grad, *_ = same or [call(aten.sum.dim_IntList, cast(grad, wide), dims)]

        # As the layer takes it; what was widened for the batch norm, as it was before.
        if grad.target is _CAST and _val(grad.args[0]).dtype == narrow:
            grad = grad.args[0]
        grad = cast(grad, narrow)

        # The weight's shape, and which dimensions of it are the output channels.
        is_conv = layer.target is aten.convolution.default
        if not is_conv:
            weight = call(aten.permute.default, weight, [1, 0])
        split, channels = list(_val(weight).shape), [0]
        if is_conv and layer.args[6]:  # transposed: [C_in, C_out / groups, *kernel]
            groups = layer.args[8]
            split[:1] = groups, split[0] // groups
            channels = [0, 2]

        if is_conv:
            needs_input, _, _ = old.args[10]
            scaled = times_scale(weight) if needs_input else weight
            results = call(
                aten.convolution_backward.default,
                *(grad, x, scaled, None, *layer.args[3:]),
                [needs_input, True, False],
            )
            dwg = call(operator.getitem, results, 1)
            for user in list(old.users):
                if user.args[1] == 0:
                    replace(user, call(operator.getitem, results, 0))
                elif user.args[1] == 1:
                    replace(user, times_scale(dwg))
                else:
                    replace(user, mul(sum_grad, scale))
        else:
            dwg = call(aten.mm.default, call(aten.permute.default, grad, [1, 0]), x)
            for user in list(layer_grad.users):
                is_product = user.target is aten.mm.default and user.args[0] is layer_grad
                # The weight: [C_out, C_in]; or another layer's, if their sum is normalized.
                if is_product and _has_shape(user.args[1], split):
                    scaled = times_scale(user.args[1])
                    replace(user, call(aten.mm.default, grad, scaled))
            replace(old, times_scale(dwg))

        inner = mul(cast(dwg, wide), cast(weight, wide))
        rest = [dim for dim in range(len(split)) if dim not in channels]
        inner = view(call(aten.sum.dim_IntList, view(inner, split), rest), [-1])
        shift = call(aten.neg.default, mean)
        if bias is not None:
            shift = call(aten.add.Tensor, shift, cast(bias, wide))
        replace(dot_p, call(aten.add.Tensor, inner, mul(shift, sum_grad)))


def _val(node: Node) -> Any:
    return node.meta["val"]


def _has_shape(node: Any, shape: list[Any]) -> bool:
    if not isinstance(node, Node) or not isinstance(_val(node), torch.Tensor):
        return False
    return statically_known_true(sym_eq(list(_val(node).shape), shape))


def _source(node: Node, *targets) -> Node:
    """What ``node`` is a cast or view of; its elements are in the same order."""
    while node.target in (*_VIEWS, *targets):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _tensors_of(layer: Node) -> tuple[Any, Any, Any]:
    """The input, weight and bias of a convolution or linear layer."""
    if layer.target is aten.convolution.default:
        return layer.args[:3]
    if layer.target is aten.mm.default:
        return *layer.args, None
    if layer.target is aten.addmm.default and not layer.kwargs:
        bias, x, weight = layer.args
        if _val(bias).shape == _val(weight).shape[1:]:
            return x, weight, bias
    raise CantFuse(f"{layer} is no convolution or linear layer")


def _weight_gradients(layer: Node) -> Iterator[tuple[Node, Any]]:
    """Calls that compute the gradient of the layer's weight, and what they take."""
    x, *_ = _tensors_of(layer)
    for user in x.users:
        args = user.args
        if user.target is aten.convolution_backward.default:
            is_wanted = any(result.args[1] == 1 for result in user.users)
            same = (*args[1:3], *args[4:10]) == (*layer.args[:2], *layer.args[3:])
            if same and is_wanted:
                yield user, args[0]
        elif user.target is aten.mm.default and args[1] is x:
            transposed = args[0]
            if transposed.target is aten.permute.default:
                yield user, transposed.args[0]


def _other_reader(layer: Node, product: Node, backward: OrderedSet[Node]):
    """
    What has the layer's output saved when ``product`` is not computed: the graph's
    output, or a call of the backward that takes it or what is recomputed from it.
    """
    size = _val(layer).numel()
    pending, seen = [layer], OrderedSet([layer, product])
    while pending:
        for user in pending.pop().users:
            if user not in seen and (user.op == "output" or user in backward):
                return user
            # It is not recomputed if it is saved itself, or from other large inputs.
            values = [_val(n) for n in user.all_input_nodes if n not in seen]
            sizes = [v.numel() for v in values if isinstance(v, torch.Tensor)]
            is_recomputed = (
                _is_pointwise(user)
                and _val(user).dtype.is_floating_point
                and not any(statically_known_true(n >= size) for n in sizes)
                and all(u not in backward or _is_pointwise(u) for u in user.users)
                and all(u.op != "output" for u in user.users)
            )
            if is_recomputed and user not in seen:
                pending.append(user)
            seen.add(user)
    return None


def _is_pointwise(node: Node) -> bool:
    is_view = node.target in _VIEWS
    return is_view or torch.Tag.pointwise in getattr(node.target, "tags", ())


def _depending_on(nodes: Iterable[Node]) -> OrderedSet[Node]:
    found = OrderedSet(nodes)
    pending = list(found)
    while pending:
        new = [user for user in pending.pop().users if user not in found]
        found.update(new)
        pending += new
    return found


def _written_inputs(graph: torch.fx.Graph) -> OrderedSet[Any]:
    """Inputs that are written to, in the graph or after it by AOTAutograd."""
    descs = graph.output_node().meta.get("desc") or ()
    written = [d.mutated_input for d in descs if isinstance(d, InputMutationAOTOutput)]
    inputs = graph.find_nodes(op="placeholder")
    copies = graph.find_nodes(op="call_function", target=aten.copy_.default)
    found = [n for n in inputs if n.meta.get("desc") in written]
    return OrderedSet([*found, *(n.args[0] for n in copies)])
