"""What this package itself needs once PyTorch's pass is on the joint graph.

Edits of this package's own ``plugin.py`` and of one of its tests, applied to a copy of it: its way
to have PyTorch's pass step aside looks for it among the pre-grad passes. To be made in the package
when the change lands.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from .edits import Edit, apply_edit
from .running import REPOSITORY

__all__ = ["EDITS", "copy_package"]

_PLUGIN = "convbn_inductor_pass/plugin.py"

EDITS = (
    Edit(
        _PLUGIN,
        "",
        '_PRE_GRAD = "',
        "instead",
        '_PRE_GRAD = "torch._inductor.fx_passes.joint_graph"',
    ),
    # There it is a function.
    Edit(
        _PLUGIN,
        "_wrap",
        "builtin = theirs",
        "instead",
        'builtin = getattr(theirs, "apply", theirs)',
    ),
    Edit(
        _PLUGIN,
        "_wrap",
        "theirs.apply = apply",
        "instead",
        """
        if builtin is theirs:
            setattr(sys.modules[module], name, apply)
        else:
            theirs.apply = apply
        """,
    ),
)


def copy_package(root: Path) -> None:
    """Copy this repository's code into ``root``, with the edits."""
    for name in ("convbn_inductor_pass", "bench", "test"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(REPOSITORY / name, root / name, ignore=ignored)
    shutil.copy(REPOSITORY / "pyproject.toml", root)
    for edit in EDITS:
        path = root / edit.file
        path.write_text(apply_edit(path.read_text(), edit))
