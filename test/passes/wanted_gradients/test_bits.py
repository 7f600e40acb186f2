"""Rule 4: masks are saved as bits, and are the same masks."""

import pytest
import torch
import torch.nn.functional as F
from common import fuzz
from hypothesis import given
from hypothesis import strategies as st
from passes.wanted_gradients.wanted import check_bits, codes, compare
from torch import nn

import convbn_inductor_pass as cbn
from convbn_inductor_pass import Code, options, testing
from convbn_inductor_pass._torch import registry
from convbn_inductor_pass.passes.wanted_gradients import MaskBitsPass
from convbn_inductor_pass.saved_tensors import saved_for_backward

AS_BITS = ("mask", Code.MASK_AS_BITS)


def relu_of_scaled(x, w):
    """Saves w and a mask: backward needs no other tensor."""
    return F.relu(x * w)


def inputs(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(len(shape))
    x = torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True)
    return x, torch.ones((), dtype=dtype)


def saved_masks(fn, *args, **kwargs):
    return [t for t in saved_for_backward(fn, *args, **kwargs).tensors if t.kind == "mask"]


@pytest.mark.parametrize(
    ("shape", "packed"),
    [
        ((4, 16, 12, 11), (4, 2, 12, 11)),  # channels
        ((4, 16, 24, 11), (4, 16, 3, 11)),  # rows, which lie further apart
        ((4, 16, 300), (4, 2, 300)),
        ((64, 128), (8, 128)),  # images
        ((65, 128), (65, 16)),
        ((2, 8, 7, 9, 11), (2, 1, 7, 9, 11)),
        ((8, 3, 20, 21), (1, 3, 20, 21)),  # images
        ((3, 5, 24, 25), (3, 5, 3, 25)),  # rows
        ((7, 6, 12, 16), (7, 6, 12, 2)),  # columns
        ((8000,), (1000,)),
    ],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_ranks(shape, packed, channels_last):
    x, w = inputs(*shape)
    if channels_last and len(shape) == 4:
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    check_bits(relu_of_scaled, x, w)
    (mask,) = saved_masks(relu_of_scaled, x, w)
    assert (mask.shape, mask.dtype, mask.nbytes) == (packed, "uint8", x.numel() // 8)
    assert codes(relu_of_scaled, x, w) == [AS_BITS]


@pytest.mark.parametrize(
    ("shape", "expected"), [((7, 9, 11, 13), Code.NOT_DIVISIBLE), ((2, 8, 8, 8), None)]
)
def test_left_as_bytes(shape, expected):
    """Where no dimension is a multiple of 8; and small masks, without a record."""
    x, w = inputs(*shape)
    check_bits(relu_of_scaled, x, w)
    (mask,) = saved_masks(relu_of_scaled, x, w)
    assert (mask.dtype, mask.nbytes) == ("bool", x.numel())
    assert codes(relu_of_scaled, x, w) == ([] if expected is None else [("mask", expected)])


def test_dynamic_shapes():
    """Channels are known, all other sizes are not."""
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    model.requires_grad_(False)
    x = torch.randn(5, 3, 17, 19, requires_grad=True)
    compared = compare(model, x, dynamic=True)
    torch.testing.assert_close(compared.gradients, compared.plain_gradients)
    assert AS_BITS in codes(model, x, dynamic=True)
    (mask,) = saved_masks(model, x, dynamic=True)
    assert (mask.shape[1], mask.nbytes) == (2, 5 * 16 * 17 * 19 // 8)


def test_not_where_it_can_be_recomputed():
    """A mask of what is saved anyway costs nothing."""
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    x = torch.randn(4, 3, 16, 16)
    assert saved_masks(model, x) == []
    assert codes(model, x) == []


def test_masks_in_memory_anyway():
    """Inputs and outputs of the graph."""
    x, w = inputs(4, 16, 16, 16)
    keep = torch.rand(x.shape) > 0.5

    def fn(x, w, keep):
        y = x * w
        positive = y > 0
        return torch.where(keep, y, 0.0), torch.where(positive, y, -y), positive

    check_bits(fn, x, w, keep)
    assert codes(fn, x, w, keep) == []


def test_several_masks_and_users():
    layer = nn.Conv2d(3, 16, 1).requires_grad_(False)

    def fn(x):
        y = layer(x)
        positive, large = y > 0, y.abs() > 0.3
        z = torch.where(positive, y, 0.0)
        return torch.where(large, y, 0.0) + torch.where(positive, z * 2, 0.0)

    x = torch.randn(4, 3, 16, 16, requires_grad=True)
    compared = compare(fn, x)
    torch.testing.assert_close(compared.gradients, compared.plain_gradients)
    assert codes(fn, x).count(AS_BITS) == 2


def test_dropout():
    """Any mask: of dropout, too."""

    def fn(x, w):
        return F.dropout(x * w, 0.3)

    x, w = inputs(64, 128)
    (mask,) = saved_masks(fn, x, w)
    assert mask.nbytes == x.numel() // 8


@pytest.mark.parametrize("off", ["option", "deny"])
def test_off(off):
    x, w = inputs(4, 16, 16, 16)
    settings = {"bit_masks": False} if off == "option" else {"deny": ("*",)}
    with options(**settings):
        check_bits(relu_of_scaled, x, w)
        assert codes(relu_of_scaled, x, w) == [("mask", Code.DENIED)]
        (mask,) = saved_masks(relu_of_scaled, x, w)
    assert mask.dtype == "bool"
    with pytest.raises(ValueError, match="bit_masks must be True or False, got 1"):
        cbn.set_options(bit_masks=1)


@fuzz(25)
@given(
    st.lists(st.sampled_from([1, 2, 3, 5, 8, 16, 24]), min_size=1, max_size=5),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_any_shape(sizes, transpose, dtype):
    sizes[0] *= -(-4096 // torch.Size(sizes).numel())
    x, w = inputs(*sizes, dtype=dtype)
    if transpose:
        x = x.detach().transpose(0, -1).requires_grad_()
    check_bits(relu_of_scaled, x, w)


class TestPartitioner:
    """Others' partitioners go on, and ours does nothing without the flag."""

    class Theirs(registry.CustomPartitionerFn):
        def __init__(self):
            self.calls = 0

        def __call__(self, gm, joint_inputs, **kwargs):
            from torch._functorch.partitioners import min_cut_rematerialization_partition

            self.calls += 1
            return min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)

        def uuid(self):
            return "theirs"

    def bits(self, **settings):
        x, w = inputs(4, 16, 16, 16)
        cbn.clear_records()
        with testing.fresh_compile(**settings):
            torch.compile(relu_of_scaled, backend=testing.post_grad_backend())(
                x, w
            ).sum().backward()
        found = [(r.kind, r.code) for r in cbn.records() if r.kind == "mask"]
        cbn.clear_records()
        return found

    def test_flag(self):
        assert self.bits() == [AS_BITS]
        assert self.bits(flag=False) == []

    def test_after_theirs(self):
        theirs = self.Theirs()
        with registry.hooks_restored({registry.PARTITIONER}):
            cbn.uninstall()
            registry.config.custom_partitioner_fn = theirs
            cbn.install()
            try:
                assert self.bits() == [AS_BITS]
                assert theirs.calls == 1
                assert "theirs" in str(registry.config.custom_partitioner_fn.uuid())
            finally:
                cbn.uninstall()
            assert registry.config.custom_partitioner_fn is theirs
        cbn.install()

    def test_a_failure_leaves_the_compilation(self, monkeypatch):
        def fail(*graphs):
            raise RuntimeError("broken")

        monkeypatch.setattr(MaskBitsPass, "run", fail)
        with pytest.warns(cbn.PassFailedWarning, match="mask_bits failed"):
            assert self.bits() == []


def test_real_inductor():
    """Bits, and bytes as autograd is given them."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU())
    model.requires_grad_(False)
    x = torch.randn(2, 3, 20, 20, requires_grad=True)
    runs, saved = [], []
    for flag in (True, False):
        given_bytes = {}

        def pack(tensor, seen=given_bytes):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with testing.fresh_compile(flag=flag):
            compiled = torch.compile(model)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                runs.append(testing.outputs_and_gradients(compiled, {}, (x,)))
        saved.append(given_bytes)
    torch.testing.assert_close(runs[0], runs[1])
    assert 2 * 16 * 18 * 18 // 8 in saved[0].values()
