# Owner(s): ["module: inductor"]
"""Backward of convolutions whose weights are frozen: it needs no input of theirs."""

import torch
from torch import nn
from torch._inductor.test_case import TestCase, run_tests
from torch._inductor.utils import run_and_get_code
from torch.testing import FileCheck
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_utils import parametrize

DEVICES = ("cpu", "cuda", "xpu")
CONV = {
    (1, False): nn.Conv1d,
    (2, False): nn.Conv2d,
    (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d,
    (2, True): nn.ConvTranspose2d,
    (3, True): nn.ConvTranspose3d,
}

CALL = "torch.ops.aten.convolution_backward.default("

# Some leave a rest of the input's size, which is 12 or 13
GEOMETRIES = [
    {"kernel_size": 3},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 2, "stride": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2, "groups": 2},
    {"kernel_size": 1, "stride": 2, "bias": False},
]


class FrozenConvTestCase(TestCase):
    def check(self, device, model, x, dynamic=False, dtype=torch.float32):
        """
        Compare the gradients of the compiled model with those of eager. Returns the
        bytes saved for backward besides parameters and x, and the backward's code.
        """
        model = model.to(device, dtype)
        x = x.to(device, dtype).requires_grad_()
        # By shape: weights may be saved in another layout
        known = {(t.shape, t.dtype) for t in (*model.parameters(), x)}
        saved = []

        def pack(tensor):
            if (tensor.shape, tensor.dtype) not in known:
                saved.append(tensor.nbytes)
            return tensor

        def step(fn):
            saved.clear()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                out = fn(x)
            inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
            return torch.autograd.grad(out.square().sum(), inputs)

        expected = step(model)
        torch._dynamo.reset()
        compiled = torch.compile(model, dynamic=dynamic)
        actual, codes = run_and_get_code(lambda: step(compiled))
        tolerance = 1e-4 if dtype == torch.float32 else 5e-2
        for a, e in zip(actual, expected, strict=True):
            scale = e.abs().max().item()
            self.assertEqual(a, e, atol=tolerance * scale, rtol=tolerance)
        return sum(saved), codes[-1]


def frozen(*layers):
    return nn.Sequential(*layers).requires_grad_(False)


class TestFrozenConvBackward(FrozenConvTestCase):
    @parametrize("transposed", [False, True])
    @parametrize("spatial", [1, 2, 3])
    def test_input_is_not_saved(self, device, spatial, transposed):
        conv = CONV[spatial, transposed]
        for i, geometry in enumerate(GEOMETRIES):
            model = frozen(conv(4, 6, **geometry), conv(6, 4, **geometry))
            x = torch.randn(2, 4, *[12 + i % 2] * spatial)
            saved, code = self.check(device, model, x)
            self.assertEqual(saved, 0)
            FileCheck().check_not(CALL).run(code)

    def test_bias_trains(self, device):
        model = frozen(nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(6, 4, 3, stride=2))
        for layer in model:
            layer.bias.requires_grad_()
        saved, code = self.check(device, model, torch.randn(2, 4, 12, 13))
        self.assertEqual(saved, 0)
        FileCheck().check_not(CALL).run(code)

    def test_bias_trains_of_the_first_layer(self, device):
        # x has no gradient, so that the layer has none but its bias'
        conv = nn.Conv2d(4, 6, 3).to(device)
        conv.weight.requires_grad_(False)
        x = torch.randn(2, 4, 9, 9, device=device)

        def step(fn):
            (grad,) = torch.autograd.grad(fn(x.sin()).square().sum(), [conv.bias])
            return grad

        expected = step(conv)
        actual, codes = run_and_get_code(lambda: step(torch.compile(conv)))
        self.assertEqual(actual, expected, rtol=1e-4, atol=1e-3)
        FileCheck().check_not(CALL).run(codes[-1])

    def test_masks_instead_of_inputs(self, device):
        # What is left of an adversarial attack's step: a byte per element of each ReLU
        layers = [nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)]
        model = frozen(*(m for conv in layers for m in (conv, nn.ReLU())))
        x = torch.randn(2, 8, 16, 16)
        saved, _ = self.check(device, model, x)
        self.assertEqual(saved, 4 * x.numel())

    def test_channels_last(self, device):
        model = frozen(nn.Conv2d(4, 6, 3, stride=2), nn.Conv2d(6, 4, 3))
        x = torch.randn(2, 4, 13, 13).to(memory_format=torch.channels_last)
        saved, _ = self.check(device, model.to(memory_format=torch.channels_last), x)
        self.assertEqual(saved, 0)

    def test_bfloat16(self, device):
        model = frozen(nn.Conv2d(4, 6, 3, stride=2), nn.Conv2d(6, 4, 3))
        x = torch.randn(2, 4, 13, 13)
        saved, _ = self.check(device, model, x, dtype=torch.bfloat16)
        self.assertEqual(saved, 0)

    def test_dynamic_sizes(self, device):
        # With stride 1 no rest of the input's size has to be known
        model = frozen(nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 3))
        saved, code = self.check(device, model, torch.randn(2, 4, 12, 13), dynamic=True)
        self.assertEqual(saved, 0)
        FileCheck().check_not(CALL).run(code)


class TestFrozenConvBackwardGuards(FrozenConvTestCase):
    def test_weight_trains(self, device):
        model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(6, 4, 3, stride=2))
        saved, code = self.check(device, model, torch.randn(2, 4, 12, 13))
        self.assertGreater(saved, 0)
        FileCheck().check_count(CALL, 2, exactly=True).run(code)

    def test_dynamic_sizes_with_stride(self, device):
        model = frozen(nn.Conv2d(4, 6, 3, stride=2), nn.ConvTranspose2d(6, 4, 3, stride=2))
        for size in (12, 13):
            self.check(device, model, torch.randn(2, 4, size, 13), dynamic=True)

    def test_output_padding_of_a_stride_or_more(self, device):
        # The plain conv of the gradient would be larger than the input
        layer = nn.ConvTranspose2d(4, 6, 3, dilation=3, output_padding=2)
        self.check(device, frozen(layer), torch.randn(2, 4, 5, 6))

    def test_depthwise(self, device):
        model = frozen(nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 8, 3, groups=8))
        self.check(device, model, torch.randn(2, 4, 12, 13))


for case in (TestFrozenConvBackward, TestFrozenConvBackwardGuards):
    instantiate_device_type_tests(case, globals(), only_for=DEVICES, allow_xpu=True)

if __name__ == "__main__":
    run_tests()
