"""Layers and eval-mode batch norms as differentiable functions that save one activation a pair.

``conv_bn`` has the two nodes of autograd's graph, ``gradients`` the formulas, ``half`` what float16
needs besides. ``relu`` saves a mask, ``max_pool`` does not save its input.
"""

from .conv_bn import batch_norm, layer, layer_before
from .gradients import BatchNorm, Conv, fold_affine
from .max_pool import max_pool
from .relu import relu

__all__ = ["BatchNorm", "Conv", "batch_norm", "fold_affine", "layer", "layer_before"]
__all__ += ["max_pool", "relu"]
