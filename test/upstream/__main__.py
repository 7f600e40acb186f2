"""Apply each change to a copy of the installed torch, and run its tests with and without it.

``python -m test.upstream``: every change, then all together. Exits 1 if anything fails.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .checks import compare_bytes, run_own_suites, run_upstream_tests
from .edits import Change, EditError, copy_torch, git_diff, load_changes
from .running import Report, Torch, in_parallel, run_tests

CHECKS = ("tests", "bytes", "suites")
INSTALLED = Path(importlib.util.find_spec("torch").origin).parent  # type: ignore[union-attr, arg-type]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m test.upstream", description=__doc__)
    parser.add_argument("--change", action="append", default=[], help="only these; repeatable")
    parser.add_argument("--diff", type=Path, help="write the git diff of all that is applied")
    parser.add_argument("--quick", action="store_true", help="as --only tests")
    parser.add_argument("--only", action="append", choices=CHECKS, help="of what is done")
    parser.add_argument("--upstream-tests", type=Path, help="also PyTorch's, of this checkout")
    options = parser.parse_args(arguments)
    wanted = ["tests"] if options.quick else options.only or CHECKS
    changes = load_changes(options.change)
    report = Report()
    with tempfile.TemporaryDirectory(prefix="upstream-") as folder:
        scratch = Path(folder)
        plain = Torch(scratch / "plain")
        for change in changes:
            print(f"\n{change.name}: {change.title}", flush=True)
            needed = load_changes([change.name])
            patched = apply(needed, scratch / change.name, report)
            if patched is not None and "tests" in wanted:
                for test in change.tests:
                    module = scratch / "tests" / change.name / test
                    module.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(change.folder / test, module)
                    without, with_change = in_parallel(
                        functools.partial(run_tests, plain, module),
                        functools.partial(run_tests, patched, module),
                    )
                    report.tests(f"{test} without", *without, changed=False)
                    report.tests(f"{test} with", *with_change, changed=True)
        print("\nall together", flush=True)
        patched = apply(changes, scratch / "all", report, options.diff)
        if patched is not None and len(changes) > 1 and "tests" in wanted:
            for change in changes:
                for test in change.tests:
                    # As a script, which upstream's tests have to be, too.
                    done = patched.run(scratch / "tests" / change.name / test)
                    report.check(f"python {test}", done.returncode == 0, "", done.stderr)
        site = scratch / "efficient_conv_bn_eval" / "site"
        if site.exists() and "bytes" in wanted:
            print("\nbytes saved for backward", flush=True)
            compare_bytes(plain, Torch(scratch / "bytes", site), report)
        if patched is not None and "suites" in wanted:
            print("\nthis package on the patched torch", flush=True)
            run_own_suites(patched, report)
        if patched is not None and options.upstream_tests:
            print("\nPyTorch's own tests")
            run_upstream_tests(plain, patched, options.upstream_tests, report)
    print(f"\n{len(report.failed)} failed" if report.failed else "\nall passed")
    return 1 if report.failed else 0


def apply(
    changes: Sequence[Change], scratch: Path, report: Report, diff: Path | None = None
) -> Torch | None:
    """A patched copy of the installed torch; None, and a failure, if an edit does not fit."""
    root = scratch / "site"
    copy_torch(INSTALLED, root, changes)
    try:
        for change in changes:
            change.apply(root)
    except EditError as error:
        report.check("edits", False, str(error))
        return None
    torch = Torch(scratch / "run", root)
    if diff is not None:
        diff.write_text(git_diff(INSTALLED, root, changes))
    for line in git_diff(INSTALLED, root, changes, "--numstat").splitlines():
        added, removed, name = line.split("\t")
        print(f"      +{added} -{removed}  {name.replace('{a => b}/', '')}", flush=True)
    done = torch.run("-c", "import torch; print(torch.__version__, torch.__file__)")
    version, _, used = done.stdout.strip().partition(" ")
    report.check("edits", used.startswith(str(root)), f"torch {version}", done.stderr)
    return torch


if __name__ == "__main__":
    sys.exit(main())
