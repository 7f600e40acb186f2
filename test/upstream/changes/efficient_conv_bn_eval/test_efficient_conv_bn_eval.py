# Owner(s): ["module: inductor"]
"""
The pass changes gradients' arithmetic alone: each test compares a training step that was
compiled with it to one compiled without (bits of the output), and to float64 in eager
mode (gradients, whose error may not be larger than without it).
"""

import copy
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.test_case import run_tests, TestCase
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_utils import parametrize, subtest


LAYERS = {
    "linear": (lambda: nn.Linear(6, 8), nn.BatchNorm1d, (5, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3), nn.BatchNorm1d, (2, 6, 7)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d, (2, 6, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(6, 8, 2), nn.BatchNorm3d, (2, 6, 4, 4, 4)),
    "no_bias": (lambda: nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d, (2, 6, 7, 7)),
    "grouped": (
        lambda: nn.Conv2d(6, 8, 3, padding=1, dilation=2, groups=2),
        nn.BatchNorm2d,
        (2, 6, 7, 7),
    ),
    "depthwise": (
        lambda: nn.Conv2d(8, 8, 3, groups=8, bias=False),
        nn.SyncBatchNorm,
        (2, 8, 7, 7),
    ),
    "transposed2d": (
        lambda: nn.ConvTranspose2d(6, 8, 3, stride=2, output_padding=1),
        nn.BatchNorm2d,
        (2, 6, 7, 7),
    ),
    "transposed3d": (
        lambda: nn.ConvTranspose3d(6, 8, 2),
        nn.BatchNorm3d,
        (2, 6, 4, 4, 4),
    ),
    "grouped_transposed": (
        lambda: nn.ConvTranspose2d(6, 8, 3, groups=2),
        nn.BatchNorm2d,
        (2, 6, 7, 7),
    ),
}


class Pair(nn.Module):
    """A layer and a batch norm with statistics as after training."""

    def __init__(self, layer=None, norm=None):
        super().__init__()
        self.layer = layer or nn.Conv2d(6, 8, 3)
        self.norm = norm or nn.BatchNorm2d(8)
        settle(self.norm)

    def forward(self, x):
        return self.norm(self.layer(x))


def settle(norm):
    nn.init.uniform_(norm.running_mean, -1, 1)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    if norm.affine:
        nn.init.uniform_(norm.weight, -1.5, 1.5)
        nn.init.uniform_(norm.bias, -1, 1)


class Step(NamedTuple):
    output: torch.Tensor
    grads: dict  # by the parameter's name; "x" is the input
    fused: int
    saved: list  # shape and bytes of each tensor that only backward needs

    @property
    def saved_bytes(self):
        return sum(n for _, n in self.saved)


def step(model, x, *, flag=None, autocast=None, dynamic=False):
    """One training step, compiled with the flag as given; in eager mode if it is None."""
    torch._dynamo.reset()
    counters.clear()
    model, x = copy.deepcopy(model), x.detach().clone().requires_grad_()
    saved = []
    known = {t.untyped_storage().data_ptr() for t in (x, *model.state_dict().values())}
    run = model
    if flag is not None:
        run = torch.compile(model, fullgraph=True, dynamic=dynamic)
    with (
        # Without copies of inputs and weights in another layout, which are saved, too.
        config.patch(
            efficient_conv_bn_eval_fx_passes=bool(flag), layout_optimization=False
        ),
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t) or t, lambda t: t
        ),
        torch.autocast(x.device.type, autocast, enabled=autocast is not None),
    ):
        output = run(x)
    known.add(output.untyped_storage().data_ptr())
    new = [t for t in saved if t.untyped_storage().data_ptr() not in known]
    (output if output.dtype == torch.float64 else output.float()).sin().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    return Step(
        output,
        {"x": x.grad, **{n: g for n, g in grads.items() if g is not None}},
        counters["inductor"]["efficient_conv_bn_eval"],
        [(tuple(t.shape), t.numel() * t.element_size()) for t in new],
    )


class Base(TestCase):
    def setUp(self):
        super().setUp()
        torch.manual_seed(0)

    def check(self, model, x, fused=1, *, autocast=None, dynamic=False):
        """That so many are fused, and that nobody notices but for the memory."""
        model = model.eval()
        options = {"autocast": autocast, "dynamic": dynamic}
        with_pass = step(model, x, flag=True, **options)
        self.assertEqual(with_pass.fused, fused)
        if fused and autocast is None:  # which makes copies of weights
            weights = {tuple(p.shape) for p in model.parameters() if p.ndim > 1}
            self.assertEqual([s for s, _ in with_pass.saved if s in weights], [])
        without = step(model, x, flag=False, **options)
        exact = step(copy.deepcopy(model).double(), x.double())
        self.assertTrue(torch.equal(with_pass.output, without.output))
        self.assertEqual(with_pass.output.stride(), without.output.stride())
        self.assertEqual(with_pass.grads.keys(), exact.grads.keys())
        for name, grad in with_pass.grads.items():
            plain = without.grads[name]
            self.assertEqual((grad.dtype, grad.shape), (plain.dtype, plain.shape))
            wide = torch.promote_types(autocast or x.dtype, plain.dtype)
            rounding = torch.finfo(autocast or wide).eps * exact.grads[name].abs().max()
            error, before = (
                (g.double() - exact.grads[name]).abs().max() for g in (grad, plain)
            )
            self.assertLessEqual(error, 2 * before + 4 * rounding, name)
            if not fused:
                self.assertTrue(torch.equal(grad, plain), name)
        if fused:
            self.assertLess(with_pass.saved_bytes, without.saved_bytes)
        else:
            self.assertEqual(with_pass.saved, without.saved)
        return with_pass


class EfficientConvBNEvalTest(Base):
    @parametrize("name", [subtest(n, name=n) for n in LAYERS])
    def test_layer(self, device, name):
        layer, norm, shape = LAYERS[name]
        x = torch.randn(shape, device=device)
        found = self.check(Pair(layer(), norm(8)).to(device), x)
        self.assertEqual(found.saved, [])

    def test_network(self, device):
        model = nn.Sequential(
            *(Pair(nn.Conv2d(6, 8, 3)), nn.ReLU()),
            *(Pair(nn.Conv2d(8, 8, 3, padding=1)), nn.ReLU6()),
            *(Pair(nn.Conv2d(8, 8, 1)), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            *(Pair(nn.Linear(8, 8), nn.BatchNorm1d(8)), nn.Tanh()),
        ).to(device)
        found = self.check(model, torch.randn(2, 6, 7, 7, device=device), fused=4)
        # The inputs of layers two and three, and a mask; of the layers' outputs none.
        activation = 2 * 8 * 5 * 5
        large = sum(n for s, n in found.saved if s[-2:] == (5, 5))
        self.assertLessEqual(large, activation * (2 * 4 + 1))

    def test_no_activation_between(self, device):
        # The gradient of the first batch norm is a result of the second rewrite.
        model = nn.Sequential(
            Pair(), Pair(nn.Conv2d(8, 8, 3)), nn.Flatten(), nn.Linear(72, 6)
        )
        model.append(Pair(nn.Linear(6, 8), nn.BatchNorm1d(8)))
        model.append(Pair(nn.Linear(8, 8), nn.BatchNorm1d(8)))
        self.check(model.to(device), torch.randn(2, 6, 7, 7, device=device), fused=4)

    def test_autocast(self, device):
        x = torch.randn(2, 6, 7, 7, device=device)
        self.check(Pair().to(device), x, autocast=torch.bfloat16)

    def test_bfloat16_layer_before_float32_norm(self, device):
        model = Pair(nn.Conv2d(6, 8, 3).bfloat16()).to(device)
        x = torch.randn(2, 6, 7, 7, device=device, dtype=torch.bfloat16)
        self.check(model, x)

    def test_float64(self, device):
        x = torch.randn(2, 6, 7, 7, device=device, dtype=torch.float64)
        self.check(Pair().double().to(device), x)

    def test_dynamic_shapes(self, device):
        x = torch.randn(3, 6, 7, 7, device=device)
        self.check(Pair().to(device), x, dynamic=True)

    def test_channels_last(self, device):
        model = Pair().to(device, memory_format=torch.channels_last)
        x = torch.randn(2, 6, 7, 7, device=device)
        self.check(model, x.contiguous(memory_format=torch.channels_last))

    def test_shared_layer(self, device):
        class Twice(Pair):
            def __init__(self):
                super().__init__(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6))
                self.other = nn.BatchNorm2d(6)
                settle(self.other)

            def forward(self, x):
                return self.other(self.layer(self.norm(self.layer(x)).relu()))

        self.check(Twice().to(device), torch.randn(2, 6, 7, 7, device=device), fused=2)

    def test_view_between(self, device):
        class Tokens(Pair):
            def forward(self, x):
                y = self.layer(x)
                return self.norm(y.flatten(0, 1)).view_as(y)

        model = Tokens(nn.Linear(6, 8), nn.BatchNorm1d(8)).to(device)
        self.check(model, torch.randn(2, 5, 6, device=device))

    def test_sum_of_two_layers(self, device):
        # Two layers share the input; the second one's gradient is another layer's, too.
        class Sum(nn.Module):
            def __init__(self):
                super().__init__()
                self.first = Pair(nn.Linear(6, 8), nn.BatchNorm1d(8))
                self.second = Pair(nn.Linear(6, 8), nn.BatchNorm1d(8))
                self.third = nn.Linear(4, 8)

            def forward(self, x):
                c = self.second.layer(x) + self.third(x[:, :4])
                return self.first(x) + self.second.norm(c)

        self.check(Sum().to(device), torch.randn(5, 6, device=device))

    @parametrize("dynamic", [False, True])
    def test_sum_with_a_multiple_of_another_layer(self, device, dynamic):
        # The gradient of that layer is a multiple of the batch norm's, too.
        class Sum(Pair):
            def __init__(self):
                super().__init__(nn.Linear(6, 8), nn.BatchNorm1d(8))
                self.other = nn.Linear(6, 8)

            def forward(self, x):
                return super().forward(x) + self.other(x) * x.shape[0]

        x = torch.randn(5, 6, device=device)
        self.check(Sum().to(device), x, dynamic=dynamic)

    def test_zero_gamma(self, device):
        model = Pair().to(device)
        nn.init.zeros_(model.norm.weight)
        self.check(model, torch.randn(2, 6, 7, 7, device=device))

    def test_keyword_arguments(self, device):
        # https://github.com/pytorch/pytorch/issues/196165
        class Keywords(Pair):
            def forward(self, x):
                layer, norm = self.layer, self.norm
                c = F.conv2d(x, layer.weight, bias=layer.bias, stride=2, padding=1)
                return F.batch_norm(
                    c,
                    norm.running_mean,
                    norm.running_var,
                    bias=norm.bias,
                    weight=norm.weight,
                    eps=1e-3,
                )

        self.check(Keywords().to(device), torch.randn(2, 6, 7, 7, device=device))

    def test_no_grad_layer_gets_no_gradient(self, device):
        class NoGrad(Pair):
            def forward(self, x):
                with torch.no_grad():
                    c = self.layer(x)
                return self.norm(c) + x.mean()

        x = torch.randn(2, 6, 7, 7, device=device)
        found = self.check(NoGrad().to(device), x, fused=0)
        self.assertNotIn("layer.weight", found.grads)

    def test_statistics_written_before(self, device):
        # https://github.com/pytorch/pytorch/issues/121184
        class Resets(Pair):
            def forward(self, x):
                c = self.layer(x)
                self.norm.running_mean.zero_()
                self.norm.running_var.fill_(1)
                return self.norm(c)

        self.check(Resets().to(device), torch.randn(2, 6, 7, 7, device=device))


class EfficientConvBNEvalRefusalTest(Base):
    """Left as they are: with the flag the code is the same as without."""

    def test_inference(self, device):
        model, x = Pair().to(device).eval(), torch.randn(2, 6, 7, 7, device=device)
        outputs = []
        for flag in (True, False):
            torch._dynamo.reset()
            counters.clear()
            with torch.no_grad(), config.patch(efficient_conv_bn_eval_fx_passes=flag):
                outputs.append(torch.compile(model)(x))
            self.assertEqual(counters["inductor"]["efficient_conv_bn_eval"], 0)
        self.assertTrue(torch.equal(*outputs))

    def test_frozen_layer(self, device):
        model = Pair().to(device)
        model.layer.requires_grad_(False)
        self.check(model, torch.randn(2, 6, 7, 7, device=device), fused=0)

    def test_frozen_norm(self, device):
        # The layer's output is not saved to begin with.
        model = Pair().to(device)
        model.norm.requires_grad_(False)
        self.check(model, torch.randn(2, 6, 7, 7, device=device), fused=0)

    def test_float16(self, device):
        x = torch.randn(2, 6, 7, 7, device=device)
        with_pass = step(Pair().to(device).eval(), x, flag=True, autocast=torch.float16)
        self.assertEqual(with_pass.fused, 0)

    def test_saved_anyway(self, device):
        model = nn.Sequential(Pair(), nn.SiLU()).to(device)
        self.check(model, torch.randn(2, 6, 7, 7, device=device), fused=0)

    def test_computed_weight(self, device):
        class Standardized(Pair):
            def forward(self, x):
                weight = self.layer.weight
                weight = weight - weight.mean((1, 2, 3), keepdim=True)
                return self.norm(F.conv2d(x, weight))

        self.check(
            Standardized().to(device), torch.randn(2, 6, 7, 7, device=device), fused=0
        )

    def test_symbolic_stride(self, device):
        class Strided(Pair):
            def forward(self, x):
                stride = x.shape[-1] // 3
                c = F.conv2d(x, self.layer.weight, self.layer.bias, stride=stride)
                return self.norm(c)

        x = torch.randn(3, 6, 7, 7, device=device)
        self.check(Strided().to(device), x, fused=0, dynamic=True)

    def test_bias_written_after(self, device):
        class Writes(Pair):
            def __init__(self):
                super().__init__()
                self.register_buffer("shift", torch.randn(8))

            def forward(self, x):
                y = self.norm(F.conv2d(x, self.layer.weight, self.shift))
                self.shift.zero_()
                return y

        self.check(Writes().to(device), torch.randn(2, 6, 7, 7, device=device), fused=0)


class EfficientConvBNEvalGuards(Base):
    """What was right before, too."""

    def test_train_mode(self, device):
        model, x = Pair().to(device).train(), torch.randn(2, 6, 7, 7, device=device)
        self.assertEqual(step(model, x, flag=True).fused, 0)

    def test_output_used_elsewhere(self, device):
        class Residual(Pair):
            def forward(self, x):
                c = self.layer(x)
                return self.norm(c) + c.sigmoid()

        x = torch.randn(2, 6, 7, 7, device=device)
        self.check(Residual().to(device), x, fused=0)

    def test_permutation_between(self, device):
        class Tokens(Pair):
            def forward(self, x):
                return self.norm(self.layer(x).transpose(1, 2))

        model = Tokens(nn.Linear(6, 8), nn.BatchNorm1d(8)).to(device)
        self.check(model, torch.randn(2, 5, 6, device=device), fused=0)

    def test_disabled_by_name(self, device):
        model, x = Pair().to(device).eval(), torch.randn(2, 6, 7, 7, device=device)
        with config.patch(disabled_passes="efficient_conv_bn_eval_pass"):
            self.assertEqual(step(model, x, flag=True).fused, 0)

    def test_weights_of_each_step(self, device):
        model = Pair().to(device).eval()
        reference = copy.deepcopy(model)
        torch._dynamo.reset()
        x = torch.randn(2, 6, 7, 7, device=device)
        counters.clear()
        with config.patch(efficient_conv_bn_eval_fx_passes=True):
            compiled = torch.compile(model)
            for _ in range(3):
                for m, run in ((model, compiled), (reference, reference)):
                    optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
                    run(x).sin().mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()
            self.assertEqual(compiled(x), reference(x))
        self.assertEqual(list(model.parameters()), list(reference.parameters()))
        self.assertEqual(counters["inductor"]["efficient_conv_bn_eval"], 1)

    def test_weights_change_between_evaluations(self, device):
        # https://github.com/pytorch/pytorch/issues/108863
        model, x = Pair().to(device).eval(), torch.randn(2, 6, 7, 7, device=device)
        torch._dynamo.reset()
        with config.patch(efficient_conv_bn_eval_fx_passes=True), torch.no_grad():
            compiled = torch.compile(model)
            for _ in range(2):
                self.assertEqual(compiled(x), model(x))
                for parameter in model.parameters():
                    parameter.mul_(1.5)


for case in (
    EfficientConvBNEvalTest,
    EfficientConvBNEvalRefusalTest,
    EfficientConvBNEvalGuards,
):
    instantiate_device_type_tests(
        case, globals(), only_for=("cpu", "cuda", "xpu"), allow_xpu=True
    )

if __name__ == "__main__":
    run_tests()
