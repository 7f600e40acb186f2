"""The version of torch, checked when this package is imported."""

import torch
from torch.torch_version import TorchVersion

_OLDEST = "2.11"
version = TorchVersion(torch.__version__)


def check() -> None:
    """Raise ImportError where torch is older than what this package is written for."""
    if version < f"{_OLDEST}.0a0":
        raise ImportError(
            f"convbn_inductor_pass needs torch {_OLDEST} or later, found {torch.__version__}"
        )
