"""Bytes saved for backward, of masks and in all, with the torch that runs this.

A critic without norms (WGAN-GP's shape: convolutions of stride 2 and leaky ReLU), and torchvision's
MobileNetV2 fine-tuned in eval mode with ``efficient_conv_bn_eval_fx_passes``.
"""

import itertools

import torch
import torchvision
from torch import nn


def report(name, model, x):
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor
        return tensor

    compiled = torch.compile(model)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = compiled(x)
    out.sum().backward()
    for tensor in (*model.parameters(), *model.buffers(), x):
        saved.pop(tensor.data_ptr(), None)
    masks = sum(t.nbytes for t in saved.values() if t.dtype == torch.bool)
    print(f"{name}: masks {masks:,} of {sum(t.nbytes for t in saved.values()):,}", flush=True)


torch.set_num_threads(1)
torch.manual_seed(0)
channels = [3, 64, 128, 256, 512]
layers = []
for a, b in itertools.pairwise(channels):
    layers += [nn.Conv2d(a, b, 5, stride=2, padding=2), nn.LeakyReLU(0.2)]
report("critic", nn.Sequential(*layers, nn.Conv2d(512, 1, 4)), torch.randn(4, 3, 64, 64))
torch._inductor.config.efficient_conv_bn_eval_fx_passes = True
report("MobileNetV2", torchvision.models.mobilenet_v2().eval(), torch.randn(2, 3, 64, 64))
