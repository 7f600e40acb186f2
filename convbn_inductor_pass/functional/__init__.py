"""A layer and an eval-mode batch norm as one differentiable function.

``conv_bn`` holds the formulas of forward and gradient, ``half`` what float16 needs besides.
"""

from .conv_bn import BatchNorm, Conv, conv_bn_eval, fold_affine

__all__ = ["BatchNorm", "Conv", "conv_bn_eval", "fold_affine"]
