"""Networks with layer scales save what they would save without the scales' gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from programs import Norm, Residual, Scale
from torch import nn

from bench.libraries import MissingLibrary, require
from convbn_inductor_pass import Code, explain
from convbn_inductor_pass.saved_tensors import saved_for_backward


def without_gradients_of(model, *names):
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if name.endswith(names):
            parameter.requires_grad_(False)
    return model


@pytest.mark.parametrize("dynamic", [None, True])
def test_saved_as_without_gradients_of_the_scales(dynamic):
    model = nn.Sequential(
        *(Residual(nn.Conv2d(4, 4, 3, padding=1), Norm(4), nn.ReLU()) for _ in range(3)),
        *(Residual(nn.Conv2d(4, 4, 1), nn.GELU(), nn.Conv2d(4, 4, 1), Scale(4)) for _ in range(2)),
    )
    x = torch.randn(2, 4, 8, 8)
    saved = {
        mode: saved_for_backward(model, x, mode=mode, dynamic=dynamic) for mode in ("eval", "tune")
    }
    frozen = without_gradients_of(model, "gamma")
    least = saved_for_backward(frozen, x, mode="eval", dynamic=dynamic)
    size = x.numel() * 4
    # Five outputs less; in the place of three of them, ReLU's masks.
    less = 5 * size - 3 * x.numel()
    assert saved["tune"].new_bytes == least.new_bytes == saved["eval"].new_bytes - less
    assert saved["tune"].bytes_of("weight") == 0


MODELS = {
    "torchvision": (
        "torchvision.models.convnext",
        lambda m: m.ConvNeXt([m.CNBlockConfig(32, 64, 1), m.CNBlockConfig(64, None, 2)]),
        3,
        (2, 3, 64, 64),
    ),
    "timm, convolutions": (
        "timm",
        lambda m: m.create_model("convnext_atto", depths=(1, 1, 2, 1), drop_path_rate=0.0),
        5,
        (2, 3, 64, 64),
    ),
    "timm, linear layers": (
        "timm",
        lambda m: m.create_model("deit3_small_patch16_224", img_size=32, depth=3),
        6,
        (2, 3, 32, 32),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_real_models(name):
    library, make, count, shape = MODELS[name]
    try:
        library = require(library)
    except MissingLibrary as missing:
        pytest.skip(str(missing))
    torch.manual_seed(0)
    model, x = make(library).eval(), torch.randn(shape)
    explanation = explain(model, x)
    assert [(r.kind, r.code) for r in explanation.records] == [("scale", Code.FUSED)] * count
    frozen = without_gradients_of(model, "gamma", "layer_scale")
    least = saved_for_backward(frozen, x, mode="eval").new_bytes
    saved = explanation.saved
    assert saved["tune"].new_bytes == least < saved["eval"].new_bytes
    assert f"{count} of {count} layers" in str(explanation)
