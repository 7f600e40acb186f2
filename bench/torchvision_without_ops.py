"""Import torchvision, also where its compiled operators do not load.

PyPI's wheels of torchvision are linked with CUDA, and do not load beside a CPU build of PyTorch.
Then its import fails with ``operator torchvision::nms does not exist``: it registers a fake kernel
for an operator that its compiled library would have defined.

Here the schema is defined first, with a kernel in plain PyTorch. Of the other operators only
``roi_align`` is needed by torchvision's models, and torchvision has that in Python itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import pathlib
import sys
from types import ModuleType

import torch
from torch import Tensor

__all__ = ["import_torchvision"]

_schemas: list[torch.library.Library] = []  # a Library undoes its definitions when it is freed


def import_torchvision() -> ModuleType:
    """The module ``torchvision``, imported; with its compiled operators if they load.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
    """
    if "torchvision" in sys.modules:
        return sys.modules["torchvision"]
    if _operators_load():
        return importlib.import_module("torchvision")
    if not _schemas:
        _define_operators()
    module = importlib.import_module("torchvision")
    # nms asks first whether the compiled library was loaded, and now does not depend on it.
    boxes = importlib.import_module("torchvision.ops.boxes")
    boxes._assert_has_ops = lambda: None  # type: ignore[attr-defined]
    return module


def _operators_load() -> bool:
    spec = importlib.util.find_spec("torchvision")  # which does not import it
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")
    libraries = [*pathlib.Path(spec.origin).parent.glob("_C*.so")]
    try:
        for library in libraries:
            torch.ops.load_library(library)
    except OSError:
        return False
    return bool(libraries)


def _define_operators() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    _schemas.append(library)
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", _nms, "CPU")


def _nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression: indices of the boxes that stay, by falling score.

    Args:
        dets: boxes ``x1, y1, x2, y2``, [N, 4].
        scores: [N].
        iou_threshold: a box goes if its intersection over union with one that stays and has a
            higher score is above this.
    """
    order = scores.argsort(descending=True, stable=True)
    x1, y1, x2, y2 = dets[order].unbind(1)
    area = (x2 - x1) * (y2 - y1)
    stays = torch.ones_like(order, dtype=torch.bool)
    for i in range(len(order)):
        if not stays[i]:
            continue
        rest = slice(i + 1, None)
        width = torch.minimum(x2[i], x2[rest]) - torch.maximum(x1[i], x1[rest])
        height = torch.minimum(y2[i], y2[rest]) - torch.maximum(y1[i], y1[rest])
        common = width.clamp(min=0) * height.clamp(min=0)
        stays[rest] &= common <= iou_threshold * (area[i] + area[rest] - common)
    return order[stays]
