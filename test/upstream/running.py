"""Run Python on a torch, installed or patched, and read what its tests did."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

__all__ = ["REPOSITORY", "Report", "TestResult", "Torch", "in_parallel", "run_tests"]

REPOSITORY = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Torch:
    """A torch to run things on: the installed one, or the patched copy in ``root``.

    ``scratch`` is a folder of its own, for Inductor's caches and for what is run.
    """

    scratch: Path
    root: Path | None = None

    def run(
        self, *arguments: str | Path, cwd: Path | None = None, package: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run Python with this torch, one thread, and caches of its own; output is captured.

        ``package`` is a folder that has this repository's package, which is not on the path
        otherwise.
        """
        self.scratch.mkdir(parents=True, exist_ok=True)
        path = [str(folder) for folder in (self.root, package) if folder]
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(self.scratch / "inductor"),
        }
        command = [sys.executable, *map(str, arguments)]
        cwd = cwd or self.scratch
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


@dataclasses.dataclass(frozen=True)
class TestResult:
    """One test of a module and how it ended: "passed", "failed" or "skipped"."""

    case: str
    name: str
    ended: str

    @property
    def guards(self) -> bool:
        """Whether it tests what must not change, and may pass without the change."""
        return "Guards" in self.case

    def __str__(self) -> str:
        return f"{self.case}.{self.name}"


def run_tests(torch: Torch, module: Path, *options: str) -> tuple[list[TestResult], str]:
    """Run a test module with pytest; its tests, and the output."""
    xml = torch.scratch / f"{module.stem}.xml"
    xml.unlink(missing_ok=True)
    pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={xml}")
    # From a folder outside the repository, whose configuration is not upstream's.
    done = torch.run(*pytest, f"--rootdir={module.parent}", *options, module, cwd=module.parent)
    return list(_read(xml)) if xml.exists() else [], done.stdout + done.stderr


def in_parallel(*calls: Callable[[], Any]) -> list[Any]:
    """What each of a few calls, which wait for processes, returns."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def _read(xml: Path) -> Iterator[TestResult]:
    for case in ET.parse(xml).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        ended = "failed" if kinds & {"failure", "error"} else "passed"
        ended = "skipped" if "skipped" in kinds else ended
        yield TestResult(case.get("classname", "").split(".")[-1], case.get("name", ""), ended)


class Report:
    """Prints a line for each check, and knows whether one failed."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self._since = time.monotonic()

    def check(self, what: str, holds: bool, detail: str = "", output: str = "") -> None:
        """Print PASS or FAIL, and of a failure the end of the output."""
        seconds = time.monotonic() - self._since
        verdict = "PASS" if holds else "FAIL"
        print(f"{verdict}  {what}{': ' if detail else ''}{detail}  [{seconds:.0f} s]", flush=True)
        if not holds:
            self.failed.append(what)
            print("\n".join(output.splitlines()[-60:]), flush=True)
        self._since = time.monotonic()

    def tests(self, what: str, found: Sequence[TestResult], output: str, *, changed: bool) -> None:
        """Check a module's tests: with the change all pass; without, all but the guards fail."""
        ran = [t for t in found if t.ended != "skipped"]
        wrong = [t for t in ran if t.ended == "failed"]
        if not changed:
            wrong = [t for t in ran if t.ended == "passed" and not t.guards]
            ran = [t for t in ran if not t.guards]
        verb = "pass" if changed else "fail"
        detail = f"{len(ran) - len(wrong)} of {len(ran)} {verb}"
        if skipped := len(found) - sum(t.ended != "skipped" for t in found):
            detail += f", {skipped} skipped"
        names = "\n".join(f"  {'failed' if changed else 'passed'}: {t}" for t in wrong)
        self.check(what, bool(ran) and not wrong, detail, f"{output}\n{names}")
