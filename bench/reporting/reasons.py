"""Why ours saves more than another mode in a workload, or about as much as eval mode.

Reports quote these; a row that none of them covers reads "not explained", and the tests fail
on one among the committed results.
"""

from __future__ import annotations

from ..workload import Settings

__all__ = ["UNEXPLAINED", "why", "why_little"]

UNEXPLAINED = "not explained"


def why(settings: Settings, other: str) -> str:
    """Why ours saves more than ``other`` in this workload."""
    return _MORE.get((settings.protocol, other), UNEXPLAINED)


def why_little(settings: Settings) -> str:
    """Why ours saves about as many bytes as eval mode in this workload."""
    by_case = _LITTLE_IN_CASE.get(settings.case)
    return by_case or _LITTLE.get(settings.protocol, UNEXPLAINED)


_SILU = "SiLU: eval mode recomputes its way to about one activation per pair already"
_NO_BATCH_NORM = "a control: there is no batch norm"
_FROZEN_MODULE = "FrozenBatchNorm: eval mode does not save the convolutions' outputs either"
_FROZEN = "the batch norms' weights are frozen: eval mode does not save the layers' outputs either"

_MORE = {
    ("bn-tuning", "builtin"): (
        "frozen layers are left as written: PyTorch's pass computes their weight gradients to get "
        "gamma's, as ours does with fuse_frozen_layers"
    ),
    ("bn-tuning", "deploy"): "frozen layers are left as written; deploy mode has no gamma to train",
}

_LITTLE = {"frozen-bn": _FROZEN}

_LITTLE_IN_CASE = {
    "efficientnet_b0": _SILU,
    "hf_mobilevit": _SILU,
    "convnext_tiny": "no batch norm: only what its 18 layer scales multiply is not saved",
    "vit_s_max": _NO_BATCH_NORM,
    "pit_s_max": _NO_BATCH_NORM,
    "faster_rcnn_resnet50_frozen_bn": _FROZEN_MODULE,
    "retinanet_resnet50_frozen_bn": _FROZEN_MODULE,
}
