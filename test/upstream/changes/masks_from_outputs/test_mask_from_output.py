# Owner(s): ["module: inductor"]
"""Masks of activations' gradients, from the activation's output instead of its input."""

import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.test_case import TestCase, run_tests
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_utils import parametrize, subtest

DEVICES = ("cpu", "cuda", "xpu")
NAME = "mask_from_output"

ACTIVATIONS = [
    subtest((F.relu6, 2), name="relu6"),
    subtest((lambda x: F.relu6(x, inplace=True), 2), name="relu6_inplace"),
    subtest((F.hardtanh, 2), name="hardtanh"),
    subtest((lambda x: x.clamp(-0.5, 2), 2), name="clamp"),
    subtest((lambda x: x.clamp(min=0.25), 1), name="clamp_min"),
    subtest((lambda x: x.clamp(max=0.25), 1), name="clamp_max"),
    subtest((F.leaky_relu, 1), name="leaky_relu"),
    subtest((lambda x: F.leaky_relu(x, 0.2), 1), name="leaky_relu_slope"),
]

# What cannot be told from the output, or not surely
LEFT_ALONE = [
    subtest(lambda x: F.hardtanh(x, -0.1, 0.1), name="rounded_bounds"),
    subtest(lambda x: F.leaky_relu(x, -0.5), name="negative_slope"),
    subtest(lambda x: F.leaky_relu(x, 0.0), name="slope_0"),
    subtest(F.elu, name="elu"),
    subtest(F.hardsigmoid, name="hardsigmoid"),
    subtest(lambda x: x.clamp(1, 1), name="equal_bounds"),
]


def special_values(dtype):
    """Numbers around bounds and zero, infinities, NaN."""
    tiny = torch.finfo(dtype).smallest_normal
    numbers = [0.1, 0.25, 0.5, 1, 2, 3, 5.9, 6, 6.5, 1e4, float("inf"), tiny, tiny / 8, 0.0]
    values = torch.tensor([*numbers, *(-n for n in numbers), float("nan")], dtype=dtype)
    values = torch.cat([values, values * (1 + torch.finfo(dtype).eps)])
    return values.repeat(37)


class MaskTestCase(TestCase):
    def saved_masks(self, model, x, tolerance=None):
        """
        Bytes of masks that a compiled step saves for backward. Its gradients are those
        of eager.
        """
        saved = []

        def pack(tensor):
            if tensor.dtype == torch.bool:
                saved.append(tensor.nbytes)
            return tensor

        def step(fn):
            saved.clear()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                out = fn(x)
            return torch.autograd.grad(out.float().square().sum(), model.parameters())

        expected = step(model)
        torch._dynamo.reset()
        counters.clear()
        actual = step(torch.compile(model))
        tolerance = tolerance or (1e-3 if x.dtype == torch.float32 else 5e-2)
        for a, e in zip(actual, expected, strict=True):
            scale = e.abs().max().item()
            self.assertEqual(a, e, atol=tolerance * scale, rtol=tolerance)
        return sum(saved)

    def check(self, device, fn, dtype, comparisons, **tolerance):
        """Gradients are those of the decompositions, run one by one."""
        x = special_values(dtype).to(device).requires_grad_()
        # Products with powers of two are exact
        w = torch.exp2(torch.randint(-2, 3, x.shape)).to(x).requires_grad_()
        grad = torch.rand_like(x)

        def step(backend):
            torch._dynamo.reset()
            # w's gradient is y, so that y is there in backward
            out = torch.compile(lambda x, w: fn(x.clone()) * w, backend=backend)(x, w)
            return torch.autograd.grad(out, [x, w], grad)

        expected = step("aot_eager_decomp_partition")
        counters.clear()
        self.assertEqual(step("inductor"), expected, **tolerance)
        self.assertEqual(counters["inductor"][NAME], comparisons)


class Layers(nn.Sequential):
    """Layers with an activation between them, whose output the second one saves."""

    def __init__(self, activation, linear=False):
        kind = (lambda: nn.Linear(8, 8)) if linear else (lambda: nn.Conv2d(8, 8, 3))
        super().__init__(kind(), kind())
        self.activation = activation

    def forward(self, x):
        return self[1](self.activation(self[0](x)))


class TestMaskFromOutput(MaskTestCase):
    @parametrize("dtype", [torch.float32, torch.bfloat16])
    @parametrize("activation,comparisons", ACTIVATIONS)
    def test_no_mask_is_saved(self, device, activation, comparisons, dtype):
        model = Layers(activation).to(device, dtype)
        x = 4 * torch.randn(2, 8, 9, 9, device=device, dtype=dtype)
        self.assertEqual(self.saved_masks(model, x), 0)
        self.assertEqual(counters["inductor"][NAME], comparisons)

    def test_linear_layers(self, device):
        model = Layers(F.leaky_relu, linear=True).to(device)
        x = torch.randn(5, 6, 8, device=device)
        self.assertEqual(self.saved_masks(model, x), 0)
        self.assertEqual(counters["inductor"][NAME], 1)

    @parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @parametrize("activation,comparisons", ACTIVATIONS)
    def test_same_bits(self, device, activation, comparisons, dtype):
        self.check(device, activation, dtype, comparisons, rtol=0, atol=0)


class TestMaskFromOutputGuards(MaskTestCase):
    @parametrize("dtype", [torch.float32, torch.bfloat16])
    @parametrize("activation", LEFT_ALONE)
    def test_left_alone(self, device, activation, dtype):
        self.check(device, activation, dtype, comparisons=0)

    def test_output_is_not_saved(self, device):
        # Nothing but the mask needs y
        class Pooled(nn.Conv2d):
            def forward(self, x):
                return F.leaky_relu(super().forward(x)).mean((2, 3))

        model = Pooled(8, 8, 3).to(device)
        x = torch.randn(2, 8, 10, 10, device=device)
        self.assertGreater(self.saved_masks(model, x), 0)
        self.assertEqual(counters["inductor"][NAME], 0)

    def test_autocast(self, device):
        # y is float32, what the layer saves is not
        def activation(x):
            return F.relu6(x.float())

        model, x = Layers(activation).to(device), torch.randn(2, 8, 9, 9, device=device)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            self.saved_masks(model, x, tolerance=5e-2)

    def test_inference(self, device):
        model = Layers(F.relu6).to(device)
        counters.clear()
        with torch.no_grad():
            torch.compile(model)(torch.randn(2, 8, 9, 9, device=device))
        self.assertEqual(counters["inductor"][NAME], 0)


for case in (TestMaskFromOutput, TestMaskFromOutputGuards):
    instantiate_device_type_tests(case, globals(), only_for=DEVICES, allow_xpu=True)

if __name__ == "__main__":
    run_tests()
