"""Tune mode on real networks: pairs found, bytes that eager mode saves, errors of gradients.

    python -m bench eager-coverage [--model NAME ...]

For each network: the pairs fused by the compiled pass (``explain``), those and the ones whose layer
output is saved anyway, which it leaves as written, and the pairs fused by ``turn_on``; bytes that
autograd saves in eager eval, tune and deploy mode, seen through saved-tensor hooks, parameters,
buffers and inputs not counted; the largest error of a gradient in float32 against eval mode in
float64, for eval and for tune mode, over several inputs; and the largest difference of tune from
eval mode where both are float64, over the same inputs.

Rounding can make a ReLU or a maximum go the other way, in either mode, which changes a gradient
by 1e-3 and more. Such inputs are told from the activations, counted (``flipped``), and left out
of the largest error. Results go to ``bench/results/eager_coverage.json``;
``--markdown`` prints the table of the README from it.
"""

from __future__ import annotations

import copy
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import convbn_inductor_pass as cbn
from convbn_inductor_pass import Code, testing

RESULTS = pathlib.Path(__file__).parent / "results" / "eager_coverage.json"
INPUTS = 5


def prepare(model: nn.Module) -> nn.Module:
    """Eval mode, no dropout of any kind, statistics of the batch norms spread."""
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


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd saves for the backward of one forward, each storage once."""
    alive = {t.untyped_storage().data_ptr() for t in (x, *model.state_dict().values())}
    saved: dict[int, int] = {}
    held = []

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in alive:
            saved[storage.data_ptr()] = storage.nbytes()
            # So that no address is used twice; detached, for the graph holds this function.
            held.append(t.detach())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = model(x)
    del output
    return sum(saved.values())


class Choices(TorchDispatchMode):
    """Which piece of each piecewise linear function every element was on, in the order of calls."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if name == "relu":
            self.made.append(args[0] > 0)
        elif name == "hardtanh":
            low, high = args[1:] or (-1.0, 1.0)
            self.made.append((args[0] > low).byte() + (args[0] >= high))
        elif name in ("hardswish", "hardsigmoid"):
            self.made.append((args[0] > -3).byte() + (args[0] >= 3))
        output = func(*args, **(kwargs or {}))
        if name == "max_pool2d_with_indices":
            self.made.append(output[1])
        return output


def largest_errors(model: nn.Module, inputs: list[Tensor]) -> dict[str, Any]:
    """Largest error of a gradient, relative to its largest element; exact is eval in float64."""

    def run(m: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
        with Choices() as choices:
            gradients = testing.outputs_and_gradients(m, dict(m.named_parameters()), (x,))[1]
        return gradients, choices.made

    tune = cbn.turn_on(copy.deepcopy(model), "tune")
    runs = {"eval": model, "tune": tune, "tune_float64": copy.deepcopy(tune).double()}
    wide = copy.deepcopy(model).double()
    errors: dict[str, list[float]] = {mode: [] for mode in runs}
    flipped = dict.fromkeys(runs, 0)
    for x in inputs:
        exact, wanted = run(wide, x.double())
        largest = max(g.abs().max().item() for g in exact.values())
        for mode, m in runs.items():
            found, choices = run(m, x.double() if mode == "tune_float64" else x)
            if not all(torch.equal(a, b) for a, b in zip(choices, wanted, strict=True)):
                flipped[mode] += 1
                continue
            errors[mode].append(
                max(
                    ((found[n] - g).abs().max() / g.abs().max()).item()
                    for n, g in exact.items()
                    if g.abs().max() > 1e-12 * largest  # else it is zero but for rounding
                )
            )
    return {
        **{f"error_{mode}": max(found, default=None) for mode, found in errors.items()},
        "flipped": flipped,
        "inputs": len(inputs),
    }


def pairs(explanation: cbn.Explanation) -> int:
    """Batch norms in tune mode, and those left as written because their layer's output is saved."""
    return explanation.fused + sum(r.code is Code.SAVED_ANYWAY for r in explanation.batch_norms)


def measure(make: Callable[[], nn.Module], size: int) -> dict[str, Any]:
    """All that is said about one network."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = prepare(make()), torch.randn(2, 3, size, size)
    explanation = cbn.explain(model, x)
    tune = cbn.turn_on(copy.deepcopy(model), "tune")
    saved = {"eval": saved_bytes(model, x), "tune": saved_bytes(tune, x)}
    eager = sum(r.code.rewritten for r in cbn.decisions(tune))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deploy warns about training, which is not done here
        deploy = cbn.turn_on(copy.deepcopy(model), "deploy", example_inputs=(x,))
    saved["deploy"] = saved_bytes(deploy, x)
    errors = largest_errors(model, [torch.randn_like(x) for _ in range(INPUTS)])
    return {
        "batch_norms": len(explanation.batch_norms),
        "compiled": explanation.fused,
        "compiled_or_saved_anyway": pairs(explanation),
        "eager": eager,
        "saved": saved,
        **errors,
    }


HEADER = (
    *("network", "batch norms", "compiled", "or saved anyway", "eager"),
    *("saved: eval", "tune", "deploy"),
    *("error: eval", "tune", "tune, float64", "flipped: eval", "tune"),
)


_COUNTS = ("batch_norms", "compiled", "compiled_or_saved_anyway", "eager")


def row(name: str, r: dict[str, Any]) -> list[str]:
    """A network's results under ``HEADER``."""
    errors = (r[f"error_{which}"] for which in ("eval", "tune", "tune_float64"))
    return [
        name,
        *(str(r[key]) for key in _COUNTS),
        *(f"{r['saved'][mode]:,}" for mode in ("eval", "tune", "deploy")),
        *("none without" if e is None else f"{e:.1e}" for e in errors),
        *(f"{r['flipped'][mode]} of {r['inputs']}" for mode in ("eval", "tune")),
    ]


def markdown(results: dict[str, Any]) -> str:
    """The table as Markdown."""
    rows = [HEADER, ["---"] * len(HEADER), *(row(n, r) for n, r in results["networks"].items())]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
