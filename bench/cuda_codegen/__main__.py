"""The process that lowers one workload for CUDA; :mod:`bench.metrics.cuda_codegen` starts it.

Arguments: the settings as JSON, then names of providers. Prints a line of JSON for each provider:
its name and values, or why the workload cannot be had.
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from typing import Any

from convbn_inductor_pass import PassFailedWarning

from ..libraries import MissingLibrary
from ..protocols import NotApplicable
from ..providers import PROVIDERS
from ..workload import Settings
from .lowering import lower
from .recording import Lowered

__all__ = ["figures"]


def figures(lowered: Lowered) -> dict[str, Any]:
    """Values of the metric: see ``bench/README.md``."""
    values: dict[str, Any] = {}
    for phase, launches in lowered.launches.items():
        kernels = sum(name in lowered.kernels for name in launches)
        values[f"{phase}_kernels"] = kernels
        values[f"{phase}_library_calls"] = len(launches) - kernels
        values[f"{phase}_kernel_bytes"] = lowered.kernel_bytes(phase)
    values["saved_bytes"] = lowered.saved_bytes
    values["resident_bytes"] = lowered.resident_bytes
    values["peak_bytes"] = lowered.peak_bytes
    values["graphs"] = len(lowered.graphs)
    return values


def _main(settings: str, *providers: str) -> None:
    fields = json.loads(settings)
    wanted = Settings(**{**fields, "shape": tuple(fields["shape"])})
    warnings.simplefilter("error", PassFailedWarning)
    for name in providers:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                values = figures(lower(wanted, PROVIDERS[name]))
        except (MissingLibrary, NotApplicable) as reason:
            print(json.dumps({type(reason).__name__: str(reason)}), flush=True)
            return
        print(json.dumps({"provider": name, "values": values}), flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
