"""Every private import from torch, and every branch on its version, which is checked here."""

import torch
from torch.torch_version import TorchVersion

version = TorchVersion(torch.__version__)
if version < "2.11.0a0":
    raise ImportError(f"convbn_inductor_pass needs torch 2.11 or later, found {version}")
