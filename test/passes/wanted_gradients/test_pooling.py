"""Rule 3: the mask before max-pooling from what is pooled, to the bit."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from passes.wanted_gradients.wanted import check_bits
from torch import nn

from convbn_inductor_pass import Code, explain, options, testing
from convbn_inductor_pass._torch import version

MASKED = ("pooling", Code.MASK_AFTER_POOLING)
POOLS = {
    "1d": (nn.MaxPool1d(2), 1),
    "1d_overlapping": (nn.MaxPool1d(3, 2, 1), 1),
    "2d": (nn.MaxPool2d(2), 2),
    "2d_overlapping": (nn.MaxPool2d(3, 2, 1), 2),
    "2d_ceil": (nn.MaxPool2d(2, 2, ceil_mode=True), 2),
    "2d_dilated": (nn.MaxPool2d(2, 1, dilation=2), 2),
    "2d_stride_1": (nn.MaxPool2d((3, 2), 1), 2),
    "2d_large": (nn.MaxPool2d(7, 1, 3), 2),
    "2d_gaps": (nn.MaxPool2d(2, 3), 2),
    "3d": (nn.MaxPool3d(2), 3),
    "3d_overlapping": (nn.MaxPool3d(3, 2, 1), 3),
    "adaptive_1d": (nn.AdaptiveMaxPool1d(3), 1),
    "adaptive_2d": (nn.AdaptiveMaxPool2d((3, 1)), 2),
    "adaptive_2d_uneven": (nn.AdaptiveMaxPool2d(4), 2),
    "adaptive_3d": (nn.AdaptiveMaxPool3d(2), 3),
}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def of_pooling(compared):
    """Codes but those of shapes: on 2.11 pooling's backward takes what is pooled, for its shape."""
    return [(kind, code) for kind, code in compared.codes if kind != "shape"]


def network(name, activation=F.relu, channels=8):
    pool, rank = POOLS[name]
    conv = CONVS[rank](3, channels, 1)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pool = conv, pool

        def forward(self, x):
            return self.pool(activation(self.conv(x)))

    return Network()


def example(rank, **kwargs):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(2, 3, *[9, 7, 6][:rank], generator=generator, **kwargs)


@pytest.mark.parametrize("activation", [F.relu, F.relu6])
@pytest.mark.parametrize("name", POOLS)
def test_same_bits(name, activation):
    compared = check_bits(network(name, activation), example(POOLS[name][1]))
    assert MASKED in compared.codes


@pytest.mark.parametrize("name", ["2d", "2d_overlapping", "3d", "adaptive_2d"])
@pytest.mark.parametrize("activation", [F.relu, F.relu6])
def test_autocast(name, activation):
    compared = check_bits(network(name, activation), example(POOLS[name][1]), autocast=True)
    assert MASKED in compared.codes


@pytest.mark.parametrize("name", ["2d", "2d_overlapping", "1d", "3d"])
def test_channels_last_and_dynamic(name):
    x = example(POOLS[name][1])
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    assert MASKED in check_bits(network(name), x, dynamic=True).codes


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("activation", [F.relu, F.relu6])
def test_special_values(name, activation):
    """Ties, windows of zeros, of NaN, infinities, and bounds of the activation."""
    pool, rank = POOLS[name]
    values = torch.tensor([0.0, -0.0, -1.0, 1.0, 6.0, 7.0, math.inf, -math.inf, math.nan])
    generator = torch.Generator().manual_seed(0)
    pick = torch.randint(len(values) - 1, (2, 3, *[9, 7, 6][:rank]), generator=generator)
    few_nan = torch.rand(pick.shape, generator=generator) < 0.02
    z = torch.where(few_nan, values[-1], values[pick])
    z[0, 0] = 0.0  # all alike
    z[0, 1] = -1.0
    z = z.requires_grad_()
    compared = check_bits(lambda z: pool(activation(z.flip(0))), z)
    assert MASKED in compared.codes


def test_output_saved_anyway():
    """Another layer's weight gradient needs what is pooled: its mask costs nothing."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 2, 2)

        def forward(self, x):
            y = F.relu(self.first(x))
            return F.max_pool2d(y, 2) + self.second(y)

    compared = check_bits(Branches(), example(2))
    assert MASKED not in compared.codes
    assert all(result.before == result.after for result in compared.results)


def test_not_the_mask_of_what_is_pooled():
    def fn(x, w):
        y = F.relu(x * w)
        other = F.max_pool2d(torch.sigmoid(y), 2)  # between mask and pooling
        return F.max_pool2d(x * w, 2) + other

    x = example(2).requires_grad_()
    assert of_pooling(check_bits(fn, x, torch.ones(()))) == []


@pytest.mark.parametrize("activation", [F.leaky_relu, F.elu, F.silu])
def test_no_mask(activation):
    """The factor of a leaky ReLU does not go through a sum over windows to the bit."""
    compared = check_bits(network("2d_overlapping", activation), example(2))
    assert MASKED not in compared.codes


def test_indices_of_another_pooling():
    """A user's own scatter with indices that belong to a map of another size."""

    def fn(x, w):
        y = F.relu(x.flip(0) * w)
        p, i = F.max_pool2d(y, 2, return_indices=True)
        wide = F.pad(y, (0, 1, 0, 1))
        rows = torch.zeros(6, 80).scatter_add(1, i.view(6, -1), p.view(6, -1))
        return torch.where(wide <= 0, 0.0, rows.view(2, 3, 10, 8))

    # That of max-pooling's own backward may be rewritten, the user's mask not.
    compared = check_bits(fn, example(2).requires_grad_(), torch.ones(()))
    assert of_pooling(compared) == [MASKED]
    (result,) = compared.results
    (mask,) = re.findall(r"(\w+) = \S+le.Scalar\(constant_pad_nd, 0\)", result.after)
    assert f"where.self({mask}, scalar_tensor, view_2)" in result.after


def test_negative_zero():
    """A custom gradient that masks with -0: the rule would give +0 there."""

    class Masked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(y := F.relu(z))
            return y

        @staticmethod
        def backward(ctx, g):
            (y,) = ctx.saved_tensors
            return torch.where(y <= 0, -0.0, g)

    compared = check_bits(
        lambda z: F.max_pool2d(Masked.apply(z.flip(0)), 2), example(2).requires_grad_()
    )
    assert MASKED not in compared.codes
    gradient = compared.gradients["input0"]
    assert torch.equal(gradient.signbit(), compared.plain_gradients["input0"].signbit())
    assert (gradient.signbit() & (gradient == 0)).any()


@pytest.mark.parametrize("kind", ["rows", "dtype", "rank"])
def test_scatters_that_are_no_unpooling(kind):
    """Fewer rows of indices than of the map; a zero that promotes; a result that broadcasts."""

    def fn(x, w):
        y = F.relu(x.flip(0) * w)
        n = len(y)
        p, i = F.max_pool2d(y, 2, return_indices=True)
        rows = 2 * n if kind == "rows" else 4 * n
        source = (p * 2 + 1).view(rows, -1)
        out = torch.zeros(4 * n, 64).scatter_add(1, i.view(rows, -1), source)
        zero = torch.zeros(n, 4, 8, 8, dtype=torch.float64) if kind == "dtype" else 0.0
        return torch.where(y <= 0, zero, out.view(*([4, 8, 8] if kind == "rank" else y.shape)))

    x = torch.randn(1 if kind == "rank" else 2, 4, 8, 8, requires_grad=True)
    check_bits(fn, x, torch.ones(()))


def small_stems():
    conv = nn.Conv2d(3, 16, 3, padding=1)
    tail = (nn.ReLU(), nn.MaxPool2d(2))
    frozen = nn.Sequential(conv, nn.BatchNorm2d(16), *tail).eval()
    frozen[0].requires_grad_(False)
    yield "BN-tuning", frozen
    yield "group norm", nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), *tail)
    yield "batch statistics", nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), *tail)


@pytest.mark.parametrize(("name", "model"), small_stems())
@pytest.mark.parametrize("bits", [False, True])
def test_a_mask_that_can_be_recomputed_is_left(name, model, bits):
    """Backward has the norm's input: the mask of what is pooled would be saved beside it."""
    x = torch.randn(4, 3, 32, 32)
    with options(deny=("*",)):
        before = explain(model, x).saved["tune"].new_bytes
    with options(bit_masks=bits):
        after = explain(model, x)
    # On 2.11 pooling's backward takes what is pooled, for its shape.
    found = [r for r in after.records if r.kind not in ("batch norm", "shape")]
    assert after.saved["tune"].new_bytes <= before
    assert [r.code for r in after.records if r.kind == "pooling"] == [Code.SAVED_ANYWAY]
    assert sum(r.bytes_saved for r in found) == 0


def test_users_own_scatter():
    """The rule is for gradients alone."""

    def fn(x, w):
        y = F.relu(x * w)
        p, i = F.max_pool2d(y, 3, 1, return_indices=True)
        rows = torch.zeros(6, 63).scatter_add(1, i.view(6, -1), (p * 2).view(6, -1))
        return torch.where(y <= 0, 0.0, rows.view(2, 3, 9, 7))

    check_bits(fn, example(2).requires_grad_(), torch.ones(()))


def test_denied():
    with options(deny=("*",)):
        compared = check_bits(network("2d"), example(2))
    assert ("pooling", Code.DENIED) in compared.codes
    assert all(result.before == result.after for result in compared.results)


@pytest.mark.parametrize("returned", [False, True])
def test_saves_a_smaller_mask(returned):
    """None, where what is pooled is saved: Softplus needs it."""
    pool = network("2d")
    model = pool if returned else nn.Sequential(pool, nn.Softplus())
    x = torch.randn(4, 3, 32, 32)
    pooled = 4 * 8 * 16 * 16
    with options(deny=("*",)):
        before = explain(model, x).saved["tune"]
    with options(bit_masks=False):
        after = explain(model, x).saved["tune"]
    offsets = [t for t in after.tensors if t.dtype == "int8"]
    assert [t.nbytes for t in offsets] == [pooled]  # where each maximum was
    if version < "2.13":  # there all of what is pooled is saved without the rules
        assert before.new_bytes - after.new_bytes >= 15 * pooled
        return
    assert before.bytes_of("mask") == 4 * pooled
    assert after.bytes_of("mask") == (pooled if returned else 0)
    assert before.new_bytes - after.new_bytes == before.bytes_of("mask") - after.bytes_of("mask")


def test_real_inductor():
    model, x = network("2d_overlapping"), example(2)
    runs = []
    for flag in (True, False):
        with testing.fresh_compile(flag=flag):
            compiled = torch.compile(model)
            runs.append(
                testing.outputs_and_gradients(compiled, dict(model.named_parameters()), (x,))
            )
    torch.testing.assert_close(runs[0], runs[1])
