"""Launches, traffic and memory of the code that Inductor generates for CUDA; needs no GPU.

The workload is lowered for a pretended H100 in a process of its own (``bench.cuda_codegen``):
nothing is allocated or timed, and the figures repeat on any machine with the same versions.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..libraries import MissingLibrary
from ..protocols import NotApplicable
from ..providers import Provider
from ..workload import Settings

__all__ = ["cuda_codegen"]

_ROOT = Path(__file__).parents[2]


def cuda_codegen(
    settings: Settings, providers: list[Provider]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (provider, values), one provider after the other.

    Raises:
        MissingLibrary: PyTorch is a CPU build, which lowers convolutions otherwise; or as
            :func:`bench.workload.setup`.
        NotApplicable: as :func:`bench.workload.setup`.
        RuntimeError: compiling failed; with the last line of the error.
    """
    if torch.version.cuda is None:
        raise MissingLibrary(f"needs a CUDA build of PyTorch, and {torch.__version__} is none")
    fields = json.dumps(dataclasses.asdict(settings))
    command = [sys.executable, "-m", "bench.cuda_codegen", fields, *(p.name for p in providers)]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        for text in process.stdout or ():
            line = json.loads(text)
            if "provider" in line:
                yield line["provider"], line["values"]
            elif "NotApplicable" in line:
                raise NotApplicable(line["NotApplicable"])
            else:
                raise MissingLibrary(line["MissingLibrary"])
        if process.wait() != 0:
            errors.seek(0)
            raise RuntimeError(errors.read().strip().rpartition("\n")[2])
