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

# With the number of comparisons that their gradient makes
ACTIVATIONS = {
    "relu6": (F.relu6, 2),
    "relu6_inplace": (lambda x: F.relu6(x.clone(), inplace=True), 2),
    "hardtanh": (F.hardtanh, 2),
    "clamp": (lambda x: x.clamp(-0.5, 2), 2),
    "clamp_min": (lambda x: x.clamp(min=0.25), 1),
    "clamp_max": (lambda x: x.clamp(max=0.25), 1),
    "leaky_relu": (F.leaky_relu, 1),
    "leaky_relu_slope": (lambda x: F.leaky_relu(x, 0.25), 1),
}
PARAMS = [subtest(params, name=name) for name, params in ACTIVATIONS.items()]

# What cannot be told from the output, or not surely
LEFT_ALONE = [
    lambda x: F.hardtanh(x, -0.1, 0.1),  # rounded bounds
    lambda x: x.clamp(1, 1),
    lambda x: F.leaky_relu(x, -0.5),
    lambda x: F.leaky_relu(x, 0.0),
    F.elu,
    F.hardsigmoid,
]


def special_values(dtype):
    """Numbers around bounds and zero, infinities, NaN."""
    tiny = torch.finfo(dtype).smallest_normal
    numbers = [0.1, 0.25, 0.5, 1, 2, 3, 5.9, 6, 6.5, 1e4, float("inf"), tiny, tiny / 8, 0.0]
    values = torch.tensor([*numbers, *(-n for n in numbers), float("nan")], dtype=dtype)
    values = torch.cat([values, values * (1 + torch.finfo(dtype).eps)])
    return values.repeat(37)


class Layers(nn.Sequential):
    """Layers with an activation between them, whose output the second one saves."""

    def __init__(self, activation, layer):
        super().__init__(layer(), layer())
        self.activation = activation

    def forward(self, x):
        return self[1](self.activation(self[0](x)))


def conv():
    return nn.Conv2d(8, 8, 3)


class MaskTestCase(TestCase):
    def saved_masks(self, model, x, tolerance):
        """Bytes of masks that a step saves for backward. Its gradients are eager's."""
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
        for a, e in zip(actual, expected, strict=True):
            self.assertEqual(a, e, atol=tolerance * e.abs().max().item(), rtol=tolerance)
        return sum(saved)

    def check(self, device, fns, dtype, comparisons, **tolerance):
        """Gradients of inputs are those of the decompositions, run one by one."""
        x = special_values(dtype).to(device).requires_grad_()
        # Products with powers of two are exact
        ws = [torch.exp2(torch.randint(-2, 3, x.shape)).to(x).requires_grad_() for _ in fns]
        grads = [torch.rand_like(x) for _ in fns]

        def products(xs, ws):
            # w's gradient is y, so that y is there in backward
            return [fn(x) * w for fn, x, w in zip(fns, xs, ws, strict=True)]

        def step(backend):
            torch._dynamo.reset()
            xs = [x.detach().clone().requires_grad_() for _ in fns]
            outs = torch.compile(products, backend=backend)(xs, ws)
            return torch.autograd.grad(outs, xs, grads)

        expected = step("aot_eager_decomp_partition")
        counters.clear()
        self.assertEqual(step("inductor"), expected, **tolerance)
        self.assertEqual(counters["inductor"][NAME], comparisons)


class TestMaskFromOutput(MaskTestCase):
    @parametrize("activation,comparisons", PARAMS)
    def test_no_mask_is_saved(self, device, activation, comparisons):
        model = Layers(activation, conv).to(device)
        x = 4 * torch.randn(2, 8, 9, 9, device=device)
        self.assertEqual(self.saved_masks(model, x, 1e-3), 0)
        self.assertEqual(counters["inductor"][NAME], comparisons)

    def test_bfloat16(self, device):
        model = Layers(F.relu6, conv).to(device, torch.bfloat16)
        x = torch.randn(2, 8, 9, 9, device=device, dtype=torch.bfloat16)
        self.assertEqual(self.saved_masks(model, x, 5e-2), 0)
        self.assertEqual(counters["inductor"][NAME], 2)

    def test_linear_layers(self, device):
        model = Layers(F.leaky_relu, lambda: nn.Linear(8, 8)).to(device)
        x = torch.randn(30, 8, device=device)
        self.assertEqual(self.saved_masks(model, x, 1e-3), 0)
        self.assertEqual(counters["inductor"][NAME], 1)

    @parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_same_bits(self, device, dtype):
        fns, comparisons = zip(*ACTIVATIONS.values(), strict=True)
        self.check(device, fns, dtype, sum(comparisons), rtol=0, atol=0)


class TestMaskFromOutputGuards(MaskTestCase):
    @parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_left_alone(self, device, dtype):
        self.check(device, LEFT_ALONE, dtype, comparisons=0)

    def test_output_is_not_saved(self, device):
        # Nothing but the mask needs y
        class Pooled(nn.Conv2d):
            def forward(self, x):
                return F.leaky_relu(super().forward(x)).mean((2, 3))

        model = Pooled(8, 8, 3).to(device)
        x = torch.randn(2, 8, 10, 10, device=device)
        self.assertGreater(self.saved_masks(model, x, 1e-3), 0)
        self.assertEqual(counters["inductor"][NAME], 0)

    def test_view_is_saved(self, device):
        # Backward has y in another shape alone
        model = Layers(F.leaky_relu, lambda: nn.Linear(8, 8)).to(device)
        self.saved_masks(model, torch.randn(5, 6, 8, device=device), 1e-3)
        self.assertEqual(counters["inductor"][NAME], 0)

    def test_autocast(self, device):
        # y is float32, what the layer saves is not
        model = Layers(lambda x: F.relu6(x.float()), conv).to(device)
        x = torch.randn(2, 8, 9, 9, device=device)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            self.saved_masks(model, x, 5e-2)

    def test_inference(self, device):
        model = Layers(F.relu6, conv).to(device)
        counters.clear()
        with torch.no_grad():
            torch.compile(model)(torch.randn(2, 8, 9, 9, device=device))
        self.assertEqual(counters["inductor"][NAME], 0)


for case in (TestMaskFromOutput, TestMaskFromOutputGuards):
    instantiate_device_type_tests(case, globals(), only_for=DEVICES, allow_xpu=True)

if __name__ == "__main__":
    run_tests()
