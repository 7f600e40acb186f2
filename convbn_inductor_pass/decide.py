"""Decide whether a candidate is fused: first whether it would be right, then whether it pays.

Two tables of rows. A row is a code and a function that returns a detail if the row applies
and None if not; the first row that applies decides. Rows are pure: deciding changes nothing.

To add a refusal: a member of :class:`~convbn_inductor_pass.codes.Code`, a row here, a test.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor, fx

from . import _compat
from .codes import Code
from .config import Options
from .effects import Effects
from .find import Candidate
from .origin import module_path
from .torch_ir import BatchNormCall, ConvCall, Unreadable, describe, tensor_of

__all__ = ["Decision", "decide"]


@dataclasses.dataclass(frozen=True)
class Decision:
    """What was decided about a candidate, and why in terms of this graph."""

    candidate: Candidate
    code: Code
    detail: str = ""

    @property
    def fused(self) -> bool:
        return self.code.fused

    @property
    def sound(self) -> bool:
        """Whether fusing would be right, be it done or not."""
        return self.fused or self.code in PROFIT_CODES

    @property
    def pair(self) -> tuple[ConvCall, BatchNormCall]:
        """The layer and the batch norm of a sound decision.

        Raises:
            ValueError: the candidate could not be read as a pair.
        """
        pair = self.candidate.pair
        if pair is None:
            raise ValueError(f"not a layer and a batch norm: {self}")
        return pair


@dataclasses.dataclass(frozen=True)
class _Pair:
    """A readable candidate and what the rows need to know."""

    candidate: Candidate
    layer: ConvCall
    bn: BatchNormCall
    effects: Effects
    options: Options

    def tensor(self, name: str) -> Tensor | None:
        owner, _, attribute = name.partition(".")
        return tensor_of(getattr(getattr(self, owner), attribute))

    @functools.cached_property
    def operands(self) -> dict[str, Tensor]:
        """All tensors of the pair by name; only those that exist, metadata checked before."""
        found = {name: self.tensor(name) for name in _OPERANDS}
        return {name: t for name, t in found.items() if t is not None}

    @property
    def out(self) -> Tensor:
        """The layer's output."""
        out = tensor_of(self.layer.node)
        if out is None:  # the row NO_METADATA comes first
            raise AssertionError(f"{self.layer.node} has no metadata")
        return out


_OPERANDS = (
    "layer.input",
    "layer.weight",
    "layer.bias",
    "layer.node",
    "bn.weight",
    "bn.bias",
    "bn.running_mean",
    "bn.running_var",
    "bn.output",
)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DEVICES = ("cpu", "cuda", "xpu", "mps", "meta")
# What backward reads and writes of a weight's size, in weights: reads W, writes W'; reads dW'
# and W, writes dW. It spares reading the layer's output once.
WEIGHT_PASSES = 5
# Methods that take the shape of their second argument.
_LIKE_METHODS = {"reshape_as", "view_as", "expand_as"}
# Calls that ask a tensor for its shape and no data.
_SHAPE_METHODS = {"size", "dim", "ndimension", "numel", "nelement", "element_size", "stride"}


def _batch_statistics(p: _Pair) -> str | None:
    return f"{p.bn.node} has training=True" if p.bn.training else None


def _no_running_statistics(p: _Pair) -> str | None:
    missing = p.bn.running_mean is None or p.bn.running_var is None
    return f"{p.bn.node} is called without them" if missing else None


def _output_unused(p: _Pair) -> str | None:
    return None if p.bn.output.users else f"{p.bn.output} has no users"


def _statistics_used(p: _Pair) -> str | None:
    return f"by users of {p.bn.node}" if p.bn.other_outputs_used else None


def _layer_output_used(p: _Pair) -> str | None:
    chain = (*p.candidate.path, p.layer.node)
    for node, next_node in zip(chain, (p.bn.node, *chain), strict=False):
        others = [u for u in node.users if u is not next_node and not _asks_shape(u, node)]
        if others:
            return f"{node} is used by {', '.join(str(u) for u in others)}"
    if p.bn.node.all_input_nodes.count(p.bn.input) > 1 or p.bn.input in (
        p.bn.weight,
        p.bn.bias,
        p.bn.running_mean,
        p.bn.running_var,
    ):
        return f"{p.bn.node} takes {p.bn.input} twice"
    return None


def _asks_shape(user: fx.Node, of: fx.Node) -> bool:
    """Whether ``user`` uses the shape of ``of`` and none of its data."""
    if user.op == "call_method":
        like = user.target in _LIKE_METHODS and of not in user.args[:1]
        return like or user.target in _SHAPE_METHODS
    if user.target is getattr:
        return user.args[1] in ("shape", "ndim", "dtype", "device")
    return user.target in (torch.ops.aten.sym_size.int, torch.ops.aten.sym_numel.default)


def _no_metadata(p: _Pair) -> str | None:
    for name in _OPERANDS:
        owner, _, attribute = name.partition(".")
        operand = getattr(getattr(p, owner), attribute)
        if operand is not None and tensor_of(operand) is None:
            return f"{name.removesuffix('.node')} ({operand})"
    return None


def _functorch(p: _Pair) -> str | None:
    inside = p.effects.in_functorch(p.layer.node) or any(
        _compat.is_functorch_tensor(t) for t in p.operands.values()
    )
    return f"at {p.layer.node}" if inside else None


def _unsupported_tensor(p: _Pair) -> str | None:
    for name, tensor in p.operands.items():
        plain = type(tensor) in (Tensor, torch.nn.Parameter, torch.nn.Buffer, _compat.FakeTensor)
        if not plain or tensor.layout != torch.strided or tensor.is_quantized:
            return f"{name} is a {type(tensor).__name__} of layout {tensor.layout}"
        if tensor.device.type not in _DEVICES:
            return f"{name} is on {tensor.device}"
        if tensor.device != p.out.device:
            return f"{name} is on {tensor.device}, the layer's output on {p.out.device}"
    return None


def _unsupported_dtype(p: _Pair) -> str | None:
    dtypes = {name: t.dtype for name, t in p.operands.items()}
    odd = [f"{name} is {dtype}" for name, dtype in dtypes.items() if dtype not in _FLOATS]
    if odd:
        return ", ".join(odd)
    computed, result = dtypes["layer.node"], dtypes["bn.output"]
    if computed != result:
        return f"the layer computes in {computed}, the batch norm returns {result}"
    # Under autocast the operands of the layer may be wider than what it computes in.
    for name in ("layer.input", "layer.weight", "layer.bias"):
        dtype = dtypes.get(name, computed)
        casts = computed in (torch.float16, torch.bfloat16) and dtype != torch.float64
        if dtype != computed and not casts:
            return f"{name} is {dtype}, the layer computes in {computed}"
    return None


def _unbatched(p: _Pair) -> str | None:
    x, out, normalised = p.operands["layer.input"], p.out, tensor_of(p.bn.input)
    if not p.layer.is_linear:
        if not x.ndim == out.ndim == p.layer.spatial + 2:
            return f"{p.layer.node} has an input of {x.ndim} dimensions, without a batch"
        if normalised is None or normalised.ndim != out.ndim:
            return f"{p.bn.node} normalises a view of {p.layer.node}"
        return None
    if p.operands["layer.weight"].ndim != 2:
        return f"{p.layer.node} has a single output channel and drops its dimension"
    if out.ndim == 2 or (out.ndim > 2 and normalised is not None and normalised.ndim == 2):
        return None
    return f"{p.layer.node} returns {out.ndim} dimensions with its channels last"


def _unsupported_shape(p: _Pair) -> str | None:
    channels = p.out.shape[-1 if p.layer.is_linear else 1]
    for name in ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "layer.bias"):
        tensor = p.operands.get(name)
        if tensor is not None and tuple(tensor.shape) != (channels,):
            return f"{name} has shape {tuple(tensor.shape)}, there are {channels} channels"
    return None


def _region(p: _Pair) -> str | None:
    if p.effects.region_between(p.layer.node, p.bn.node):
        return f"between {p.layer.node} and {p.bn.node}"
    if p.layer.node.meta.get("custom") != p.bn.node.meta.get("custom"):
        return f"{p.layer.node} and {p.bn.node} are annotated differently"
    return None


def _input_mutated(p: _Pair) -> str | None:
    operands = (p.layer.input, p.layer.weight, p.layer.bias)
    written = p.effects.writer(operands, after=p.layer.node, before=p.bn.node)
    return f"between {p.layer.node} and {p.bn.node}" if written else None


def _mutated_later(p: _Pair) -> str | None:
    # Where autograd sees such a write, it raises, and nothing is lost by declining. Where it does
    # not (``.data``; a bias, which eval mode does not keep), the gradient would differ.
    layer = (p.layer.input, p.layer.weight, p.layer.bias)
    bn = (p.bn.weight, p.bn.running_mean, p.bn.running_var)
    for node, operands in ((p.layer.node, layer), (p.bn.node, bn)):
        for operand in operands:
            if p.effects.writer((operand,), after=node):
                return f"{operand} after {node}"
    return None


def _statistics_require_grad(p: _Pair) -> str | None:
    for name in ("bn.running_mean", "bn.running_var"):
        if p.operands[name].requires_grad:
            return name
    return None


def _denied(p: _Pair) -> str | None:
    paths = (module_path(p.layer.node), module_path(p.bn.node))
    return None if p.options.permits(*paths) else " and ".join(paths)


def _no_grad(p: _Pair) -> str | None:
    return None if p.operands["bn.output"].requires_grad else f"{p.bn.output} requires none"


def _affine_frozen(p: _Pair) -> str | None:
    weight = p.operands.get("bn.weight")
    if weight is None:
        return f"{p.bn.node} has no weight"
    return None if weight.requires_grad else f"weight of {p.bn.node}"


def _layer_frozen(p: _Pair) -> str | None:
    if p.options.fuse_frozen_layers or p.operands["layer.weight"].requires_grad:
        return None
    return f"weight of {p.layer.node}"


def _weight_larger(p: _Pair) -> str | None:
    if p.options.objective != "speed":
        return None
    weight, out = p.operands["layer.weight"].numel(), p.out.numel()
    costs = WEIGHT_PASSES * _compat.size_hint(weight)
    return f"{weight} numbers against {out}" if costs > _compat.size_hint(out) else None


Row = tuple[Code, Callable[[_Pair], "str | None"]]

LEGALITY: tuple[Row, ...] = (
    (Code.BATCH_STATISTICS, _batch_statistics),
    (Code.NO_RUNNING_STATISTICS, _no_running_statistics),
    (Code.OUTPUT_UNUSED, _output_unused),
    (Code.STATISTICS_USED, _statistics_used),
    (Code.LAYER_OUTPUT_USED, _layer_output_used),
    (Code.NO_METADATA, _no_metadata),
    (Code.FUNCTORCH, _functorch),
    (Code.UNSUPPORTED_TENSOR, _unsupported_tensor),
    (Code.UNSUPPORTED_DTYPE, _unsupported_dtype),
    (Code.UNBATCHED, _unbatched),
    (Code.UNSUPPORTED_SHAPE, _unsupported_shape),
    (Code.REGION, _region),
    (Code.INPUT_MUTATED, _input_mutated),
    (Code.MUTATED_LATER, _mutated_later),
    (Code.STATISTICS_REQUIRE_GRAD, _statistics_require_grad),
)

PROFIT: tuple[Row, ...] = (
    (Code.DENIED, _denied),
    (Code.NO_GRAD, _no_grad),
    (Code.AFFINE_FROZEN, _affine_frozen),
    (Code.LAYER_FROZEN, _layer_frozen),
    (Code.LARGE_WEIGHT, _weight_larger),
)
PROFIT_CODES = frozenset(code for code, _ in PROFIT)


def decide(candidate: Candidate, effects: Effects, options: Options) -> Decision:
    """The decision about one candidate. ``effects`` must describe the graph as it is now."""
    bn, layer = candidate.batch_norm, candidate.layer
    if isinstance(bn, Unreadable):
        return Decision(candidate, bn.code, bn.detail)
    if layer is None:
        return Decision(candidate, Code.NOT_AFTER_LAYER, f"{bn.node} follows {describe(bn.input)}")
    if isinstance(layer, Unreadable):
        return Decision(candidate, layer.code, layer.detail)
    pair = _Pair(candidate, layer, bn, effects, options)
    for code, applies in (*LEGALITY, *PROFIT):
        detail = applies(pair)
        if detail is not None:
            return Decision(candidate, code, detail)
    return Decision(candidate, Code.FUSED)
