"""``as_mask`` and ``as_bytes``: bytes that are 0 or 1 as a mask, and a mask as bytes, copied.

Written in Python; compiled code that has to run without it must not contain them
(``_torch.inductor.for_python``). :mod:`masks` says what they are for.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["as_bytes", "as_mask"]

# "Flexible" keeps Inductor from bringing the argument into the layout that was traced.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
_library = torch.library.Library("convbn_inductor_pass", "FRAGMENT")
_library.define("as_mask(Tensor bytes) -> Tensor", tags=_TAGS)
_library.define("as_bytes(Tensor mask) -> Tensor", tags=_TAGS)


@torch.library.impl(_library, "as_mask", "CPU")
def _as_mask(bytes: Tensor) -> Tensor:
    return bytes.view(torch.bool).clone()


@torch.library.impl(_library, "as_mask", "Meta")
def _as_mask_meta(bytes: Tensor) -> Tensor:
    return torch.empty_like(bytes, dtype=torch.bool)


@torch.library.impl(_library, "as_bytes", "CPU")
def _as_bytes(mask: Tensor) -> Tensor:
    return mask.view(torch.uint8).clone()


@torch.library.impl(_library, "as_bytes", "Meta")
def _as_bytes_meta(mask: Tensor) -> Tensor:
    return torch.empty_like(mask, dtype=torch.uint8)


as_mask = torch.ops.convbn_inductor_pass.as_mask.default
as_bytes = torch.ops.convbn_inductor_pass.as_bytes.default
