"""Private imports of eager mode: nothing here loads a compiler."""

import sys
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode


def runs_as_written() -> bool:
    """Whether the context of a call does not need, or does not allow, functions of our own."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None  # in torch.func
        or forward_ad._current_level >= 0
        or torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is not None
        or torch.is_inference_mode_enabled()
        or torch.jit.is_tracing()
    )


def saved_tensors_hooks() -> tuple[Any, Any] | None:
    """The innermost ``torch.autograd.graph.saved_tensors_hooks``; checkpoint uses them, too."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def backward_pass() -> int:
    """Number of the backward pass that runs in this thread; -1 if none does."""
    return torch._C._current_graph_task_id()


def will_run(node: Any) -> bool:
    """Whether the backward pass that runs in this thread, if one does, comes to ``node``."""
    return backward_pass() >= 0 and torch._C._will_engine_execute_node(node)


def in_compiled_autograd() -> bool:
    """Whether compiled autograd traces backward passes now."""
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return module is not None and (
        module.compiled_autograd_enabled or module.in_compiled_autograd_region
    )


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)`` less what it does for torch.func, for where that is not active."""
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def call_below(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call ``function`` with no autocast and no ``__torch_function__`` in between."""
    with torch._C._DisableAutocast(), torch._C.DisableTorchFunction():
        return function(*args, **kwargs)


def remove_function_mode(mode: TorchFunctionMode) -> None:
    """Leave ``mode`` without its ``__exit__``, if it is the innermost."""
    if _get_current_function_mode() is mode:
        _pop_mode()
