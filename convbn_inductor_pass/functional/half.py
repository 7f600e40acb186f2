"""How the scale of a batch norm is shared between ``g`` and ``W`` in a float16 backward.

Before:  ``dx, dW' = convolution_backward(g, x, A * W)``;              ``dW = A * dW'``
After:   ``dx, dW' = convolution_backward(t * g, x, (A / t) * W)``;    ``dW = (A / t) * dW'``
         ``<dW', W>`` in the formula of dgamma becomes ``<dW', W> / t``

with ``A = gamma * invstd``, ``g`` the gradient of the batch norm's output and ``t`` a power of two,
all per channel and float32; ``norm`` is L2, over all but channels. Each product is rounded once.

    ``log2(t) = clamp(max(-2 - ceil(log2(norm(g))), ceil(log2(abs(A))) - 8), -24, 15)``
    ``t = 1`` where ``norm(g)`` is 0 or NaN, or ``A`` is NaN

Why: ``dW'`` is rounded to float16 before it is scaled. With ``t = 1`` it is eval mode's dW divided
by ``A``: it overflows where gamma is small or zero and the loss is scaled, and underflows where the
gradient is small, though eval mode's dW does not. (docs/numerics.md)

* First term: ``norm(t * g)`` is in (1/8, 1/4]. By Cauchy-Schwarz ``abs(dW') <= norm(x) / 4``: it
  fits if the root mean square of ``x`` is below 256 at a million positions. The largest ``abs(g)``
  would not do: it bounds no sum over many positions.
* Second term: ``abs(A / t) <= 256``, so that the scaled weight fits if ``abs(W) < 255`` (and
  ``abs(A) <= 2 ** 23``). Where it is the larger one, ``t * g`` is at most 1/128 of the gradient
  that eval mode rounds to float16 there, and ``dW'`` at most 1/128 of eval mode's dW.
* The clamp lets ``t`` fit float16, where multiplying with it is exact down to 2 ** -14.

bfloat16 and wider dtypes have the range of float32 and need no ``t``.
"""

import torch
from torch import Tensor


def gradient_scale(g: Tensor, scale: Tensor) -> Tensor:
    """``t`` [C], float32, for a float16 gradient ``g`` [N, C, ...] and ``scale`` [C], float32.

    No graph is recorded: rounding up has no gradient, and no gradient depends on ``t``.
    """
    with torch.no_grad():
        positions = [d for d in range(g.ndim) if d != 1]
        norm = torch.linalg.vector_norm(g, 2, positions, dtype=torch.float32)
        by_gradient = -2 - norm.log2().ceil()
        by_scale = scale.abs().log2().ceil() - 8
        exponent = torch.maximum(by_gradient, by_scale).clamp(-24, 15)
        return torch.where((norm > 0) & exponent.isfinite(), exponent, 0.0).exp2()
