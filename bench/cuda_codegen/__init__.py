"""What Inductor generates for CUDA, on a machine without a GPU: everything but its speed.

Importing this package makes a CUDA build of PyTorch believe in an H100 until the process ends
(``pretended_gpu``); it must come before PyTorch. The network's tensors are fake, and Inductor
lowers, fuses and writes Triton for them (``lowering``, ``recording``). From that one reads
launches, traffic and peak, compiles the kernels for the real device (``cubins``), or runs them on
CPU tensors through Triton's interpreter (``interpreter``).

So whoever wants it starts a process: ``python -m bench.cuda_codegen`` is that of
:mod:`bench.metrics.cuda_codegen`.
"""

from . import pretended_gpu

__all__ = ["pretended_gpu"]
