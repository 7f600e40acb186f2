"""An adversarial step of ResNet-18 with frozen weights: bytes saved, and milliseconds."""

import statistics
import time

import torch
import torchvision

torch.set_num_threads(1)
torch.manual_seed(0)
model = torchvision.models.resnet18().eval().requires_grad_(False)
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
print(f"bytes {sum(saved.values())}")
print(f"error {((grad - expected).abs().max() / expected.abs().max()).item():.1e}")

times = []
for _ in range(10):
    start = time.thread_time()
    torch.autograd.grad(compiled(x).square().sum(), [x])
    times.append(time.thread_time() - start)
print(f"ms {statistics.median(times) * 1e3:.1f}")
