"""Register the passes with Inductor, and unregister them.

``install``, called when the package is imported, adds our passes (``passes.PASSES``) to Inductor's
hooks, after the passes already there, in every thread, as soon as Inductor is imported. Two of
PyTorch's passes are wrapped: its own pass for the same flag does nothing, since it runs first and
would take the pairs, and constant folding under freezing is blocked where it is wrong. After
``uninstall`` the two stay wrapped, but run unchanged.
"""

import contextlib
import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from ._torch.on_import import when_imported
from .config import set_options
from .records import PassFailedWarning

_CONFIG = "torch._inductor.config"
_PASSES = f"{__package__}.passes"
_installed = False


def enable(**options: object) -> None:
    """Turn on tune mode for everything compiled by ``torch.compile`` from now on, in every thread.

    The same as importing this package and setting PyTorch's flag
    ``torch._inductor.config.efficient_conv_bn_eval_fx_passes``, in a call that no linter removes.

    Args:
        options: see :class:`~convbn_inductor_pass.Options`.

    Raises:
        ValueError: an unknown option or value; nothing is changed then.
    """
    set_options(**options)
    install()
    _set_flag(True)


def disable() -> None:
    """Set PyTorch's flag to False again, in every thread: compile as without this package."""
    _set_flag(False)


def _set_flag(value: bool) -> None:
    importlib.import_module(_CONFIG)  # which adds the passes, if they are to be added
    from ._torch import registry

    registry.set_everywhere("efficient_conv_bn_eval_fx_passes", value)


def install() -> None:
    """Register the passes, as importing the package does; again, if a hook was overwritten."""
    global _installed
    _installed = True
    when_imported(_PASSES, _set_passes)
    when_imported(_CONFIG, lambda: _installed and importlib.import_module(_PASSES))
    for module, name, ours in _WRAPPED:
        when_imported(module, functools.partial(_wrap, module, name, ours))


def uninstall() -> None:
    """Undo :func:`install`: other passes stay, and PyTorch's own pass runs again."""
    global _installed
    _installed = False
    if _PASSES in sys.modules:
        _set_passes()


def is_installed() -> bool:
    """Whether Inductor will run the passes (given the flag) in this thread."""
    return _installed and (_PASSES not in sys.modules or not _missing_hooks())


@contextlib.contextmanager
def installation(installed: bool) -> Iterator[None]:
    """Install or uninstall the passes for a ``with`` block, and restore all hooks as they were."""
    global _installed
    importlib.import_module(_CONFIG)  # first: it adds the passes, if they are to be added
    from ._torch import registry
    from .passes import PASSES

    before = _installed
    with registry.hooks_restored({p.hook for p in PASSES}):
        try:
            (install if installed else uninstall)()
            yield
        finally:
            _installed = before


def _set_passes() -> None:
    from ._torch import registry
    from .passes import PASSES

    for each in PASSES:
        registry.set_pass(each.hook, each, _installed)


def _missing_hooks() -> dict[str, str]:
    from ._torch import registry
    from .passes import PASSES

    return {p.hook: p.name for p in PASSES if p not in registry.passes_of(p.hook)}


def _wrap(module: str, name: str, ours: Callable[..., int]) -> None:
    """Call ``ours`` instead of a pass of PyTorch's while we are installed and enabled."""
    theirs: Any = getattr(sys.modules[module], name)
    builtin = theirs.apply
    if getattr(builtin, "__module__", "") == __name__:
        return  # already wrapped

    def apply(graph: Any) -> int:
        from ._torch import registry

        if _installed and registry.is_enabled():
            return ours(graph, builtin, theirs)
        return builtin(graph)

    theirs.apply = apply


def _instead_of_builtin(*_: Any) -> int:
    """Runs in place of PyTorch's pass for this flag; leaves the pairs to ours.

    If ours was overwritten, they are left alone rather than given to one that is known to be wrong
    on some, and the user is warned; also about the other hooks.
    """
    for hook, name in _missing_hooks().items():
        warnings.warn(
            f"convbn_inductor_pass is installed, but {hook} was overwritten, so its pass {name} "
            "does not run. Call convbn_inductor_pass.install() after setting your own pass, or "
            "uninstall() to get PyTorch's pass back.",
            PassFailedWarning,
            stacklevel=2,
        )
    return 0


def _around_freezing(graph: Any, builtin: Callable[[Any], int], theirs: Any) -> int:
    """Runs in place of Inductor's constant folding under ``freezing=True``."""
    from .passes import freezing

    return freezing.fold_what_is_right(graph, builtin, theirs.patterns)


_WRAPPED = (
    ("torch._inductor.fx_passes.pre_grad", "efficient_conv_bn_eval_pass", _instead_of_builtin),
    ("torch._inductor.fx_passes.freezing_patterns", "binary_folding_pass", _around_freezing),
)
