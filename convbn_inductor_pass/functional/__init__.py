"""Layers and eval-mode batch norms as differentiable functions that save one activation a pair.

``conv_bn`` has the two nodes of autograd's graph, ``gradients`` the formulas, ``half`` what float16
needs besides. ``relu`` saves a mask; within ``saves_shape_only`` no input is saved.
"""

from .conv_bn import batch_norm, layer, layer_before
from .relu import relu
from .shape_only import saves_shape_only

__all__ = ["batch_norm", "layer", "layer_before", "relu", "saves_shape_only"]
