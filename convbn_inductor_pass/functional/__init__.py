"""Layers and eval-mode batch norms as differentiable functions that save one activation a pair.

``conv_bn`` has the two nodes of autograd's graph, ``gradients`` the formulas, for float16 as well.
``saved`` makes PyTorch's own functions save less.
"""
