"""Private imports from torch, Inductor's apart: those are in :mod:`_inductor`.

Branches on torch's version, too, are in these two modules and nowhere else.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._functorch.aot_autograd import make_boxed_func as boxed
from torch._guards import TracingContext, tracing
from torch._logging import trace_structured
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "OptimizedModule",
    "TracingContext",
    "WeakIdKeyDictionary",
    "boxed",
    "check_torch_version",
    "copy_dynamo_source",
    "counters",
    "counters_kept",
    "depends_on_data",
    "dynamo_config",
    "fake_mode_of",
    "function_of_source",
    "functorch_config",
    "in_functional_transform",
    "is_functorch_tensor",
    "is_mutable",
    "is_pointwise",
    "is_pure",
    "is_view",
    "lazy_graph_module",
    "plain_dispatch",
    "reads_strides",
    "real_tensors",
    "remove_function_mode",
    "saved_tensors_hooks",
    "size_hint",
    "storage_key",
    "surely",
    "torch_functions_off",
    "trace_structured",
    "tracing",
    "version",
]

_OLDEST = "2.11"
version = TorchVersion(torch.__version__)


def check_torch_version() -> None:
    """Raise ImportError where torch is older than what this package is written for."""
    if version < f"{_OLDEST}.0a0":
        raise ImportError(
            f"convbn_inductor_pass needs torch {_OLDEST} or later, found {torch.__version__}"
        )


def storage_key(value: Any) -> int | None:
    """Identity of the storage behind a tensor; None if it has none that can be compared.

    Two tensors can alias only if their keys are equal. Fake tensors keep the aliasing of the
    tensors that they stand for, graph inputs included.
    """
    if not isinstance(value, Tensor) or is_functorch_tensor(value):
        return None
    try:
        return value.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse tensors and wrapper subclasses
        return None


def is_functorch_tensor(value: Tensor) -> bool:
    """Whether ``value`` belongs to a level of torch.func (vmap, grad, jvp)."""
    return torch._C._functorch.is_functorch_wrapped_tensor(value)


def in_functional_transform() -> bool:
    """Whether torch.func or forward-mode automatic differentiation is at work here."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    )


def saved_tensors_hooks() -> tuple[Any, Any] | None:
    """The innermost ``torch.autograd.graph.saved_tensors_hooks``; checkpoint uses them, too."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def torch_functions_off() -> contextlib.AbstractContextManager[None]:
    """Call torch with no ``__torch_function__``, of a mode or of a subclass, in between."""
    return torch._C.DisableTorchFunction()


def remove_function_mode(mode: TorchFunctionMode) -> bool:
    """Leave ``mode`` without its ``__exit__``, if it is the innermost; whether it was."""
    if _get_current_function_mode() is not mode:
        return False
    _pop_mode()
    return True


_UNBACKED = 8192  # what Inductor guesses for a size that depends on data


def size_hint(value: int | torch.SymInt) -> int:
    """The number that tracing saw for a possibly symbolic size; a guess if it saw none."""
    if isinstance(value, int):
        return value
    if value.node.has_hint():
        return int(value.node.hint)
    expression = value.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, _UNBACKED)))


def depends_on_data(tensor: Tensor) -> bool:
    """Whether a size of ``tensor`` is known only once it is computed: its hint is a guess."""
    return any(isinstance(n, torch.SymInt) and not n.node.has_hint() for n in tensor.shape)


def lazy_graph_module(root: torch.nn.Module, graph: torch.fx.Graph) -> torch.fx.GraphModule:
    """A graph module as Dynamo makes it: its code is not compiled before it is called.

    PyTorch's own efficient_conv_bn_eval needs that: it puts a builtin function among a node's
    arguments, which does not print as Python.
    """
    with _use_lazy_graph_module(True):
        return _make_graph_module(root, graph)


def copy_dynamo_source(old: Any, new: Any) -> None:
    """Copy what tells AOTAutograd that a graph is Dynamo's and which inputs are parameters.

    Without it parameters count as activations, and the partitioner's choice differs.
    """
    for name in ("_dynamo_source", "_param_name_to_source"):
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))


@contextlib.contextmanager
def counters_kept() -> Iterator[None]:
    """Leave Dynamo's and Inductor's counters as they were."""
    before = {name: counter.copy() for name, counter in counters.items()}
    try:
        yield
    finally:
        counters.clear()
        counters.update(before)


def is_pointwise(target: Any) -> bool:
    """Whether an aten operator computes each number of its result from one of each input."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    convert = torch.ops.prims.convert_element_type.default
    return torch.Tag.pointwise in target.tags or target is convert


def is_mutable(target: Any) -> bool:
    """Whether calling ``target`` may write to its arguments; of what is not known, it may."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    return isinstance(target, torch._ops.HigherOrderOperator)


def is_view(target: Any) -> bool:
    """Whether the result of ``target`` is in the memory of one of its arguments."""
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    return any(r.alias_info is not None for r in target._schema.returns)


def reads_strides(target: Any) -> bool:
    """Whether ``target`` may depend on how its arguments lie in memory."""
    if not isinstance(target, torch._ops.OpOverload):
        return isinstance(target, torch._ops.HigherOrderOperator)
    is_as_strided = target._schema.name.startswith("aten::as_strided")
    return is_as_strided or target.namespace not in ("aten", "prims", "mkldnn")


def is_pure(target: Any) -> bool:
    """Whether ``target`` always computes the same from the same tensors, and does nothing else."""
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    return torch.Tag.nondeterministic_seeded not in target.tags and target.namespace in (
        "aten",
        "prims",
    )


def fake_mode_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The mode that ``tensor`` is fake in."""
    return tensor.fake_mode if isinstance(tensor, FakeTensor) else contextlib.nullcontext()


@contextlib.contextmanager
def plain_dispatch() -> Iterator[None]:
    """Call operators as they are: without autocast and without recording for autograd."""
    with torch.no_grad(), torch._C._DisableAutocast():
        yield


def surely(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on symbolic sizes holds for every input; asking makes no guard."""
    return bool(statically_known_true(condition))


@contextlib.contextmanager
def real_tensors() -> Iterator[None]:
    """Compute with real tensors and their dtypes, as outside of any compilation or autocast."""
    with _disable_current_modes(), torch_functions_off(), torch._C._DisableAutocast():
        yield


def function_of_source(source: str) -> Callable[..., Any]:
    """The function that ``torch.fx.Graph.python_code`` has written."""
    from torch.fx.graph import _custom_builtins

    namespace: dict[str, Any] = {name: builtin.obj for name, builtin in _custom_builtins.items()}
    exec(source, namespace)
    return functools.partial(namespace["forward"], None)
