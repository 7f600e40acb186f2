"""Eager layers and batch norms that save less: ``conv_bn`` (nodes), ``gradients``, ``saved``."""
