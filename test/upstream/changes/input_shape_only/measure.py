"""Adversarial steps, weights frozen, with the torch that runs this: bytes, error, milliseconds."""

import statistics
import sys
import time

import torch
import torchvision


def measure(name):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name).eval().requires_grad_(False)
    x = torch.randn(8, 3, 96, 96, requires_grad=True)
    compiled = torch.compile(model)
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = compiled(x)
    (grad,) = torch.autograd.grad(out.square().sum(), [x])
    (expected,) = torch.autograd.grad(model(x).square().sum(), [x])
    for tensor in (*model.parameters(), *model.buffers(), x):
        saved.pop(tensor.data_ptr(), None)
    error = (grad - expected).abs().max() / expected.abs().max()
    times = []
    for _ in range(8):
        start = time.thread_time()
        torch.autograd.grad(compiled(x).square().sum(), [x])
        times.append(time.thread_time() - start)
    ms = statistics.median(times) * 1e3
    print(f"{name}: bytes {sum(saved.values()):,} error {error:.1e} ms {ms:.1f}", flush=True)


torch.set_num_threads(1)
for name in sys.argv[1:] or ("resnet18", "mobilenet_v2"):
    measure(name)
