"""Layers and eval-mode batch norms as differentiable functions that save less, for eager mode.

``conv_bn`` has the two nodes of autograd's graph, ``gradients`` the formulas, and ``saved`` makes
PyTorch's own functions save less.
"""
