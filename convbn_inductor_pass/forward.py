"""The kernel half: a layer and the affine map after it become one layer with a scaled weight.

    y = act(affine(conv(x, W, b)) [+ other])   =>   y = conv(x, s * W, shift) with act and + inside

The scaled weight is computed in each call from the live parameters, so that nothing goes
stale after an optimizer step, unlike with ``freezing=True``. On CPU the layer becomes oneDNN's
convolution with a fused epilogue; the addition of a residual is fused by Inductor's own
patterns for it. Runs on aten IR as a post-grad pass: find, decide, choose, rewrite.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator

import torch
from torch import fx

from . import _compat, affine, aten_ir, choice, epilogue
from .affine import AffineChain
from .aten_ir import Layer, tensor_of
from .build import Builder
from .codes import ForwardCode
from .config import Options
from .decide import module_path
from .epilogue import Activation, Residual
from .forward_rewrite import fold_forward, views_of

__all__ = ["ForwardDecision", "analyze", "apply"]

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class ForwardDecision:
    """What was decided about a layer and the affine map or activation after it.

    ``onednn`` says whether oneDNN's convolution with post-ops computes the folded layer.
    ``bytes_exact`` and ``bytes_folded`` are what each way reads and writes besides the layer's
    own input, weight and output: hints where sizes are symbolic.
    """

    chain: AffineChain
    code: ForwardCode
    onednn: bool
    activation: Activation | None = None
    residual: Residual | None = None
    detail: str = ""
    bytes_exact: int = 0
    bytes_folded: int = 0

    @property
    def epilogue(self) -> str:
        """What the layer's kernel computes besides, "" if nothing."""
        if self.residual is not None:
            return "add+relu" if self.residual.relu else "add"
        return "" if self.activation is None else self.activation.name


def analyze(graph: fx.Graph, options: Options) -> list[ForwardDecision]:
    """Decide about every layer of ``graph`` that something foldable follows; changes nothing."""
    if any(n.op == "placeholder" and n.name.startswith("tangents_") for n in graph.nodes):
        return []  # a backward graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    writes = [order[n] for n in graph.nodes if _compat.is_mutable(n.target)]
    chains = affine.find_chains(graph)
    decisions = [d for d in (_decide(c, order, writes, options) for c in chains) if d is not None]
    # In the order in which they are rewritten: scaled weights are shared forwards.
    return sorted(decisions, key=lambda d: order[d.chain.last])


def _decide(
    chain: AffineChain, order: dict[fx.Node, int], writes: list[int], options: Options
) -> ForwardDecision | None:
    layer = chain.layer
    chain, activation = _with_activation(chain)
    residual = epilogue.residual_after(chain.last) if activation is None else None
    result = tensor_of(chain.last)
    if result is None or (result.dtype, result.shape) != (layer.out.dtype, layer.out.shape):
        residual = None
    if not chain.steps and activation is None:
        return None  # nothing to gain
    onednn = _takes_post_ops(layer) and (activation is not None or not _may_raise(chain))
    if not onednn:
        residual = None
    sizes = choice.bytes_moved(chain, activation, residual)

    def decision(code: ForwardCode, detail: str = "") -> ForwardDecision:
        return ForwardDecision(chain, code, onednn, activation, residual, detail, *sizes)

    path = module_path(layer.node)
    if not options.permits(path):
        return decision(ForwardCode.DENIED, path)
    if layer.out.dtype not in _DTYPES or not _DTYPES[layer.out.dtype].issuperset(_dtypes(chain)):
        code = ForwardCode.UNSUPPORTED_DTYPE
        if layer.out.dtype == torch.float16:
            code = ForwardCode.FLOAT16_RANGE
        return decision(code, str(layer.out.dtype))
    if aten_ir.is_quantised(layer.weight):
        return decision(ForwardCode.QUANTISED, str(layer.weight))
    if not affine.numbers_fit(chain):
        return decision(ForwardCode.NUMBER_RANGE)
    first, last = order[layer.node], order[chain.last]
    if bisect.bisect_right(writes, first) != bisect.bisect_left(writes, last):
        return decision(ForwardCode.WRITE_BETWEEN, f"between {layer.node} and {chain.last}")
    if _compat.in_subgraph():
        return decision(ForwardCode.SUBGRAPH)
    end = chain.last if activation is None else activation.last
    if _view_is_returned(end):
        return decision(ForwardCode.VIEW_RETURNED, str(chain.last))
    ends = (end,) if residual is None else (end, residual.last)
    if any(_strides_are_used(node) for node in ends):
        return decision(ForwardCode.STRIDES_USED, str(end))
    if options.forward == "fold" or choice.is_faster(*sizes):
        return decision(ForwardCode.FOLDED)
    return decision(ForwardCode.SLOWER)


def _view_is_returned(node: fx.Node) -> bool:
    """Whether the graph returns a part of ``node``.

    Inductor restores the strides of an output that is dense. A slice gets those of the memory
    that it is cut from, and a library's kernel may choose others than a generated one.
    """
    whole = tensor_of(node)
    for view in views_of(node):
        part = tensor_of(view)
        is_part = part is None or whole is None or part.numel() != whole.numel()
        if is_part and any(u.op == "output" for u in view.users):
            return True
    return False


def _strides_are_used(node: fx.Node) -> bool:
    """Whether something may read the memory of ``node`` by its strides.

    A library's kernel may lay its result out in another way than the graph says. Inductor knows
    that for aten, but for ``as_strided`` and for what others have written.
    """
    users = {u for n in (node, *views_of(node)) for u in n.users if u.op == "call_function"}
    return any(_compat.reads_strides(u.target) for u in users)


# What a layer's dtype may meet in its chain.
_DTYPES = {
    torch.float32: {torch.float32},
    torch.bfloat16: {torch.bfloat16, torch.float32},
    torch.float64: {torch.float64},
}


def _dtypes(chain: AffineChain) -> Iterator[torch.dtype]:
    for node in (chain.layer.input, chain.layer.weight, *(s.node for s in chain.steps)):
        tensor = tensor_of(node)
        if tensor is not None:
            yield tensor.dtype


def _with_activation(chain: AffineChain) -> tuple[AffineChain, Activation | None]:
    """The chain up to where an activation begins, and the activation.

    Some begin with a step of an affine map themselves, as hardsigmoid does with ``x + 3``: the
    cut that leaves least behind is taken.
    """
    if not _takes_post_ops(chain.layer):
        return chain, None
    best: tuple[AffineChain, Activation | None] = chain, None
    for end in range(len(chain.steps), -1, -1):
        cut = dataclasses.replace(chain, steps=chain.steps[:end])
        found = None
        if _has_shape_of(cut, chain.layer.out):
            found = epilogue.activation_after(cut.last, chain.layer.out.dtype)
        if found is not None and (best[1] is None or best[1].last < found.last):
            best = cut, found
        if end and chain.steps[end - 1].reads_a_tensor:
            break
    return best


def _has_shape_of(chain: AffineChain, out: torch.Tensor) -> bool:
    """Whether the chain's result has its numbers where the layer's output has them."""
    result = tensor_of(chain.last)
    return result is not None and result.shape == out.shape


def _takes_post_ops(layer: Layer) -> bool:
    """Whether oneDNN's convolution with post-ops can compute this layer."""
    return (
        layer.is_conv
        and not layer.layout.transposed
        and layer.out.ndim in (4, 5)
        and layer.out.dtype in (torch.float32, torch.bfloat16)
        and layer.out.device.type == "cpu"
        and _compat.has_onednn_epilogues(layer.out.dtype)
    )


def _may_raise(chain: AffineChain) -> bool:
    """Whether Inductor might let oneDNN's convolution add what comes next, where that raises.

    Where oneDNN does not both add and rectify (a grouped convolution; an input that counts as
    contiguous, as 1x1 maps do), PyTorch does it with a kernel that has no bfloat16 and raises
    (2.11 to 2.15).
    """
    is_narrow = chain.layer.out.dtype == torch.bfloat16
    return is_narrow and any(u.target is aten.add.Tensor for u in chain.last.users)


def apply(decisions: list[ForwardDecision], graph: fx.Graph) -> int:
    """Rewrite the graph as decided; returns the number of layers folded.

    Weights scaled in the same way are scaled once: a head that is applied to several levels
    of a pyramid shares them.
    """
    folded = [d for d in decisions if d.code.folded]
    if not folded:
        return 0
    writes = any(_compat.is_mutable(n.target) for n in graph.nodes)
    build = Builder(graph, share=not writes)
    for decision in folded:
        with (
            graph.inserting_before(decision.chain.last),
            _compat.fake_mode_of(decision.chain.layer.out),
        ):
            fold_forward(decision.chain, decision.activation, decision.onednn, build)
    return len(folded)
