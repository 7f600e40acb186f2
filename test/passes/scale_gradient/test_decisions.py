"""Every code can be had, refusals change nothing, and options decide what is wanted."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import ConvBN, Residual
from joint_graphs import PassResult, run_pass
from programs import (
    PARAMETERS,
    arguments,
    bf16,
    bn,
    carried,
    check_model,
    conv_bn,
    written_function,
)
from torch import nn

from convbn_inductor_pass import Code, options
from convbn_inductor_pass.passes import scale_gradient


def traced(fn: Callable[..., Any] = conv_bn, **kwargs: Any) -> PassResult:
    return run_pass(fn, *arguments(**kwargs)().values())[-1]


def denied() -> PassResult:
    with options(deny=("*",)):
        return traced()


def speed() -> PassResult:
    with options(objective="speed"):
        return traced(x=(1, 3, 3, 3))


def autocast() -> PassResult:
    with bf16():
        return traced(lambda *args: F.silu(conv_bn(*args)), grad=("x",))


def trains(x, w, b, g, beta, m, v):
    return F.batch_norm(F.conv2d(x, w, b), m, v, g, beta, training=True)


def in_a_body(x, *rest):
    return torch.cond(x.sum() > 0, lambda x: conv_bn(x, *rest), lambda x: x * 2, (x,))


CASES: dict[Code, Callable[[], PassResult]] = {
    Code.FUSED: traced,
    Code.WEIGHT_COPY: autocast,
    Code.NOT_AFTER_LAYER: lambda: traced(lambda x, w, b, *r: bn(F.conv2d(x, w, b).relu(), *r)),
    Code.LAYER_IN_ANOTHER_GRAPH: lambda: traced(lambda x, w, b, *r: bn(x, *r), x=(2, 4, 6, 6)),
    Code.INSIDE_HIGHER_ORDER_OP: lambda: run_pass(in_a_body, *carried()().values())[-1],
    Code.BATCH_STATISTICS: lambda: traced(trains),
    Code.NO_GRAD: lambda: traced(frozen=PARAMETERS),
    Code.AFFINE_FROZEN: lambda: traced(frozen=("g",)),
    Code.OTHER_GRADIENT: lambda: traced(lambda x, w, b, *r: bn(c := F.conv2d(x, w, b), *r) + c),
    Code.UNSUPPORTED_DTYPE: lambda: traced(
        lambda x, w, b, *r: bn(F.conv2d(x, w, b).double(), *r).float()
    ),
    Code.UNBATCHED: lambda: traced(x=(3, 6, 6)),
    Code.CONSTANT_RANGE: lambda: traced(
        lambda x, w, b, g, *r: F.conv2d(x, w, b) * 1e-20 * 1e-20 * g[:, None, None]
    ),
    Code.INPUT_MUTATED: lambda: traced(written_function("v.mul_(2)", "between")),
    Code.SAVED_ANYWAY: lambda: traced(lambda *args: F.silu(conv_bn(*args))),
    Code.WEIGHT_COMPUTED: lambda: traced(
        lambda x, w, *r: conv_bn(x, w * 2, *r), x=(1, 3, 3, 3), w=(4, 3, 3, 3)
    ),
    Code.LAYER_FROZEN: lambda: traced(frozen=("w",)),
    Code.LARGE_WEIGHT: speed,
    Code.DENIED: denied,
}


@pytest.mark.parametrize("code", CASES, ids=lambda code: code.name)
def test_code(code):
    result = CASES[code]()
    assert (result.codes or [r.code for r in result.records]) == [code]
    assert (result.before != result.after) == any(r.code.rewritten for r in result.records)


def test_no_code_without_a_case():
    """The codes that the sources of this pass name are those above."""
    folder = pathlib.Path(scale_gradient.__file__).parent
    sources = "".join(path.read_text() for path in folder.glob("*.py"))
    assert set(re.findall(r"\bCode\.([A-Z0-9_]+)", sources)) == {code.name for code in CASES}


class TestOptions:
    def test_module_paths(self):
        """Of the layer or of the batch norm; deny wins."""
        model, x = Residual(), torch.randn(2, 3, 8, 8)

        def fused(**changes: Any) -> list[str]:
            with options(**changes):
                [result] = run_pass(model, x)
            codes = {r.code for r in result.records}
            assert codes <= {Code.FUSED, Code.DENIED}
            return [r.batch_norm for r in result.records if r.code is Code.FUSED]

        everything = ["stem_bn", "bns.0", "bns.1", "bns.2", "bns.3", "down_bn"]
        assert fused(deny=("bns.[13]", "stem")) == ["bns.0", "bns.2", "down_bn"]
        assert fused(allow=("bns.*", "down"), deny=("convs.0",)) == everything[2:]

    def test_modules_of_other_scales(self):
        class Scale(nn.Module):
            def __init__(self):
                super().__init__()
                self.gamma = nn.Parameter(torch.rand(6, 1, 1))

            def forward(self, x):
                return x * self.gamma

        model = nn.Sequential(nn.Conv2d(4, 6, 3), Scale(), nn.ReLU())
        x = torch.randn(2, 4, 5, 5)
        for changes, code in (
            ({"deny": ("0",)}, Code.DENIED),
            ({"allow": ("2",)}, Code.DENIED),
            ({"allow": ("0",)}, Code.FUSED),
        ):
            with options(**changes):
                [record] = check_model(model, x)
            assert (record.kind, record.code) == ("scale", code)

    def test_objective_speed(self):
        """Where five times the weight is more than the layer's output, the weight costs more."""
        model = ConvBN(nn.Conv2d(4, 64, 3))  # 5 x 2,304 elements
        small, large = torch.randn(8, 4, 4, 4), torch.randn(8, 4, 8, 8)  # 2,048 and 18,432 out
        for x, code in ((small, Code.LARGE_WEIGHT), (large, Code.FUSED)):
            assert run_pass(model, x)[0].codes == [Code.FUSED]
            with options(objective="speed"):
                assert run_pass(model, x)[0].codes == [code]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Conv2d(4, 6, 3), (2, 4, 6, 6)), (nn.Linear(4, 6), (8, 4))]
)
def test_frozen_layer(layer, shape, first):
    """Also the first layer of a model, for whose sake backward computes nothing at all."""
    model = ConvBN(layer)
    model.layer.requires_grad_(False)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=not first)
    assert [r.code for r in check_model(model, x)] == [Code.LAYER_FROZEN]
    with options(fuse_frozen_layers=True):
        assert [r.code for r in check_model(model, x)] == [Code.FUSED]
