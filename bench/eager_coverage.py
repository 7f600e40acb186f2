"""Eager tune mode on real networks: the pairs it finds, what it keeps, how right it is.

    python -m bench.eager_coverage [--model NAME ...]

For each network: the pairs fused by the compiled pass (``explain``) and by ``turn_on``; bytes
that autograd keeps in eager eval, tune and deploy mode, seen through saved-tensor hooks,
parameters, buffers and inputs not counted; and the largest error of a gradient against
float64, in eval and in tune mode. Results go to ``bench/results/eager_coverage.json``.
"""

from __future__ import annotations

import argparse
import copy
import json
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import convbn_inductor_pass as cbn
from convbn_inductor_pass import testing

from .libraries import MissingLibrary, require

RESULTS = pathlib.Path(__file__).parent / "results" / "eager_coverage.json"


class SharedHead(nn.Module):
    """A RetinaNet head: two shared conv-BN-ReLU towers over three levels."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for _ in range(2):
            blocks += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.tower = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> list[Tensor]:
        levels = [self.stem(x[..., ::s, ::s]) for s in (1, 2, 4)]
        return [self.tower(level) for level in levels]


def _torchvision(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(require("torchvision.models"), name)(**kwargs)


def _timm(name: str) -> Callable[[], nn.Module]:
    return lambda: require("timm").create_model(name)


def _unet() -> nn.Module:
    from .models.transposed import UNet

    return UNet()


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (_torchvision("resnet18"), 64),
    "resnet50": (_torchvision("resnet50"), 64),
    "regnet_y_400mf": (_torchvision("regnet_y_400mf"), 64),
    "mobilenet_v2": (_torchvision("mobilenet_v2"), 64),
    "mobilenet_v3_small": (_torchvision("mobilenet_v3_small"), 64),
    "efficientnet_b0": (_torchvision("efficientnet_b0"), 64),
    "inception_v3": (
        _torchvision("inception_v3", aux_logits=False, init_weights=False),
        96,
    ),
    "densenet121": (_torchvision("densenet121"), 64),
    "shufflenet_v2_x0_5": (_torchvision("shufflenet_v2_x0_5"), 64),
    "timm resnet18": (_timm("resnet18"), 64),
    "timm regnety_002": (_timm("regnety_002"), 64),
    "timm mobilenetv3_small_050": (_timm("mobilenetv3_small_050"), 64),
    "timm efficientnet_b0": (_timm("efficientnet_b0"), 64),
    "timm inception_v3": (_timm("inception_v3"), 96),
    "timm densenet121": (_timm("densenet121"), 64),
    "U-Net": (_unet, 64),
    "RetinaNet head": (SharedHead, 32),
}


def prepare(model: nn.Module) -> nn.Module:
    """Eval mode, no dropout of any kind, statistics of the batch norms spread."""
    torch.manual_seed(0)
    for module in model.eval().modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (module.running_mean, -0.1, 0.1),
                (module.running_var, 0.8, 1.2),
                (module.weight, 0.8, 1.2),
            ):
                if tensor is not None:
                    nn.init.uniform_(tensor, low, high)
    return model


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for the backward of one forward, each storage once."""
    alive = {t.untyped_storage().data_ptr() for t in (x, *model.state_dict().values())}
    kept: dict[int, int] = {}
    held = []

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in alive:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(t)  # so that no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = model(x)
    del output
    return sum(kept.values())


def largest_errors(model: nn.Module, x: Tensor) -> tuple[float, float]:
    """Largest relative error of a gradient against float64: (eval mode, tune mode)."""

    def run(m: nn.Module, value: Tensor) -> dict[str, Tensor]:
        return testing.outputs_and_gradients(m, dict(m.named_parameters()), (value,))[1]

    exact = run(copy.deepcopy(model).double(), x.double())
    found = []
    for mode in ("eval", "tune"):
        gradients = run(cbn.turn_on(copy.deepcopy(model), mode), x)
        errors = [
            ((gradients[n] - g).abs().max() / g.abs().max()).item()
            for n, g in exact.items()
            if g.abs().max() > 0
        ]
        found.append(max(errors))
    return found[0], found[1]


def measure(make: Callable[[], nn.Module], size: int) -> dict[str, Any]:
    """All that is said about one network."""
    torch._dynamo.reset()
    model, x = prepare(make()), torch.randn(2, 3, size, size)
    explanation = cbn.explain(model, x)
    tune = cbn.turn_on(copy.deepcopy(model), "tune")
    kept = {"eval": kept_bytes(model, x), "tune": kept_bytes(tune, x)}
    fused = sum(r.code.fused for r in cbn.decisions(tune))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deploy warns about training, which is not done here
        deploy = cbn.turn_on(copy.deepcopy(model), "deploy", example_inputs=(x,))
    kept["deploy"] = kept_bytes(deploy, x)
    errors = largest_errors(model, x)
    return {
        "batch_norms": len(explanation.records),
        "compiled": explanation.fused,
        "eager": fused,
        "kept": kept,
        "error_eval": errors[0],
        "error_tune": errors[1],
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=list(MODELS))
    names = parser.parse_args().model or list(MODELS)
    table = Table("network", "batch norms", "compiled", "eager", "kept: eval", "tune", "deploy")
    for column in ("error: eval", "tune"):
        table.add_column(column)
    results: dict[str, Any] = {"torch": torch.__version__, "networks": {}}
    for name in track(names, "networks"):
        make, size = MODELS[name]
        try:
            r = measure(make, size)
        except MissingLibrary as error:
            Console(stderr=True).print(f"{name}: {error}")
            continue
        results["networks"][name] = r
        kept = (f"{r['kept'][mode]:,}" for mode in ("eval", "tune", "deploy"))
        errors = (f"{r['error_eval']:.1e}", f"{r['error_tune']:.1e}")
        counts = (str(r[key]) for key in ("batch_norms", "compiled", "eager"))
        table.add_row(name, *counts, *kept, *errors)
    Console(width=120).print(table)
    if names == list(MODELS):
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
