"""Torch IR, the graphs of pre-grad passes: which nodes are layers and batch norms.

One table of targets, one binder. Arguments are bound by the operator's schema (or the
Python signature), never by position, so that keywords, defaults and ``input=`` read alike.
Reading judges only whether a call can be read at all; whether it may be fused is
:mod:`convbn_inductor_pass.decide`'s business.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .codes import Code

__all__ = [
    "BatchNormCall",
    "ConvCall",
    "ModuleTensor",
    "Operand",
    "Unreadable",
    "batch_norm_call",
    "conv_call",
    "describe",
    "is_idle_dropout",
    "tensor_of",
]

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class ModuleTensor:
    """A parameter or buffer of a module that the graph calls (``call_module`` graphs)."""

    path: str
    value: Tensor


Operand = fx.Node | ModuleTensor | None


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """A layer or batch norm whose call cannot be read, and why."""

    node: fx.Node
    code: Code
    detail: str


@dataclasses.dataclass(frozen=True)
class ConvCall:
    """A convolution or linear layer with its arguments in canonical form.

    ``spatial`` is the number of spatial dimensions, 0 for a linear layer, for which the
    fields from ``stride`` on mean nothing. ``padding`` may be the string ``"same"`` or ``"valid"``.
    """

    node: fx.Node
    input: fx.Node
    weight: Operand
    bias: Operand
    spatial: int
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    groups: int = 1

    @property
    def is_linear(self) -> bool:
        return self.spatial == 0


@dataclasses.dataclass(frozen=True)
class BatchNormCall:
    """A batch norm. ``output`` is the node that holds its result: ``node`` itself, or the
    ``getitem`` that takes it from a tuple."""

    node: fx.Node
    output: fx.Node
    input: fx.Node
    weight: Operand
    bias: Operand
    running_mean: Operand
    running_var: Operand
    training: bool
    eps: float | fx.Node
    other_outputs_used: bool = False


# target -> (spatial dims, transposed, schema). ``None`` dims: told by the weight's rank.
_CONVS: dict[Any, tuple[int | None, bool | None, torch.FunctionSchema]] = {}
for _d in (1, 2, 3):
    for _name, _transposed, _overload in (
        (f"conv{_d}d", False, "default"),
        (f"conv_transpose{_d}d", True, "default" if _d == 1 else "input"),
    ):
        _packet = getattr(aten, _name)
        _entry = (_d, _transposed, getattr(_packet, _overload)._schema)
        for _target in (getattr(torch, _name), _packet, getattr(_packet, _overload)):
            _CONVS[_target] = _entry
        if not _transposed:
            _CONVS[_packet.padding] = _entry
for _target in (F.linear, aten.linear, aten.linear.default):
    _CONVS[_target] = (0, False, aten.linear.default._schema)
for _target in (torch.convolution, aten.convolution, aten.convolution.default):
    _CONVS[_target] = (None, None, aten.convolution.default._schema)

# target -> (signature, fixed value of ``training`` or None, returns a tuple)
_BatchNormEntry = tuple[inspect.Signature | torch.FunctionSchema, bool | None, bool]
_BATCH_NORMS: dict[Any, _BatchNormEntry] = {
    F.batch_norm: (inspect.signature(F.batch_norm), None, False)
}
for _target in (torch.batch_norm, aten.batch_norm, aten.batch_norm.default):
    _BATCH_NORMS[_target] = (aten.batch_norm.default._schema, None, False)
for _name in ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"):
    _packet = getattr(aten, _name)
    for _target in (getattr(torch, _name), _packet, _packet.default):
        _BATCH_NORMS[_target] = (_packet.default._schema, None, True)
_packet = aten._native_batch_norm_legit_no_training
for _target in (torch._native_batch_norm_legit_no_training, _packet, _packet.default):
    _BATCH_NORMS[_target] = (_packet.default._schema, False, True)
_packet = aten._native_batch_norm_legit
for _target in (_packet, _packet.default):
    _BATCH_NORMS[_target] = (_packet.default._schema, None, True)

_DROPOUTS: dict[Any, inspect.Signature | torch.FunctionSchema] = {
    f: inspect.signature(f)
    for f in (
        F.dropout,
        F.dropout1d,
        F.dropout2d,
        F.dropout3d,
        F.alpha_dropout,
        F.feature_alpha_dropout,
    )
}
for _name in ("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"):
    _packet = getattr(aten, _name)
    for _target in (getattr(torch, _name), _packet, _packet.default):
        _DROPOUTS[_target] = _packet.default._schema

_CONV_MODULES = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_BATCH_NORM_MODULES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _bind(
    signature: inspect.Signature | torch.FunctionSchema,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[str, Any] | None:
    """All arguments by name with defaults filled in; None if the call does not fit."""
    if isinstance(signature, inspect.Signature):
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return None
        bound.apply_defaults()
        return dict(bound.arguments)
    names = [a.name for a in signature.arguments]
    result = dict(zip(names, args, strict=False))
    if len(args) > len(names) or not set(kwargs) <= set(names) - set(result):
        return None
    result.update(kwargs)
    for argument in signature.arguments:
        if argument.name not in result:
            if not argument.has_default_value():
                return None
            result[argument.name] = argument.default_value
    return result


def _has_node(value: Any) -> bool:
    found: list[fx.Node] = []
    fx.map_arg(value, lambda n: found.append(n))
    return bool(found)


def _each_dim(value: Any, dims: int) -> tuple[int, ...] | None:
    """PyTorch's ``int | list`` of one number per spatial dim, one-element lists included."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,) * dims
    if isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value):
        return tuple(value) * dims if len(value) == 1 else tuple(value)
    return None


def tensor_of(operand: Operand) -> Tensor | None:
    """The (fake) tensor that tracing recorded for an operand, None if it recorded none."""
    if isinstance(operand, ModuleTensor):
        return operand.value
    if operand is None:
        return None
    value = operand.meta.get("example_value", operand.meta.get("val"))
    if value is None and operand.op == "get_attr":
        value = _attribute(operand.graph.owning_module, str(operand.target))
    return value if isinstance(value, Tensor) else None


def _attribute(module: nn.Module | None, path: str) -> Any:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def is_idle_dropout(node: fx.Node) -> bool:
    """Whether ``node`` is a dropout that returns the very tensor that it gets (no training)."""
    if node.op == "call_module":
        module = _attribute(node.graph.owning_module, str(node.target))
        return isinstance(module, nn.modules.dropout._DropoutNd) and not module.training
    if node.op != "call_function" or node.target not in _DROPOUTS:
        return False
    bound = _bind(_DROPOUTS[node.target], node.args, node.kwargs) or {}
    return bound.get("training", bound.get("train")) is False


def describe(node: fx.Node) -> str:
    """Short name of what a node does, for messages."""
    if node.op == "call_module":
        module = _attribute(node.graph.owning_module, str(node.target))
        return type(module).__name__
    return str(getattr(node.target, "__name__", node.target))


def _plain_module(node: fx.Node, kinds: tuple[type[nn.Module], ...]) -> Any:
    """The module that ``node`` calls, if one of ``kinds`` that does just what its class says.

    Unreadable if it is one of ``kinds`` but may do something else; None if it is none of them.
    """
    module: Any = _attribute(node.graph.owning_module, str(node.target))
    if not isinstance(module, kinds):
        return None
    if type(module) not in kinds:
        return Unreadable(
            node, Code.MODULE_NOT_PLAIN, f"{node.target} is a {type(module).__name__}, a subclass"
        )
    if not is_as_its_class_says(module):
        return Unreadable(
            node,
            Code.MODULE_NOT_PLAIN,
            f"{node.target} has hooks, parametrizations or methods of its own",
        )
    return module


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_as_its_class_says(module: nn.Module) -> bool:
    """Whether ``module`` is of a class of torch.nn and calling it runs that class's forward.

    Not so with hooks and parametrizations, nor where an instance was given methods of its own,
    as in ``module.forward = ...``.
    """
    return (
        type(module).__module__.startswith("torch.nn.modules")
        and not any(getattr(module, hooks) for hooks in _HOOKS)
        and not hasattr(module, "parametrizations")
        and not any(callable(getattr(type(module), name, None)) for name in vars(module))
    )


def _module_input(node: fx.Node) -> fx.Node | None:
    values = [*node.args, *node.kwargs.values()]
    ok = len(values) == 1 and isinstance(values[0], fx.Node) and set(node.kwargs) <= {"input"}
    return values[0] if ok else None  # type: ignore[return-value]


def _module_tensor(node: fx.Node, module: nn.Module, name: str) -> ModuleTensor | None:
    value = getattr(module, name)
    return None if value is None else ModuleTensor(f"{node.target}.{name}", value)


def conv_call(node: fx.Node) -> ConvCall | Unreadable | None:
    """Read ``node`` as a convolution or linear layer; None if it is neither."""
    if node.op == "call_module":
        return _conv_module(node)
    if node.op != "call_function" or node.target not in _CONVS:
        return None
    spatial, transposed, schema = _CONVS[node.target]
    bound = _bind(schema, node.args, node.kwargs)
    if bound is None:
        return Unreadable(node, Code.UNBOUND_ARGUMENTS, f"{describe(node)} does not fit {schema}")
    input, weight, bias = bound.pop("input"), bound.pop("weight"), bound.pop("bias")
    if not isinstance(input, fx.Node) or not isinstance(weight, fx.Node) or _has_node(bound):
        return Unreadable(node, Code.NON_CONSTANT, f"{describe(node)} with arguments {bound}")
    if spatial == 0:
        return ConvCall(node, input, weight, bias, 0)
    if spatial is None:
        rank = tensor_of(weight)
        if rank is None:
            return Unreadable(node, Code.NO_METADATA, "rank of the weight is not recorded")
        spatial = rank.ndim - 2
        transposed = bool(bound["transposed"])
    lists = {
        name: _each_dim(bound.get(name, 0), spatial)
        for name in ("stride", "dilation", "output_padding")
    }
    padding = bound["padding"]
    if not isinstance(padding, str):
        padding = _each_dim(padding, spatial)
    if padding is None or None in lists.values() or not isinstance(bound["groups"], int):
        return Unreadable(node, Code.NON_CONSTANT, f"{describe(node)} with arguments {bound}")
    return ConvCall(
        node,
        input,
        weight,
        bias,
        spatial,
        padding=padding,
        transposed=bool(transposed),
        groups=bound["groups"],
        **lists,  # type: ignore[arg-type]
    )


def _conv_module(node: fx.Node) -> ConvCall | Unreadable | None:
    module = _plain_module(node, _CONV_MODULES)
    if module is None or isinstance(module, Unreadable):
        return module
    input = _module_input(node)
    if input is None:
        return Unreadable(node, Code.UNBOUND_ARGUMENTS, f"{node.target} has more than an input")
    weight, bias = _module_tensor(node, module, "weight"), _module_tensor(node, module, "bias")
    if isinstance(module, nn.Linear):
        return ConvCall(node, input, weight, bias, 0)
    if module.padding_mode != "zeros":
        return Unreadable(
            node, Code.MODULE_NOT_PLAIN, f"{node.target} has padding_mode {module.padding_mode}"
        )
    return ConvCall(
        node,
        input,
        weight,
        bias,
        spatial=len(module.kernel_size),
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        transposed=module.transposed,
        output_padding=module.output_padding,
        groups=module.groups,
    )


def batch_norm_call(node: fx.Node) -> BatchNormCall | Unreadable | None:
    """Read ``node`` as a batch norm in any spelling; None if it is none."""
    if node.op == "call_module":
        return _batch_norm_module(node)
    if node.op != "call_function" or node.target not in _BATCH_NORMS:
        return None
    signature, fixed_training, is_tuple = _BATCH_NORMS[node.target]
    bound = _bind(signature, node.args, node.kwargs)
    if bound is None:
        return Unreadable(node, Code.UNBOUND_ARGUMENTS, f"{describe(node)} does not fit")
    training = bound.get("training", fixed_training)
    eps = bound["eps"] if "eps" in bound else bound["epsilon"]
    if not isinstance(bound["input"], fx.Node) or _has_node(training):
        return Unreadable(node, Code.NON_CONSTANT, f"{describe(node)}: training={training}")
    output, others = node, False
    if is_tuple:
        takes_y = [u for u in node.users if _is_getitem(u, 0)]
        others = any(u.users or not _is_getitem(u) for u in node.users if u not in takes_y)
        others = others or len(takes_y) > 1
        output = takes_y[0] if takes_y else node
    return BatchNormCall(
        node,
        output,
        bound["input"],
        bound["weight"],
        bound["bias"],
        bound["running_mean"],
        bound["running_var"],
        bool(training),
        eps,
        others,
    )


def _is_getitem(node: fx.Node, index: int | None = None) -> bool:
    is_it = node.op == "call_function" and node.target is operator.getitem
    return is_it and (index is None or bool(node.args[1] == index))


def _batch_norm_module(node: fx.Node) -> BatchNormCall | Unreadable | None:
    module = _plain_module(node, _BATCH_NORM_MODULES)
    if module is None or isinstance(module, Unreadable):
        return module
    input = _module_input(node)
    if input is None:
        return Unreadable(node, Code.UNBOUND_ARGUMENTS, f"{node.target} has more than an input")
    return BatchNormCall(
        node,
        node,
        input,
        _module_tensor(node, module, "weight"),
        _module_tensor(node, module, "bias"),
        _module_tensor(node, module, "running_mean"),
        _module_tensor(node, module, "running_var"),
        # Without statistics a module normalises with the batch's, in eval mode too.
        module.training or module.running_mean is None,
        module.eps,
    )
