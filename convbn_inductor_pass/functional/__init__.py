"""Layers and eval-mode batch norms as differentiable functions that save one activation a pair.

``conv_bn`` has the two nodes of autograd's graph, ``gradients`` the formulas, ``half`` what float16
needs besides. ``saved`` makes PyTorch's own functions save less.
"""

from .conv_bn import batch_norm, layer, layer_before, layer_tensors
from .saved import saves_mask, saves_shape_only

__all__ = ["batch_norm", "layer", "layer_before", "layer_tensors"]
__all__ += ["saves_mask", "saves_shape_only"]
