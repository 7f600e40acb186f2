"""Error of every gradient against float64, eval mode's and tune mode's, layer by layer.

    python -m bench gradient-error [--device cpu] [--dtype float32] [--backend inductor]

For several layers and several ratios of mean to deviation of the layer's output (the offset
comes from the input, as behind a ReLU, so that it cannot cancel against the layer's bias), the
largest error of a gradient relative to its largest element. The median over ``--seeds`` runs.

Both modes are compiled: through the passes alone, which leaves the rest to eager kernels
(``testing.fast_backend``), or with ``--backend inductor`` to the end. The exact gradients are eager
eval mode's in float64.

Tune mode makes dgamma out of the layer's weight gradient: its error is that gradient's, times
the ratio where the two sums of the formula cancel. Eval mode's grows with the ratio as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convbn_inductor_pass import testing

__all__ = ["BACKENDS", "LAYERS", "NAMES", "RATIOS", "compiled", "errors"]

# name -> (batch, channels in, channels out, size, kernel)
LAYERS = {
    "1x1, 64 to 64, 8x28x28": (8, 64, 64, 28, 1),
    "3x3, 64 to 64, 8x28x28": (8, 64, 64, 28, 3),
    "1x1, 256 to 64, 32x14x14": (32, 256, 64, 14, 1),
    "3x3, 128 to 128, 32x14x14": (32, 128, 128, 14, 3),
}
RATIOS = (0.0, 1.0, 10.0, 100.0, 1000.0)
NAMES = ("dx", "dW", "dgamma", "dbeta")
BACKENDS = ("fast", "inductor")

ConvBN = Callable[..., Tensor]


def conv_bn(
    x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor
) -> Tensor:
    """The pair as users write it."""
    return F.batch_norm(F.conv2d(x, weight), mean, var, gamma, beta, False, 0.1, 1e-5)


def compiled(backend: str) -> dict[str, ConvBN]:
    """The pair compiled in both modes; what was compiled before is dropped.

    Raises:
        ValueError: an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    torch._dynamo.reset()
    modes = {}
    for mode in ("eval", "tune"):
        kwargs: dict[str, Any] = {"options": {_FLAG: mode == "tune"}}
        if backend == "fast":
            kwargs = {"backend": testing.fast_backend(fuse=mode == "tune")}
        modes[mode] = torch.compile(conv_bn, dynamic=False, **kwargs)
    return modes


_FLAG = "efficient_conv_bn_eval_fx_passes"


def gradients(
    function: ConvBN, tensors: list[Tensor], mean: Tensor, var: Tensor, dy: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of x, weight, gamma and beta in the dtype of ``dy``, as float64."""
    leaves = [t.detach().to(dy.dtype).requires_grad_() for t in tensors]
    y = function(*leaves, mean.to(dy.dtype), var.to(dy.dtype))
    return tuple(g.double() for g in torch.autograd.grad(y, leaves, dy))


def errors(
    modes: dict[str, ConvBN],
    shape: tuple[int, ...],
    ratio: float,
    seed: int,
    device: str,
    dtype: torch.dtype,
) -> dict[str, list[float]]:
    """Relative errors of the four gradients, by mode."""
    torch.manual_seed(seed)
    batch, c_in, c_out, size, kernel = shape
    x = torch.randn(batch, c_in, size, size)
    weight = torch.randn(c_out, c_in, kernel, kernel) / (c_in * kernel**2) ** 0.5
    # An offset of the input that moves every output channel by ``ratio`` deviations: the
    # deviation is about 1, and the weights of a channel sum to 1.
    weight += (1 - weight.sum((1, 2, 3), keepdim=True)) / (c_in * kernel**2)
    x += ratio
    x, weight = (t.to(device, dtype).double() for t in (x, weight))
    c = F.conv2d(x, weight)
    mean, var = (t.to(dtype).double() for t in (c.mean((0, 2, 3)), c.var((0, 2, 3))))
    gamma, beta = torch.rand(c_out).to(x) + 0.5, torch.randn(c_out).to(x)
    gamma, beta = gamma.to(dtype).double(), beta.to(dtype).double()
    dy = torch.randn(c.shape).to(device, dtype)
    tensors = [x, weight, gamma, beta]
    exact = gradients(conv_bn, tensors, mean, var, dy.double())
    return {
        mode: [
            ((g - e).abs().max() / e.abs().max()).item()
            for g, e in zip(gradients(function, tensors, mean, var, dy), exact, strict=True)
        ]
        for mode, function in modes.items()
    }
