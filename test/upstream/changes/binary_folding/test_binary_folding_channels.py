# Owner(s): ["module: inductor"]
"""Binary folding under freezing: which constants fold into which layers, and to what."""

import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.test_case import TestCase, run_tests
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_utils import parametrize, subtest

DEVICES = ("cpu", "cuda", "xpu")
OPS = [torch.add, torch.sub, torch.mul, torch.div]
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def batch_norm(spatial, channels):
    bn = BATCH_NORM[spatial](channels)
    for tensor in (bn.weight, bn.bias, bn.running_mean, bn.running_var):
        nn.init.uniform_(tensor, 0.5, 2.0)
    return bn


class Then(nn.Module):
    """Layers on the same input, and after each a binary op with a constant."""

    def __init__(self, layers, fns, shapes=()):
        super().__init__()
        self.layers, self.fns = nn.ModuleList(layers), fns
        self.constants = nn.ParameterList(torch.rand(shape) + 0.5 for shape in shapes)

    def forward(self, x):
        constants = [*self.constants, *[None] * (len(self.layers) - len(self.constants))]
        triples = zip(self.layers, self.fns, constants, strict=True)
        return [fn(layer(x), constant) for layer, fn, constant in triples]


class FoldingTestCase(TestCase):
    def check(self, device, model, x, folds, **options):
        """The frozen model gives what the eager one gives; ``folds`` steps were folded."""
        model, x = model.eval().to(device), x.to(device)
        counters.clear()
        with torch.no_grad(), config.patch(freezing=True, **options):
            actual = torch.compile(model)(x)
            expected = model(x)
        self.assertEqual(actual, expected, atol=1e-4, rtol=1e-4)
        self.assertEqual(counters["inductor"]["binary_folding"], folds)


class TestBinaryFoldingChannels(FoldingTestCase):
    @parametrize("spatial", [1, 2, 3])
    def test_transposed_conv(self, device, spatial):
        layers = [
            TRANSPOSED[spatial](4, 4, 3, stride=2, groups=groups, bias=bias)
            for groups in (1, 2, 4)
            for bias in (True, False)
        ]
        fns, shapes = [torch.mul] * 6, [(4, *[1] * spatial)] * 6
        x = torch.randn(2, 4, *[5] * spatial)
        self.check(device, Then(layers, fns, shapes), x, folds=6)

    @parametrize("groups", [1, 3])
    def test_transposed_conv_that_changes_channels(self, device, groups):
        layers = [nn.ConvTranspose2d(6, 9, 3, groups=groups) for _ in OPS]
        model = Then(layers, OPS, [(1, 9, 1, 1)] * 4)
        self.check(device, model, torch.randn(2, 6, 5, 5), folds=4)

    @parametrize("op", [torch.add, torch.sub])
    def test_one_value_after_transposed_conv(self, device, op):
        model = Then([nn.ConvTranspose2d(4, 6, 3, groups=2)], [op], [(1,)])
        self.check(device, model, torch.randn(2, 4, 5, 5), folds=1)

    @parametrize("out_channels", [4, 6])
    @parametrize("spatial", [1, 2, 3])
    def test_batch_norm_after_transposed_conv(self, device, spatial, out_channels):
        conv = TRANSPOSED[spatial](4, out_channels, 3, groups=2, bias=False)
        model = nn.Sequential(conv, batch_norm(spatial, out_channels))
        # A batch norm is a subtraction, two multiplications and an addition
        self.check(device, model, torch.randn(2, 4, *[5] * spatial), folds=4)

    @parametrize(
        "spatial,shape",
        [
            subtest((2, (1, 6)), name="columns"),
            subtest((3, (1, 6, 1)), name="rows"),
        ],
    )
    def test_constant_along_another_dim(self, device, spatial, shape):
        model = Then([CONV[spatial](4, 6, 1)], [torch.mul], [shape])
        self.check(device, model, torch.randn(2, 4, *[6] * spatial), folds=0)

    def test_constant_that_broadcasts_the_output(self, device):
        model = Then([nn.ConvTranspose2d(4, 1, 3)], [torch.mul], [(4, 1, 1)])
        self.check(device, model, torch.randn(2, 4, 5, 5), folds=0)

    @parametrize("op", [torch.add, torch.sub])
    def test_alpha(self, device, op):
        layers = [nn.Conv2d(4, 6, 3, bias=bias) for bias in (True, False)]
        fns = [lambda y, c: op(y, c, alpha=3)] * 2
        model = Then(layers, fns, [(6, 1, 1)] * 2)
        self.check(device, model, torch.randn(2, 4, 6, 6), folds=2)

    @parametrize("op", [torch.add, torch.mul])
    @parametrize("bias", [True, False])
    def test_two_scalars(self, device, bias, op):
        layers = [nn.Conv2d(4, 6, 3, bias=bias) for _ in range(2)]
        model = Then(layers, [lambda y, _: op(y, 2.0), lambda y, _: op(y, 3.0)])
        self.check(device, model, torch.randn(2, 4, 6, 6), folds=2)

    def test_scalar_is_not_rounded(self, device):
        conv = nn.Conv2d(1, 1, 1, bias=False, dtype=torch.bfloat16)
        nn.init.constant_(conv.weight, 192.0)
        # The scalar is 1 if rounded to bfloat16; 192 times it is 193
        model = Then([conv], [lambda y, _: y * (193 / 192)])
        x = torch.ones(1, 1, 2, 2, dtype=torch.bfloat16)
        self.check(device, model, x, folds=1)

    def test_linear_alpha(self, device):
        layers = [nn.Linear(4, 6, bias=bias) for bias in (True, False)]
        fns = [lambda y, c: torch.sub(y, c, alpha=2.0)] * 2
        model = Then(layers, fns, [(6,)] * 2)
        x = torch.randn(12, 4)
        self.check(device, model, x, folds=2, enable_linear_binary_folding=True)

    def test_linear_reshaped(self, device):
        model = Then([nn.Linear(4, 6)], [lambda y, c: y.reshape(72, 1) * c], [(6,)])
        x = torch.randn(12, 4)
        self.check(device, model, x, folds=0, enable_linear_binary_folding=True)


class TestBinaryFoldingGuards(FoldingTestCase):
    """What was right before."""

    @parametrize("bias", [True, False])
    def test_conv(self, device, bias):
        shapes = [(6, 1, 1), (1, 6, 1, 1), (1,), (1, 1, 1), ()] * 4
        layers = [nn.Conv2d(4, 6, 3, bias=bias) for _ in shapes]
        fns = [op for op in OPS for _ in range(5)]
        x = torch.randn(2, 4, 6, 6)
        self.check(device, Then(layers, fns, shapes), x, folds=20)

    def test_constant_along_the_length(self, device):
        model = Then([nn.Conv1d(4, 6, 1)], [torch.mul], [(6,)])
        self.check(device, model, torch.randn(2, 4, 6), folds=0)

    def test_batch_norm(self, device):
        model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), batch_norm(2, 6))
        self.check(device, model, torch.randn(2, 4, 6, 6), folds=4)

    @parametrize("spatial", [1, 3])
    def test_conv_of_other_ranks(self, device, spatial):
        shapes = [(1, 6, *[1] * spatial)] * 4
        layers = [CONV[spatial](4, 6, 3) for _ in OPS]
        x = torch.randn(2, 4, *[5] * spatial)
        self.check(device, Then(layers, OPS, shapes), x, folds=4)

    @parametrize("op", OPS)
    def test_scalar(self, device, op):
        model = Then([nn.Conv2d(4, 6, 3)], [lambda y, _: op(y, 2.0)])
        self.check(device, model, torch.randn(2, 4, 6, 6), folds=1)

    def test_constant_of_the_outputs_size(self, device):
        shapes = [(6, 1, 4), (1, 4), (6, 4, 4), (2, 1, 1, 1)]
        model = Then([nn.Conv2d(4, 6, 3) for _ in shapes], OPS, shapes)
        self.check(device, model, torch.randn(2, 4, 6, 6), folds=0)

    @parametrize("bias", [True, False])
    @parametrize("rows", [(12,), (3, 4)])
    def test_linear(self, device, rows, bias):
        folded = [(6,), (1, 6), (1,), (1, 1), (*(1 for _ in rows), 6)]
        shapes = [*folded, *folded, (*rows, 6), (rows[-1], 1)]
        fns = [torch.mul] * 5 + [torch.sub] * 7
        model = Then([nn.Linear(4, 6, bias=bias) for _ in shapes], fns, shapes)
        x = torch.randn(*rows, 4)
        self.check(device, model, x, folds=10, enable_linear_binary_folding=True)

    def test_dynamic_batch(self, device):
        layers = [nn.Conv2d(4, 6, 3) for _ in OPS]
        model = Then(layers, OPS, [(6, 1, 1)] * 4).eval().to(device)
        compiled = torch.compile(model, dynamic=True)
        with torch.no_grad(), config.patch(freezing=True):
            for batch in (2, 3):
                x = torch.randn(batch, 4, 6, 6, device=device)
                self.assertEqual(compiled(x), model(x), atol=1e-4, rtol=1e-4)


instantiate_device_type_tests(
    TestBinaryFoldingChannels, globals(), only_for=DEVICES, allow_xpu=True
)
instantiate_device_type_tests(TestBinaryFoldingGuards, globals(), only_for=DEVICES, allow_xpu=True)

if __name__ == "__main__":
    run_tests()
