"""Saved-tensor hooks that leave out what autograd saves but backward does not need.

Max-pooling's gradient needs only its indices; a convolution or batch norm needs its input only
for the gradient of its weight, which may be frozen; and a ReLU needs only the signs of its output.
"""

import functools
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


class _Slot:
    def __init__(self, packed: Any) -> None:
        self.packed = packed
        self.kept: dict[int, Tensor] = {}  # by backward pass


class SharedSaves:
    """Lets a second node read what one saves, although the hooks around are asked only once.

    Checkpointing refuses to unpack twice in a backward pass, and offloading would copy twice. The
    saving node runs under :meth:`hooks`. The other one reads first, ``with`` this object: what it
    read is given to the saving node, too. Within the ``with`` statement around :meth:`hooks`,
    nothing has to be unpacked.
    """

    def __init__(self) -> None:
        self._outer_pack, self._outer_unpack = _hooks_around()
        self._open: set[int] = set()  # in which backward passes
        self._made: list[_Slot] = []

    def __enter__(self) -> None:
        self._open.add(torch_eager.backward_pass())

    def __exit__(self, *_: object) -> None:
        self._open.discard(torch_eager.backward_pass())
        for slot in self._made:
            slot.kept.clear()
        self._made.clear()

    def hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, t: Tensor) -> _Slot:
        slot = _Slot(self._outer_pack(t))
        slot.kept[torch_eager.backward_pass()] = t
        self._made.append(slot)
        return slot

    def _unpack(self, slot: _Slot) -> Tensor:
        now = torch_eager.backward_pass()
        tensor = slot.kept.pop(now, None)
        if tensor is None:
            tensor = self._outer_unpack(slot.packed)
        if now in self._open:
            slot.kept[now] = tensor
        return tensor


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
