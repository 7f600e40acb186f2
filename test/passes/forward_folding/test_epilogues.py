"""Activations and residuals that the folded layer's kernel computes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from common import Residual, spread_statistics
from passes.forward_folding.folding import assert_folded_right, compiled, folded, needs_onednn
from torch import Tensor, nn
from torch._dynamo.utils import counters

from convbn_inductor_pass._torch import inductor

pytestmark = needs_onednn

ACTIVATIONS = {
    "relu": nn.ReLU(),
    "hardtanh": nn.ReLU6(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
    "leaky_relu": nn.LeakyReLU(0.1),
    "gelu": nn.GELU(),
    "gelu ": nn.GELU("tanh"),
}


# oneDNN computes in bfloat16 on some CPUs only.
DTYPES = [d for d in (torch.float32, torch.bfloat16) if inductor.has_onednn_epilogues(d)]


class Branches(nn.Module):
    """A layer before each activation, half of them with a batch norm."""

    def __init__(self, activations: Iterable[Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.activations = list(activations)
        norms = ((nn.Identity(), nn.BatchNorm2d(8))[i % 2] for i in range(len(self.activations)))
        self.layers = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 8, 3), norm) for norm in norms)
        spread_statistics(self)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        pairs = zip(self.activations, self.layers, strict=True)
        return torch.stack([activation(layer(x)) for activation, layer in pairs])


def check_through_inductor(model: Branches, x: Tensor, expected: list[str], fused: int) -> None:
    """Records, the epilogues that are in oneDNN's kernels, and errors against float64."""
    counters.clear()
    out, records = compiled(model, x)
    assert [r.epilogue for r in records] == expected
    assert {r.kernel for r in records} == {"onednn"}
    assert counters["inductor"]["mkldnn_unary_fusion_matcher_count"] == fused
    with torch.no_grad():
        by_eval = model(x)
        exact = copy.deepcopy(model).double()(x.double())
    for mine, theirs, right in zip(out, by_eval, exact, strict=True):
        error, allowed = ((o.double() - right).abs().max() for o in (mine, theirs))
        assert error <= 2 * allowed + 4 * torch.finfo(x.dtype).eps * right.abs().max()


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(dtype, first):
    """In the folded layer's kernel, with a batch norm before them and without."""
    torch.manual_seed(0)
    names = [*ACTIVATIONS][::-1] if first else [*ACTIVATIONS]
    model = Branches(ACTIVATIONS[name] for name in names).to(dtype)
    x = torch.randn(2, 3, 9, 9).to(dtype) * 3
    check_through_inductor(model, x, [name.strip() for name in names], len(names))


def test_activations_written_out():
    """Inductor knows some of them: still right, in the kernel or not."""
    torch.manual_seed(0)
    written_out = (
        lambda y: y.clamp(min=0) * 2,
        lambda y: (y * 2) * torch.sigmoid(y * 2),
        lambda y: (z := y * 2) * F.relu6(z + 3) / 6,
        lambda y: (y * 2).clamp(-0.25, 1.5),
        lambda y: (y * 2).clamp(3.0, 1.0),  # the upper bound everywhere
        lambda y: F.relu6(y + 3) / 6,
    )
    model, x = Branches(written_out), torch.randn(2, 3, 6, 6)
    out, records = compiled(model, x)
    assert records
    torch.testing.assert_close(out, model(x), rtol=1e-5, atol=1e-5)
    assert (out[4] == 1).all()


def test_not_an_activation():
    """Other constants in an activation's form, and a value that something else uses, too."""
    conv = nn.Conv2d(3, 8, 3)
    for fn in (
        lambda x: (y := conv(x)) * (y + 4).clamp(0, 6) / 6,
        lambda x: (y := conv(x)).relu() + y,
        lambda x: F.softplus(conv(x)),
    ):
        _, records = folded(fn, torch.randn(1, 3, 5, 5))
        assert not records


def test_residual_and_shared_inputs():
    torch.manual_seed(0)
    records = assert_folded_right(Residual().eval(), torch.randn(2, 3, 8, 8), count=Residual.pairs)
    assert [r.epilogue for r in records] == ["relu", "relu", "add+relu", "relu", "add+relu", "relu"]


def test_no_epilogue_where_the_layers_own_operator_computes_it():
    """An activation after a linear layer stays a kernel of its own."""
    x = torch.randn(64, 8)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()).eval()
    _, (record,) = folded(model, x)
    assert (record.code.name, record.kernel, record.epilogue) == ("FOLDED", "aten", "")
    _, records = folded(nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval(), x)
    assert not records
