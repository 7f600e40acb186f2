"""What keeping packed weights costs: memory, and calls after all weights have changed.

    python -m bench.kept [--model resnet50] [--batch 1] [--rounds 20]

Modes: compiled eval mode, ``forward="auto"`` without and with kept weights, and ``freezing``.
Memory is what a process holds after three calls, beyond what it holds in eval mode. Times are
medians of interleaved calls, each after all weights were multiplied by a number, which
``freezing`` does not notice.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx

import convbn_inductor_pass as cbn

from . import tables
from .libraries import require

__all__ = ["MODES", "resident_bytes", "times_with_changing_weights"]

MODES = ("eval", "auto, not kept", "auto", "freezing")


@contextlib.contextmanager
def _settings(mode: str) -> Iterator[None]:
    config = {
        "efficient_conv_bn_eval_fx_passes": mode.startswith("auto"),
        "freezing": mode == "freezing",
    }
    kept = mode != "auto, not kept"
    forward = "auto" if mode.startswith("auto") else "exact"
    with inductor_config.patch(config), cbn.options(forward=forward, keep_packed_weights=kept):
        yield


def _compiled(model: nn.Module, mode: str, x: Tensor) -> Callable[[Tensor], Any]:
    # A backend of its own for each, so that one does not use the other's code.
    compiled = torch.compile(model, backend=lambda gm, inputs: compile_fx(gm, inputs))
    with _settings(mode):
        compiled(x)
    return compiled


def _inputs(name: str, batch: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return getattr(require("torchvision.models"), name)().eval(), torch.randn(batch, 3, 224, 224)


def resident_bytes(name: str, batch: int, mode: str) -> int:
    """Bytes of memory that this process holds after three calls in ``mode``."""
    model, x = _inputs(name, batch)
    compiled = _compiled(model, mode, x)
    for _ in range(2):
        compiled(x)
    gc.collect()
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


def times_with_changing_weights(name: str, batch: int, rounds: int) -> dict[str, float]:
    """Time of a call in each mode but ``freezing``, relative to eval mode's."""
    model, x = _inputs(name, batch)
    models = {mode: copy.deepcopy(model) for mode in MODES[:-1]}
    calls = {mode: _compiled(m, mode, x) for mode, m in models.items()}
    samples: dict[str, list[float]] = {mode: [] for mode in models}
    for _ in range(rounds):
        for mode, call in calls.items():
            for parameter in models[mode].parameters():
                parameter.mul_(1.0001)
            begin = time.perf_counter()
            call(x)
            samples[mode].append(time.perf_counter() - begin)
    pairs = {mode: zip(s, samples["eval"], strict=True) for mode, s in samples.items()}
    return {mode: statistics.median(a / b for a, b in pair) for mode, pair in pairs.items()}


def _in_new_process(name: str, batch: int, mode: str) -> int:
    arguments = ["--model", name, "--batch", str(batch), "--resident", mode]
    command = [sys.executable, "-m", "bench.kept", *arguments]
    for _ in range(2):  # the first one compiles
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(out)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet50", help="of torchvision.models")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--resident", choices=MODES, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.resident:
        print(resident_bytes(a.model, a.batch, a.resident))
        return
    resident = {mode: _in_new_process(a.model, a.batch, mode) for mode in MODES}
    times = times_with_changing_weights(a.model, a.batch, a.rounds)
    rows = []
    for mode in MODES:
        more = (resident[mode] - resident["eval"]) / 1e6
        ratio = f"{times[mode]:.3f}" if mode in times else "stale"
        rows.append([mode, f"{more:+.0f}", ratio])
    header = ["mode", "memory beyond eval mode's, MB", "call after a change, to eval mode's"]
    tables.show(header, rows, as_markdown=False, width=100)


if __name__ == "__main__":
    main()
