"""Saved-tensor hooks that leave out what autograd saves but backward does not need.

Max-pooling's gradient needs only its indices; a convolution or batch norm needs its input only
for the gradient of its weight, which may be frozen; and a ReLU needs only the signs of its output.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .._torch import eager as torch_eager


class _Empty(functools.partial[Tensor]):
    """Makes a tensor whose elements are not read."""


def _with_version(t: Tensor) -> tuple[Tensor, int]:
    return t, t._version


def _unwritten(packed: tuple[Tensor, int]) -> Tensor:
    t, version = packed
    if t._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: {list(t.shape)} is at version {t._version}; expected version {version}"
        )
    return t


def _hooks_around() -> tuple[Any, Any]:
    """Those that are active; or what autograd does without, which under hooks checks no version."""
    return torch_eager.saved_tensors_hooks() or (_with_version, _unwritten)


def shared_saves() -> tuple[saved_tensors_hooks, Callable[[], Any]]:
    """Hooks for a node whose saved tensors another one reads, too; and a context for the other.

    The hooks around are asked once in each backward pass: checkpointing refuses more. What is read
    first, in that context, is given to the node as well; around its forward, nothing is unpacked.
    """
    outer_pack, outer_unpack = _hooks_around()
    reading: set[int] = set()  # backward passes
    made: list[dict[int, Tensor]] = []

    def pack(t: Tensor) -> tuple[Any, dict[int, Tensor]]:
        made.append({torch_eager.backward_pass(): t})
        return outer_pack(t), made[-1]

    def unpack(saved: tuple[Any, dict[int, Tensor]]) -> Tensor:
        (packed, kept), now = saved, torch_eager.backward_pass()
        tensor = kept.pop(now, None)
        tensor = outer_unpack(packed) if tensor is None else tensor
        if now in reading:
            kept[now] = tensor
        return tensor

    @contextlib.contextmanager
    def read() -> Iterator[None]:
        now = torch_eager.backward_pass()
        reading.add(now)
        try:
            yield
        finally:
            reading.discard(now)
            for kept in made:
                kept.clear()
            made.clear()

    return saved_tensors_hooks(pack, unpack), read


def saves_shape_only(x: Tensor) -> saved_tensors_hooks:
    """Within, autograd saves of ``x``, and of what it is cast to, shape and strides alone.

    The gradients must not depend on the elements; what else is saved requires no gradient.
    """
    outer_pack, outer_unpack = _hooks_around()
    identity = id(x)  # autograd holds these functions, which must not hold ``x``

    def pack(t: Tensor) -> Any:
        if id(t) != identity and not t.requires_grad:
            return outer_pack(t)
        how = (t.shape, t.stride())
        return _Empty(torch.empty_strided, *how, dtype=t.dtype, device=t.device)

    def unpack(packed: Any) -> Any:
        return packed() if isinstance(packed, _Empty) else outer_unpack(packed)

    return saved_tensors_hooks(pack, unpack)


def saves_mask() -> saved_tensors_hooks:
    """Within, a ReLU saves where its result is not 0, a byte for each element.

    Its gradient compares with 0 what it saved, of whatever dtype: CPUs are slow to convert a bool,
    and slow to make one by a comparison.
    """
    outer_pack, outer_unpack = _hooks_around()
    return saved_tensors_hooks(
        lambda y: outer_pack(y.to(torch.bool).view(torch.uint8)), outer_unpack
    )
