"""Activations and residuals that the folded layer's kernel computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from common import Residual, spread_statistics
from passes.forward_folding.folding import assert_folded_right, folded, needs_onednn
from torch import nn

from convbn_inductor_pass._torch import inductor

pytestmark = needs_onednn

ACTIVATIONS = {
    "relu": nn.ReLU(),
    "hardtanh": nn.ReLU6(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "swish": nn.SiLU(),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
    "leaky_relu": nn.LeakyReLU(0.1),
    "gelu": nn.GELU(),
    "gelu ": nn.GELU("tanh"),
}


# oneDNN computes in bfloat16 on some CPUs only.
DTYPES = [d for d in (torch.float32, torch.bfloat16) if inductor.has_onednn_epilogues(d)]


@pytest.mark.parametrize("bn", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name, dtype, bn):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8) if bn else nn.Identity()
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, ACTIVATIONS[name])
    spread_statistics(model)
    model = model.eval().to(dtype)
    (record,) = assert_folded_right(model, torch.randn(2, 3, 9, 9).to(dtype) * 3, count=1)
    assert (record.epilogue, record.kernel) == (name.strip(), "onednn")


SPELLED = {
    "relu": lambda y: y.clamp(min=0),
    "swish": lambda y: y * torch.sigmoid(y),
    "hardswish": lambda y: y * F.relu6(y + 3) / 6,
    "hardsigmoid": lambda y: F.relu6(y + 3) / 6,
    "hardtanh": lambda y: y.clamp(-0.25, 1.5),
}


@pytest.mark.parametrize("name", SPELLED)
def test_activations_written_out(name):
    torch.manual_seed(0)
    x, w, s = torch.randn(2, 3, 6, 6), torch.randn(8, 3, 3, 3), torch.randn(8, 1, 1)
    fn = lambda x, w, s: SPELLED[name](F.conv2d(x, w) * s)  # noqa: E731
    out, (record,) = folded(fn, x, w, s)
    assert record.epilogue == name
    torch.testing.assert_close(out, fn(x, w, s), rtol=1e-5, atol=1e-5)


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


def test_clamp_with_bounds_the_wrong_way_round():
    """Gives the upper bound as written; oneDNN refuses it."""
    x, w = torch.randn(1, 3, 4, 4), torch.randn(4, 3, 1, 1)
    fn = lambda x, w: (F.conv2d(x, w) * 2).clamp(3.0, 1.0)  # noqa: E731
    out, (record,) = folded(fn, x, w)
    assert record.epilogue == ""
    assert (out == 1).all()


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
