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
        "def _wrap_builtin",
        "instead",
        '''
        def _wrap_builtin() -> None:
            from torch._inductor.fx_passes import pre_grad

            if hasattr(pre_grad, "efficient_conv_bn_eval_pass"):
                _wrap("builtin", pre_grad.efficient_conv_bn_eval_pass, _instead_of_builtin)
            else:
                when_imported("torch._inductor.fx_passes.joint_graph", _wrap_joint_builtin)


        def _wrap_joint_builtin() -> None:
            from torch._inductor.fx_passes import joint_graph

            _wrap("builtin", _JointPass(joint_graph), _instead_of_builtin)


        class _JointPass:
            """PyTorch's pass where it is a function: as an object whose ``apply`` that is."""

            def __init__(self, module: Any) -> None:
                self.__dict__.update(module=module, original=module.efficient_conv_bn_eval_pass)

            def __getattr__(self, name: str) -> Any:
                if name != "apply":
                    raise AttributeError(name)
                return self.original

            def __setattr__(self, name: str, value: Any) -> None:
                self.__dict__[name] = self.module.efficient_conv_bn_eval_pass = value

            def __delattr__(self, name: str) -> None:
                del self.__dict__[name]
                self.module.efficient_conv_bn_eval_pass = self.original
        ''',
    ),
    Edit(
        "test/test_plugin.py",
        "test_uninstall_restores_everything",
        "wrapped = pre_grad",
        "instead",
        """
        wrapped = [theirs for theirs, _ in cbn.plugin._State.wrapped.values()]
        assert len(wrapped) == 2
        """,
    ),
    Edit(
        "test/test_plugin.py",
        "test_uninstall_restores_everything",
        "import freezing_patterns, pre_grad",
        "swap",
        "import freezing_patterns, joint_graph, pre_grad  # noqa: F401",
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
