"""``freezing=True``: what Inductor folds wrongly by itself comes out right with this package."""

from __future__ import annotations

import pytest
import torch
from common import spread_statistics
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.fx_passes.freezing_patterns import binary_folding_pass

import convbn_inductor_pass as cbn
from convbn_inductor_pass import testing
from convbn_inductor_pass.passes import freezing


def transposed(c_out: int = 4, groups: int = 1, spatial: int = 2) -> nn.Module:
    kind = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[spatial]
    return kind(4, c_out, 3, groups=groups)


def scaled(y: Tensor, o: Tensor) -> Tensor:
    return y * o


# Name: a layer on [2, 4, 6, 6] (or [2, 4, 6], [2, 4, 6, 6, 6]), the shape of a constant, and what
# follows the layer. With the built-in folding, each of these is wrong or does not compile.
WRONG = {
    "transposed": (transposed(), (4, 1, 1), scaled),
    "transposed, 1-d": (transposed(spatial=1), (4, 1), scaled),
    "transposed, 3-d": (transposed(spatial=3), (1, 4, 1, 1, 1), scaled),
    "transposed, grouped": (transposed(groups=2), (1, 4, 1, 1), scaled),
    "transposed, other channels, one value": (transposed(6), (1,), scaled),
    "transposed, shifted by a constant": (transposed(6), (), lambda y, _: y + 2.5),
    "transposed, broadcast": (transposed(1), (4, 1, 1), scaled),
    "along the columns": (nn.Conv2d(4, 6, 1), (1, 6), scaled),
    "along the rows": (nn.Conv3d(4, 6, 1), (1, 6, 1), scaled),
    "alpha": (nn.Conv2d(4, 6, 1), (6, 1, 1), lambda y, o: torch.add(y, o, alpha=3)),
    "a constant": (nn.Conv2d(4, 6, 1), (), lambda y, _: y * 2.0),
    "another constant": (nn.Conv2d(4, 6, 1), (), lambda y, _: y * 3.0),
    "yet another": (nn.Conv2d(4, 6, 1, bias=False), (), lambda y, _: y + 0.25),
}


class Cases(nn.Module):
    """All of them in one graph: constants of one spoil those of others."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(layer for layer, _, _ in WRONG.values())
        for i, (_, shape, _) in enumerate(WRONG.values()):
            self.register_buffer(f"o{i}", torch.randn(shape, generator=generator))
        self.up, self.bn = nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4)
        spread_statistics(self)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        by_rank = {3: x[:, :, 0], 4: x, 5: x[..., None].expand(-1, -1, -1, -1, 6)}
        out = {"batch norm": self.bn(self.up(x))}
        for i, (name, (_, _, then)) in enumerate(WRONG.items()):
            layer = self.layers[i]
            out[name] = then(layer(by_rank[layer.weight.ndim]), getattr(self, f"o{i}"))
        return out


def frozen(model, *inputs, **config):
    config = torch._inductor.config.patch(freezing=True, **config)
    with testing.fresh_compile(), torch.no_grad(), config:
        return torch.compile(model)(*inputs)


@pytest.mark.parametrize("forward", ["exact", "fold"])
def test_graphs_that_the_builtin_folding_gets_wrong(forward):
    torch.manual_seed(0)
    model, x = Cases().eval(), torch.randn(2, 4, 6, 6)
    with cbn.options(forward=forward):
        out = frozen(model, x)
    with torch.no_grad():
        expected = model(x)
    for name, value in expected.items():
        assert out[name].shape == value.shape, name
        error = (out[name] - value).abs().max() / value.abs().max()
        assert error < 1e-5, (name, error)


class Linears(nn.Module):
    """Linear layers (with and without bias), reshaped, scaled and shifted by constants."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 6, bias=i % 2 == 0) for i in range(5))
        for i, shape in enumerate([(6,), (1, 1, 6), (6,), (1,), (6,)]):
            self.register_buffer(f"o{i}", torch.randn(shape))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (
            self.layers[0](x) * self.o0,
            self.layers[1](x).reshape(6, 2, 6) - self.o1,
            self.layers[2](x).reshape(72, 1) * self.o2,  # the built-in: of shape [72, 1]
            self.layers[3](x).reshape(2, 6, 3, 2) * self.o3,
            torch.sub(self.layers[4](x), self.o4, alpha=2.0),  # the built-in: drops alpha
        )


def test_linear_layers():
    torch.manual_seed(0)
    model, x = Linears().eval(), torch.randn(12, 4)
    counters.clear()
    out = frozen(model, x, enable_linear_binary_folding=True)
    for got, expected in zip(out, model(x), strict=True):
        torch.testing.assert_close(got, expected)
    assert counters["inductor"]["binary_folding"] == 3


class Right(nn.Module):
    """What the built-in folding does right: still folded, mixed dtypes and constants included."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 1, groups=2, bias=False)
        self.c, self.bn = nn.Conv1d(4, 6, 1), nn.BatchNorm1d(6)
        self.register_buffer("scale", torch.rand(6, 1, 1) + 0.5)
        spread_statistics(self)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.a(x) * self.scale + 2.0, self.b(x) / self.scale, self.bn(self.c(x[..., 0]))


def test_right_folding_goes_on():
    torch.manual_seed(0)
    model, x = Right().eval(), torch.randn(2, 4, 6, 6)
    counters.clear()
    out = frozen(model, x)
    for got, expected in zip(out, model(x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert counters["inductor"]["binary_folding"] == 2 + 1 + 4  # a batch norm is four steps

    counters.clear()
    with torch.autocast("cpu", torch.bfloat16):
        out = frozen(model, x)
    for got, expected in zip(out, model(x), strict=True):
        torch.testing.assert_close(got.float(), expected, rtol=0.05, atol=0.05)
    assert counters["inductor"]["binary_folding"] > 0


def test_the_guard_goes_with_the_flag(monkeypatch):
    guarded = []
    fold = freezing.fold_what_is_right
    monkeypatch.setattr(freezing, "fold_what_is_right", lambda *a: guarded.append(flag) or fold(*a))
    graph = torch.fx.Graph()
    graph.output(graph.placeholder("x"))
    gm = torch.fx.GraphModule(nn.Module(), graph)
    for flag in (True, False):
        with torch._inductor.config.patch(efficient_conv_bn_eval_fx_passes=flag):
            binary_folding_pass.apply(gm.graph)
    assert guarded == [True]


def test_the_guard_is_gone_after_a_failure():
    def checks():
        return [e.extra_check for found in binary_folding_pass.patterns.values() for e in found]

    def fail(_graph):
        assert checks() != plain
        raise KeyError

    frozen(nn.Conv2d(4, 4, 1).eval(), torch.randn(1, 4, 2, 2))  # registers the patterns
    plain = checks()
    assert plain
    with pytest.raises(KeyError):
        freezing.fold_what_is_right(torch.fx.Graph(), fail, binary_folding_pass.patterns)
    assert checks() == plain
