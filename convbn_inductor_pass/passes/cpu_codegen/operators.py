"""``as_mask`` and ``as_bytes``: bytes that are 0 or 1 as a mask, and a mask as bytes, copied.

Written in Python; compiled code that has to run without it must not contain them
(``_torch.inductor.for_python``). :mod:`masks` says what they are for.
"""

from __future__ import annotations

import torch

__all__ = ["as_bytes", "as_mask"]

# "Flexible" keeps Inductor from bringing the argument into the layout that was traced.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
_library = torch.library.Library("convbn_inductor_pass", "FRAGMENT")


def _define(name: str, dtype: torch.dtype) -> None:
    """An operator that copies a tensor of bytes as one of another dtype."""
    _library.define(f"{name}(Tensor bytes) -> Tensor", tags=_TAGS)
    _library.impl(name, lambda bytes: bytes.view(dtype).clone(), "CPU")
    _library.impl(name, lambda bytes: torch.empty_like(bytes, dtype=dtype), "Meta")


_define("as_mask", torch.bool)
_define("as_bytes", torch.uint8)

as_mask = torch.ops.convbn_inductor_pass.as_mask.default
as_bytes = torch.ops.convbn_inductor_pass.as_bytes.default
