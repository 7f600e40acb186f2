"""What the runner does beside a change's own tests: bytes, this package's suites, PyTorch's."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from .plugin import copy_package
from .running import REPOSITORY, Report, Torch, in_parallel, run_tests

__all__ = ["compare_bytes", "run_own_suites", "run_upstream_tests"]

_OWN_SUITES = ("test/test_efficient_conv_bn_eval.py", "test/test_plugin.py")

# Modules of PyTorch's own that concern the files that the changes touch.
_UPSTREAM_MODULES = (
    "test_binary_folding.py",
    "test_pattern_matcher.py",
    "test_inductor_freezing.py",
    "test_fx_fusion.py",
    "test_split_cat_fx_passes.py",
    "test_group_batch_fusion.py",
    "test_compiler_bisector.py",
    "test_config.py",
)


def compare_bytes(plain: Torch, patched: Torch, report: Report) -> None:
    """Bytes saved for backward: this package on the installed torch, and the change without it."""
    copy = patched.scratch / "package"
    copy_package(copy)
    tool = ("-m", "test.upstream.saved_bytes")
    ours = (*tool, "scale_gradient", "tune")
    done = in_parallel(
        functools.partial(plain.run, *ours, cwd=REPOSITORY, package=REPOSITORY),
        functools.partial(patched.run, *tool, "eval", "builtin", cwd=copy, package=copy),
    )
    failed = [d.stderr for d in done if d.returncode]
    report.check("bytes saved for backward", not failed, "", "\n".join(failed))
    if failed:
        return
    package, change = (
        dict(map(json.loads, (line for line in d.stdout.splitlines() if line.startswith("["))))
        for d in done
    )
    print(f"      {'':30}{'eval':>13}{'change':>13}{'plugin':>13}{'all on':>13}")
    for name, row in package.items():
        ours, theirs = row["scale_gradient"], change[name]["builtin"]
        row = (change[name]["eval"], theirs, ours, row["tune"])
        print(f"      {name:30}" + "".join(f"{n:13,}" for n in row))
        report.check(f"{name}: equal to the byte", ours == theirs, f"{theirs - ours:+,}")


def run_own_suites(patched: Torch, report: Report) -> None:
    """This package on top of the patched torch: nothing breaks, nothing is fused twice."""
    copy = patched.scratch / "suites"
    copy_package(copy)
    for suite in _OWN_SUITES:
        done = patched.run("-m", "pytest", "-q", "-n0", suite, cwd=copy, package=copy)
        last = done.stdout.strip().splitlines()[-1:]
        report.check(suite, done.returncode == 0, *last, done.stdout + done.stderr)


def run_upstream_tests(plain: Torch, patched: Torch, folder: Path, report: Report) -> None:
    """PyTorch's own modules, from a checkout: nothing fails that passes without the changes."""
    for name in _UPSTREAM_MODULES:
        module = folder / "test" / "inductor" / name
        if not module.exists():
            print(f"      no {module}", flush=True)
            continue
        before, after = (run_tests(torch, module)[0] for torch in (plain, patched))
        failed = {str(t) for t in before if t.ended == "failed"}
        new = [str(t) for t in after if t.ended == "failed" and str(t) not in failed]
        detail = f"{len(after)} tests, {len(failed)} fail without the changes, too"
        report.check(name, bool(after) and not new, detail, "\n".join(new))
