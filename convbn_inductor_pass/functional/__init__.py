"""A layer and an eval-mode batch norm as one differentiable function, and its algebra."""
