# mypy: allow-untyped-defs
"""
Gradients of eval-mode batch norms from the weight gradient of the layer before them.

For ``c = layer(x, W, b)`` and a batch norm in eval mode, ``y = A * c + B`` with one
A and B per channel, autograd takes the gradient of the batch norm's weight from the
layer's output, which is saved for nothing else:

    dot_p = sum(g * (c - mean))
    dx, dW, db = layer_backward(A * g, x, W)

The layer is linear in its weight, so that the weight gradient for ``g`` holds the same
sum. This pass puts, in the joint graph,

    dx, dWg = layer_backward(g, x, A * W)    dW = A * dWg    db = A * sum(g)
    dot_p = <dWg, W> + (b - mean) * sum(g)

with ``<,>`` per output channel, and the partitioner has no reason to save ``c``. The
rest of the batch norm's backward stays, and so does all of the forward.

Source: "Efficient ConvBN Blocks for Transfer Learning and Beyond",
https://arxiv.org/abs/2305.11624

Layers are convolutions of any rank (transposed, grouped) and matrix products with a
parameter. Anything that does not have exactly the form above is left as it is, and the
reason is logged (``TORCH_LOGS="+torch._inductor.fx_passes.efficient_conv_bn_eval"``).
float16 is: ``dWg`` is ``dW / A``, and may leave its range where ``dW`` does not.

NOTE [Why this is no register_graph_pattern handler]: which nodes depend on a tangent,
and which inputs are written to, has to be known of the whole graph. It is found once
for all matches, and a match that is declined is not counted.
"""

import dataclasses
import logging
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch._functorch._aot_autograd.descriptors import InputMutationAOTOutput
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._ordered_set import OrderedSet

from ..pattern_matcher import CallFunction, KeywordArg, stable_topological_sort


log = logging.getLogger(__name__)
aten = torch.ops.aten
Node = torch.fx.Node

# As native_batch_norm_backward is decomposed.
_DOT_P = CallFunction(
    aten.sum.dim_IntList,
    CallFunction(
        aten.mul.Tensor,
        KeywordArg("grad"),
        CallFunction(aten.sub.Tensor, KeywordArg("value"), KeywordArg("mean")),
    ),
    KeywordArg("dims"),
)
_CAST = torch.ops.prims.convert_element_type.default
_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
_MOVES = (*_VIEWS, aten.permute.default)
# What a layer that computes in one dtype may be used with.
_DTYPES = {
    torch.bfloat16: (torch.bfloat16, torch.float32),
    torch.float32: (torch.float32,),
    torch.float64: (torch.float64,),
}


class CantFuse(RuntimeError):
    pass


@dataclasses.dataclass
class Fusion:
    """
    dot_p: the sum that is replaced, over ``grad * (value - mean)``.
    layer: the call that gives the output, of which ``value`` is views and casts.
    scale: A, as it is multiplied with ``grad``.
    moves: the views by which ``scale * grad`` becomes ``layer_grad``.
    backward: convolution_backward, or the mm that gives the weight gradient.
    """

    dot_p: Node
    grad: Node
    mean: Node
    layer: Node
    scale: Node
    moves: list[Node]
    layer_grad: Node
    backward: Node

    @property
    def is_conv(self) -> bool:
        return self.layer.target is aten.convolution.default


def efficient_conv_bn_eval_pass(graph: torch.fx.Graph) -> int:
    """Rewrite the joint graph; the number of batch norms that were fused."""
    inputs = graph.find_nodes(op="placeholder")
    backward = _depending_on(n for n in inputs if "tangents" in str(n.target))
    if not backward:
        return 0
    written = _written_inputs(graph)
    count = 0
    for node in graph.find_nodes(op="call_function", target=aten.sum.dim_IntList):
        origin = str(node.meta.get("original_aten", ""))
        match = _DOT_P.match(node)
        if not match or "batch_norm_backward" not in origin:
            continue
        try:
            fusion = _find(node, **match.kwargs, backward=backward, written=written)
        except CantFuse as reason:
            log.debug("%s is left as it is: %s", node, reason)
            continue
        _rewrite(graph, fusion)
        count += 1
    if count:
        counters["inductor"]["efficient_conv_bn_eval"] += count
        stable_topological_sort(graph)
    return count


def _find(dot_p, grad, value, mean, dims, backward, written) -> Fusion:
    rank = grad.meta["val"].ndim
    source, forward_moves = _source(value)
    weight, bias = _weight_and_bias(source)
    channels = _output_channels(source)
    if grad not in backward or source in backward:
        raise CantFuse("not a sum of a gradient and a value of the forward")
    if sorted(d % rank for d in dims) != [d for d in range(rank) if d != 1]:
        raise CantFuse("not one sum per channel")
    for backward_call, layer_grad in _weight_gradients(source):
        scaled, backward_moves = _source(layer_grad)
        if scaled.target is aten.mul.Tensor and scaled.args[0] is grad:
            break
    else:
        raise CantFuse("the layer's gradient is not a multiple of the batch norm's")
    scale = scaled.args[1]
    for vector in (scale, mean):
        shape = vector.meta["val"].shape if isinstance(vector, Node) else ()
        if vector in backward or len(shape) != rank or shape.numel() != channels:
            raise CantFuse(f"{vector} is not one number per channel")
        if shape[1] != channels:
            raise CantFuse(f"{vector} is not one number per channel")
    if not _undo_each_other([*forward_moves, *backward_moves]):
        raise CantFuse("the gradient is not laid out as the layer's output")
    if _follow_channels(forward_moves) != 1:
        raise CantFuse("the channels are not the layer's")
    used = (*source.all_input_nodes, value, grad, layer_grad, scale, mean, dot_p)
    for node in used:
        dtype = node.meta["val"].dtype
        if dtype not in _DTYPES.get(source.meta["val"].dtype, ()):
            raise CantFuse(f"{source.meta['val'].dtype} used with {node} in {dtype}")
    for node in filter(None, (weight, bias)):
        parameter, _ = _source(node)
        if parameter.op != "placeholder" or parameter in written:
            raise CantFuse(f"{node} is computed or written to")
    if user := _other_reader(source, dot_p.args[0], backward):
        raise CantFuse(f"{source} is saved for {user} anyway")
    moves = [n for n in backward_moves if n.target is not _CAST]
    return Fusion(dot_p, grad, mean, source, scale, moves, layer_grad, backward_call)


def _rewrite(graph: torch.fx.Graph, f: Fusion) -> None:
    layer_args, backward = f.layer.args, f.backward
    weight, bias = _weight_and_bias(f.layer)
    wide = f.dot_p.meta["val"].dtype
    channels = _output_channels(f.layer)
    mode = f.layer.meta["val"].fake_mode

    def call(target, *args, **kwargs) -> Node:
        node = graph.call_function(target, args, kwargs)
        node.meta.update({k: v for k, v in backward.meta.items() if k != "val"})
        fakes = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with mode, torch.no_grad(), torch._C._DisableAutocast():
            node.meta["val"] = target(*fakes[0], **fakes[1])
        return node

    def cast(node: Node, dtype: torch.dtype) -> Node:
        return node if node.meta["val"].dtype == dtype else call(_CAST, node, dtype)

    replaced = []

    def replace(old: Node, new: Node) -> None:
        old.replace_all_uses_with(cast(new, old.meta["val"].dtype))
        replaced.append(old)

    with graph.inserting_before(backward):
        scale = cast(call(aten.reshape.default, f.scale, [channels]), wide)
        mean = cast(call(aten.reshape.default, f.mean, [channels]), wide)
        dims = [d for d in range(f.grad.meta["val"].ndim) if d != 1]
        sum_grad = call(aten.sum.dim_IntList, cast(f.grad, wide), dims)

        # g as the layer takes it. What was widened is taken as it was before.
        grad, dtype = f.grad, f.layer_grad.meta["val"].dtype
        if grad.target is _CAST and grad.args[0].meta["val"].dtype == dtype:
            grad = grad.args[0]
        grad = cast(grad, dtype)
        for move in f.moves:
            target = aten.reshape.default if move.target in _VIEWS else move.target
            grad = call(target, grad, *move.args[1:])

        if f.is_conv:
            transposed, groups = layer_args[6], layer_args[8]
        else:
            weight = call(aten.permute.default, weight, [1, 0])
            transposed, groups = False, 1
        rows, columns, *kernel = weight.meta["val"].shape

        def times_scale(tensor: Node) -> Node:
            """scale * tensor along the output channels of what is shaped as the weight."""
            ones = [1] * len(kernel)
            if not transposed:
                factor = call(aten.reshape.default, scale, [channels, 1, *ones])
            else:
                sizes = [groups, rows // groups, columns]
                factor = call(aten.reshape.default, scale, [groups, 1, columns])
                factor = call(aten.expand.default, factor, sizes)
                factor = call(aten.reshape.default, factor, [rows, columns, *ones])
            product = call(aten.mul.Tensor, cast(tensor, wide), factor)
            return cast(product, tensor.meta["val"].dtype)

        if f.is_conv:
            needs_input, _, needs_bias = backward.args[10]
            scaled = times_scale(weight) if needs_input else weight
            new = call(
                aten.convolution_backward.default,
                *(grad, layer_args[0], scaled, None, *layer_args[3:9]),
                [needs_input, True, False],
            )
            weight_grad = call(operator.getitem, new, 1)
            results = {user.args[1]: user for user in backward.users}
            if needs_input and 0 in results:
                replace(results[0], call(operator.getitem, new, 0))
            if needs_bias and 2 in results:
                replace(results[2], call(aten.mul.Tensor, sum_grad, scale))
            replace(results[1], times_scale(weight_grad))
        else:
            transposed_grad = call(aten.permute.default, grad, [1, 0])
            weight_grad = call(aten.mm.default, transposed_grad, backward.args[1])
            for user in list(f.layer_grad.users):
                if user.target is aten.mm.default and user.args[0] is f.layer_grad:
                    scaled = times_scale(user.args[1])
                    replace(user, call(aten.mm.default, grad, scaled))
            replace(backward, times_scale(weight_grad))

        inner = call(aten.mul.Tensor, cast(weight_grad, wide), cast(weight, wide))
        if transposed:
            sizes = [groups, rows // groups, columns, *kernel]
            inner = call(aten.reshape.default, inner, sizes)
            inner = call(aten.sum.dim_IntList, inner, [1, *range(3, len(sizes))])
            inner = call(aten.reshape.default, inner, [channels])
        else:
            rest = list(range(1, 2 + len(kernel)))
            inner = call(aten.sum.dim_IntList, inner, rest)
        shift = call(aten.neg.default, mean)
        if bias is not None:
            shift = call(aten.sub.Tensor, cast(bias, wide), mean)
        shift = call(aten.mul.Tensor, sum_grad, shift)
        replace(f.dot_p, call(aten.add.Tensor, inner, shift))

    for node in replaced:
        _erase_unused(node)


def _source(node: Node) -> tuple[Node, list[Node]]:
    """What ``node`` is made of by casts and moves, and these."""
    moves = []
    while node.target is _CAST or node.target in _MOVES:
        moves.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return node, moves[::-1]


def _weight_and_bias(layer: Node) -> tuple[Node, Node | None]:
    if layer.target is aten.convolution.default:
        x, weight, bias = layer.args[:3]
        if x.meta["val"].ndim == weight.meta["val"].ndim:
            return weight, bias
    elif layer.target is aten.mm.default:
        return layer.args[1], None
    elif layer.target is aten.addmm.default and not layer.kwargs:
        bias, _, weight = layer.args
        if bias.meta["val"].shape == layer.meta["val"].shape[1:]:
            return weight, bias
    raise CantFuse(f"{layer} is no convolution or linear layer")


def _output_channels(layer: Node) -> int:
    return layer.meta["val"].shape[1]


def _weight_gradients(layer: Node) -> Iterator[tuple[Node, Node]]:
    """Calls that compute the gradient of the layer's weight, and what they do it from."""
    if layer.target is aten.convolution.default:
        x, weight, _, *options = layer.args
        for user in x.users:
            if user.target is aten.convolution_backward.default:
                same = user.args[1:3] == (x, weight) and list(user.args[4:10]) == options
                if same and any(getitem.args[1] == 1 for getitem in user.users):
                    yield user, user.args[0]
        return
    for user in layer.args[-2].users:
        if user.target is aten.mm.default and user.args[1] is layer.args[-2]:
            transposed = user.args[0]
            if transposed.target is aten.permute.default and transposed.args[1] == [1, 0]:
                yield user, transposed.args[0]


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(statically_known_true(x == y) for x, y in zip(a, b))


def _undo_each_other(moves: list[Node]) -> bool:
    """Whether all moves, one after the other, leave every element where it was."""
    left: list[Any] = []  # permutations, and pairs of shapes
    for node in moves:
        before, after = (n.meta["val"].shape for n in (node.args[0], node))
        if node.target is aten.permute.default:
            dims = [d % len(before) for d in node.args[1]]
            if left and isinstance(left[-1], list):
                first = left.pop()
                dims = [first[d] for d in dims]
            if dims != sorted(dims):
                left.append(dims)
        elif node.target in _VIEWS:
            if left and isinstance(left[-1], tuple):
                before = left.pop()[0]
            if not _same(before, after):
                left.append((before, after))
    return not left


def _follow_channels(moves: list[Node]) -> int | None:
    """Where dimension 1 is after the moves; None if a view splits or joins it."""
    dim = 1
    for node in moves:
        before, after = (n.meta["val"].shape for n in (node.args[0], node))
        if node.target is aten.permute.default:
            dim = [d % len(before) for d in node.args[1]].index(dim)
        elif node.target in _VIEWS and not _same(before[: dim + 1], after[: dim + 1]):
            if not _same(before[dim:], after[dim - len(before) :]):
                return None
            dim += len(after) - len(before)
    return dim


def _other_reader(layer: Node, product: Node, backward: OrderedSet[Node]) -> Node | None:
    """
    What has the layer's output saved though ``product`` is not computed: the graph's
    output, or a call of the backward that takes it, or what is recomputed from it.
    """
    size = layer.meta["val"].numel()
    pending, seen = [layer], OrderedSet([layer])
    while pending:
        for user in pending.pop().users:
            if user.op == "output" or (user in backward and user is not product):
                return user
            value = user.meta.get("val")
            if user in seen or user in backward or not isinstance(value, torch.Tensor):
                continue
            seen.add(user)
            if not _is_recomputed(user) or not value.dtype.is_floating_point:
                continue
            # The partitioner rather recomputes from another large input.
            others = (n for n in user.all_input_nodes if n not in seen)
            if any(n.meta["val"].numel() >= size for n in others):
                continue
            # Nor is it recomputed if it is saved itself.
            if not any(
                u.op == "output" or (u in backward and not _is_recomputed(u))
                for u in user.users
            ):
                pending.append(user)
    return None


def _is_recomputed(node: Node) -> bool:
    if node.target is _CAST or node.target in _MOVES:
        return True
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags


def _depending_on(nodes: Iterable[Node]) -> OrderedSet[Node]:
    found = OrderedSet(nodes)
    pending = list(found)
    while pending:
        new = [u for u in pending.pop().users if u not in found]
        found.update(new)
        pending += new
    return found


def _written_inputs(graph: torch.fx.Graph) -> OrderedSet[Node]:
    """Inputs that are written to in the graph, or after it by AOTAutograd."""
    inputs = graph.find_nodes(op="placeholder")
    (output,) = graph.find_nodes(op="output")
    written = [
        d.mutated_input
        for d in output.meta.get("desc") or ()
        if isinstance(d, InputMutationAOTOutput)
    ]
    found = OrderedSet(n for n in inputs if n.meta.get("desc") in written)
    for node in graph.find_nodes(op="call_function", target=aten.copy_.default):
        found.add(node.args[0])
    return found


def _erase_unused(node: Node) -> None:
    if node.op == "call_function" and not node.users and not node._erased:
        inputs = node.all_input_nodes
        node.graph.erase_node(node)
        for each in inputs:
            _erase_unused(each)
