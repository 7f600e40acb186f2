"""Nanoseconds per element of storing and loading a mask with the torch that runs this."""

import statistics
import time

import torch


def measure(fn, *args):
    """Median over 30 calls of the thread's time, after one that compiles."""
    compiled = torch.compile(fn)
    compiled(*args)
    times = []
    for _ in range(30):
        start = time.thread_time()
        compiled(*args)
        times.append(time.thread_time() - start)
    return statistics.median(times) / args[0].numel() * 1e9


torch.set_num_threads(1)
for dtype in (torch.float32, torch.bfloat16):
    x = torch.randn(1 << 18).to(dtype)
    mask = x <= 0
    name = str(dtype).split(".")[1]
    print(f"{name} store {measure(lambda x: x <= 0, x):.3f}")
    print(f"{name} load {measure(lambda x, mask: torch.where(mask, 0, x), x, mask):.3f}")
