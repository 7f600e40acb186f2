"""Tune mode for convolutions with eval-mode batch norm, under ``torch.compile``.

    import torch, convbn_inductor_pass
    convbn_inductor_pass.enable()
    model = torch.compile(model.eval())

Fine-tuning a convnet with its batch norms in eval mode then saves one activation per
conv-BN pair for backward instead of two. The forward is computed as written, and the gradients are
eval mode's up to rounding. PyTorch's flag
``torch._inductor.config.efficient_conv_bn_eval_fx_passes = True`` does the same as ``enable()``.
Without a compiler, ``convbn_inductor_pass.turn_on(model)`` does it in eager mode.

Where to start reading: ``plugin`` (how Inductor calls us) -> ``passes.base`` (what every pass
shares) -> ``passes.scale_gradient`` (find, decide, rewrite). ``explain`` reports what was done and
what it saves. Importing this package loads no compiler: code that needs one is loaded on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._torch import version

version.check()

from . import plugin  # noqa: E402
from .codes import Code  # noqa: E402
from .config import Options, get_options, options, set_options  # noqa: E402
from .plugin import disable, enable, install, is_installed, uninstall  # noqa: E402
from .records import PassFailedWarning, Record, clear_records, records, summary  # noqa: E402

if TYPE_CHECKING:
    from .eager import decisions, turn_off, turn_on
    from .explanation import Explanation, explain
    from .freeze import freeze_batch_norms, unfreeze_batch_norms

__version__ = "0.2.0"

__all__ = [
    "Code",
    "Explanation",
    "Options",
    "PassFailedWarning",
    "Record",
    "__version__",
    "clear_records",
    "decisions",
    "disable",
    "enable",
    "explain",
    "freeze_batch_norms",
    "get_options",
    "install",
    "is_installed",
    "options",
    "records",
    "set_options",
    "summary",
    "turn_off",
    "turn_on",
    "unfreeze_batch_norms",
    "uninstall",
]

_LAZY = {
    "Explanation": "explanation",
    "decisions": "eager",
    "explain": "explanation",
    "freeze_batch_norms": "freeze",
    "turn_off": "eager",
    "turn_on": "eager",
    "unfreeze_batch_norms": "freeze",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


plugin.install()
