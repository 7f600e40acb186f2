"""Import of the libraries that some cases take their networks from; all are optional."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

__all__ = ["MissingLibrary", "require"]


class MissingLibrary(ImportError):
    """A case cannot be built here; the message says what to install."""


def require(name: str) -> ModuleType:
    """Import ``name`` or one of its submodules, for example ``"torchvision.models"``.

    Raises:
        MissingLibrary: the library is not installed or does not fit this PyTorch.
    """
    library = name.partition(".")[0]
    try:
        if library in ("torchvision", "timm"):  # timm imports torchvision
            _import_torchvision()
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingLibrary(
            f"needs {library}: pip install {library}, or pip install -e '.[bench]' ({error})"
        ) from error


_schemas: list[torch.library.Library] = []  # a Library undoes its definitions when it is freed


def _import_torchvision() -> None:
    """Import torchvision, also where its compiled operators do not load.

    The wheels on PyPI are linked with CUDA and cannot load beside a CPU build of PyTorch. Then
    the import fails because torchvision registers fake kernels for operators that nobody
    defined. The networks need none of these operators, so defining their schemas is enough.
    """
    if "torchvision" in sys.modules:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for module in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
            del sys.modules[module]
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _schemas.append(library)
        importlib.import_module("torchvision")
