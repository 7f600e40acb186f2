"""Layers and eval-mode batch norms as differentiable functions that save less, for eager mode."""
