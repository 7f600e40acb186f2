"""In the form of PyTorch's test/inductor/test_efficient_conv_bn_eval.py, for any device.

The same coverage: every layer and batch norm class, with and without bias, a few in training mode,
shared and multi-user layers; the counter, the outputs, the gradients, and weights that change
after compilation. Compiled up to AOTAutograd here, since real code
generation is test_inductor.py's; run with ``CONVBN_TEST_BACKEND=inductor`` for all of it.
"""

import copy
import itertools
import os
import unittest

import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.test_case import TestCase

import convbn_inductor_pass  # noqa: F401

GROUPS = [
    (nn.Linear, nn.BatchNorm1d, 0),
    (nn.Conv1d, nn.BatchNorm1d, 1),
    (nn.Conv2d, nn.BatchNorm2d, 2),
    (nn.Conv3d, nn.BatchNorm3d, 3),
    (nn.ConvTranspose1d, nn.BatchNorm1d, 1),
    (nn.ConvTranspose2d, nn.BatchNorm2d, 2),
    (nn.ConvTranspose3d, nn.BatchNorm3d, 3),
    (nn.Conv2d, nn.SyncBatchNorm, 2),
]


def backend():
    if os.environ.get("CONVBN_TEST_BACKEND") == "inductor":
        return "inductor"
    return lambda gm, inputs: compile_fx(gm, inputs, inner_compile=lambda gm, *a, **k: gm)


class OneLayer(nn.Module):
    def __init__(self, layer, norm, bias, **kwargs):
        super().__init__()
        kernel = () if layer is nn.Linear else (3,)
        self.layer = layer(3, 32, *kernel, bias=bias, **kwargs)
        self.norm = norm(32)

    def forward(self, x):
        return self.norm(self.layer(x))


class SharedAndMultiUser(nn.Module):
    """One layer before two norms: each call has one user, but for the one that has two."""

    def __init__(self, layer, norm, bias, **kwargs):
        super().__init__()
        kernel = () if layer is nn.Linear else (3,)
        self.layer = layer(3, 32, *kernel, bias=bias, **kwargs)
        self.norm1, self.norm2 = norm(32), norm(32)

    def forward(self, x):
        fused = self.norm1(self.layer(input=x)) + self.norm2(self.layer(x))
        both = self.layer(x)
        return fused + self.norm1(both) + self.norm2(both)


class Template:
    device: str

    def _model(self, cls, group, bias, eval_mode):
        layer, norm, dims = group
        torch.manual_seed(0)
        model = cls(layer, norm, bias).to(self.device)
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                nn.init.uniform_(m.running_mean)
                nn.init.uniform_(m.running_var, 0.5, 1.5)
                nn.init.uniform_(m.weight)
        return model.train(not eval_mode), torch.rand(4, 3, *[6] * dims, device=self.device)

    @config.patch(efficient_conv_bn_eval_fx_passes=True, fx_graph_cache=False)
    def test_basic(self):
        cases = [*itertools.product([OneLayer], GROUPS, (True, False), (True,))]
        cases += [(SharedAndMultiUser, group, True, True) for group in GROUPS]
        cases += itertools.product((OneLayer, SharedAndMultiUser), GROUPS[:3:2], (True,), (False,))
        for cls, group, bias, eval_mode in cases:
            with self.subTest(cls=cls, group=group, bias=bias, eval_mode=eval_mode):
                pairs = {OneLayer: 1, SharedAndMultiUser: 2}[cls] if eval_mode else 0
                self._check(cls, pairs, group, bias, eval_mode)

    def _check(self, cls, pairs, group, bias, eval_mode):
        torch._dynamo.reset()
        counters.clear()
        eager, x = self._model(cls, group, bias, eval_mode)
        compiled = torch.compile(copy.deepcopy(eager), backend=backend(), fullgraph=True)
        optimizers = [torch.optim.SGD(m.parameters(), lr=1e-2) for m in (eager, compiled)]
        for _ in range(2):  # the second round with weights that the first has changed
            outputs = [m(x) for m in (eager, compiled)]
            self.assertEqual(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
            for optimizer, output in zip(optimizers, outputs, strict=True):
                optimizer.zero_grad()
                output.square().mean().backward()
            for a, b in zip(compiled.parameters(), eager.parameters(), strict=True):
                self.assertEqual(a.grad, b.grad, rtol=1e-3, atol=1e-4)
            for optimizer in optimizers:
                optimizer.step()
        self.assertEqual(counters["inductor"]["efficient_conv_bn_eval"], pairs)


class CpuTest(Template, TestCase):
    device = "cpu"


@unittest.skipIf(not torch.cuda.is_available(), "needs a CUDA GPU")
class CudaTest(Template, TestCase):
    device = "cuda"


if __name__ == "__main__":
    from torch._inductor.test_case import run_tests

    run_tests()
