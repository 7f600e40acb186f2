"""Result files: JSON lines that are written as results come, and that a later run resumes.

Two kinds of lines. ``{"kind": "run", "run": id, ...}`` opens a run and says on what machine,
with which versions and at which commit. ``{"kind": "result", "run": id, ...}`` is one value of
one metric for one provider; its settings are fields of the line. A later line replaces an
earlier one with the same settings.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .workload import Settings

__all__ = ["ResultFile", "Row", "environment", "read"]

_LIBRARIES = ("torch", "torchvision", "timm", "transformers", "triton")
_Key = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """One provider's values of one metric; exactly one of ``values`` and ``problem`` is given.

    ``problem`` says why there are none: a library that is missing, or an error. ``run`` is the one
    in which it was measured: times of one run alone can be compared round by round.
    """

    metric: str
    settings: Settings
    provider: str
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    problem: str = ""
    run: str = dataclasses.field(default="", compare=False)

    @property
    def key(self) -> _Key:
        return (self.metric, self.settings, self.provider)

    def to_json(self, run: str) -> str:
        line: dict[str, Any] = {"kind": "result", "run": run, "metric": self.metric}
        line |= dataclasses.asdict(self.settings) | {"provider": self.provider}
        line |= {"problem": self.problem} if self.problem else {"values": self.values}
        return json.dumps(line)

    @staticmethod
    def from_line(line: dict[str, Any], file: str) -> Row:
        fields = {f.name: line[f.name] for f in dataclasses.fields(Settings)}
        settings = Settings(**{**fields, "shape": tuple(fields["shape"])})
        values, problem = line.get("values", {}), line.get("problem", "")
        run = f"{file}, run {line['run']}"
        return Row(line["metric"], settings, line["provider"], values, problem, run)


class ResultFile:
    """A result file that is being added to; each row is on disk when ``add`` returns."""

    def __init__(self, path: Path, *, arguments: dict[str, Any]) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        runs, rows = read(path) if path.exists() else ([], [])
        self._done = {row.key for row in rows if not row.problem and _is_final(row)}
        self.run = f"{len(runs) + 1}"
        header = {"kind": "run", "run": self.run, **environment(), "arguments": arguments}
        self._write(json.dumps(header))

    def has(self, metric: str, settings: Settings, provider: str) -> bool:
        """Whether a run, this one or an earlier one, has finished this."""
        return (metric, settings, provider) in self._done

    def add(self, row: Row) -> None:
        self._write(row.to_json(self.run))
        if not row.problem and _is_final(row):
            self._done.add(row.key)

    def _write(self, line: str) -> None:
        with self.path.open("a") as file:
            file.write(line + "\n")


def _is_final(row: Row) -> bool:
    """A measurement that was cut off between compiling and timing has no times yet."""
    return row.metric != "measure" or "step_ms" in row.values


def read(path: Path) -> tuple[list[dict[str, Any]], list[Row]]:
    """Run headers and rows of a file; of rows with the same settings, the last one.

    A last line that was cut off is left out.

    Raises:
        ValueError: any other line is not JSON or of another kind.
    """
    runs: list[dict[str, Any]] = []
    rows: dict[_Key, Row] = {}
    lines = path.read_text().splitlines()
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: {error}") from error
        if line.get("kind") == "run":
            runs.append(line)
        elif line.get("kind") == "result":
            row = Row.from_line(line, path.name)
            rows[row.key] = row
        else:
            raise ValueError(f"{path}, line {number}: neither a run nor a result")
    return runs, list(rows.values())


def environment() -> dict[str, Any]:
    """What a reader must know about where results come from; no name of a person or host."""
    versions: dict[str, str | None] = {}
    for library in _LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = None
    versions["torch"] = str(torch.__version__)  # with the build, which package metadata may lack
    info: dict[str, Any] = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "changed_files": len(_git("status", "--porcelain", "-uno").splitlines()),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "torch_threads": torch.get_num_threads(),
        "versions": versions,
        "gpu": None,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        info["gpu"] = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        }
    return info


def _git(*arguments: str) -> str:
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        lines: Iterable[str] = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
