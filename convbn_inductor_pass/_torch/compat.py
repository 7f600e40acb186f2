"""Private imports of what reads and writes graphs: operators, symbolic sizes, fake tensors."""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import statically_known_true

from . import version

# Before, Inductor may fail if a cast is fused with a call of a list (_foreach_mul).
LISTS_MAY_BE_FUSED = version >= "2.13"
_UNBACKED = 8192  # what Inductor guesses for a size that depends on data


def size_hint(value: int | torch.SymInt) -> int:
    """The number that tracing saw for a possibly symbolic size; a guess if it saw none."""
    if isinstance(value, int):
        return value
    if value.node.has_hint():
        return int(value.node.hint)
    expression = value.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, _UNBACKED)))


def shape_of(tensor: Tensor) -> tuple[int | str, ...]:
    """The shape of a tensor, symbolic sizes as strings."""
    return tuple(s if isinstance(s, int) else str(s) for s in tensor.shape)


def is_pointwise(target: Any) -> bool:
    """Whether an aten operator computes each element of its result from one of each input."""
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
    if torch.Tag.nondeterministic_seeded in target.tags:
        return True  # a library's random numbers come in the order of memory
    if target in (torch.ops.aten.view.dtype, torch.ops.aten.view_copy.dtype):
        return True
    is_of_memory = target._schema.name.startswith(("aten::as_strided", "aten::view_as_complex"))
    return is_of_memory or target.namespace not in ("aten", "prims", "mkldnn")


def is_pure(target: Any) -> bool:
    """Whether ``target`` always computes the same from the same tensors, and does nothing else."""
    if not isinstance(target, torch._ops.OpOverload) or is_mutable(target):
        return False
    is_random = torch.Tag.nondeterministic_seeded in target.tags
    return target.namespace in ("aten", "prims") and not is_random


def storage_key(value: Any) -> int | None:
    """Identity of the storage behind a tensor; None if it has none that can be compared.

    Tensors can alias only if their keys are equal, fake ones as those that they stand for.
    """
    if not isinstance(value, Tensor) or torch._C._functorch.is_functorch_wrapped_tensor(value):
        return None
    try:
        return value.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse tensors and wrapper subclasses
        return None


def metadata_key(value: Any) -> Any:
    """Equal for arguments with which a call gives the same metadata; None with symbolic sizes."""
    if isinstance(value, Tensor):
        sizes = (*value.shape, *value.stride(), value.storage_offset())
        if type(value) is not FakeTensor or not all(type(n) is int for n in sizes):
            return None
        return (value.dtype, value.device, tuple(value.shape), value.stride())
    if isinstance(value, (list, tuple, dict)):
        items = value.items() if isinstance(value, dict) else value
        keys = tuple(map(metadata_key, items))
        return None if any(k is None for k in keys) else keys
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return None
    return (type(value), value)


def fake_copy(value: Any) -> Any:
    """Fake tensors like those in ``value``, in memory of their own; much cheaper than a call."""
    if isinstance(value, FakeTensor):
        with unset_fake_temporarily():
            shape, stride = value.shape, value.stride()
            meta = torch.empty_strided(shape, stride, dtype=value.dtype, device="meta")
            return FakeTensor(value.fake_mode, meta, value.device)
    return type(value)(map(fake_copy, value)) if isinstance(value, (list, tuple)) else value


def surely(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on symbolic sizes holds for every input; asking makes no guard."""
    return bool(statically_known_true(condition))
