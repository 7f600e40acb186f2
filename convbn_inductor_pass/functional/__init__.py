"""Layers and eval-mode batch norms as differentiable functions that save one activation a pair.

``conv_bn`` holds the formulas of the gradients, ``half`` what float16 needs besides.
"""

from .conv_bn import BatchNorm, Conv, batch_norm, fold_affine, layer, layer_before

__all__ = ["BatchNorm", "Conv", "batch_norm", "fold_affine", "layer", "layer_before"]
