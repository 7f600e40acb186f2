"""Tune mode for convolutions with eval-mode batch norm, under ``torch.compile``.

    import torch, convbn_inductor_pass
    convbn_inductor_pass.enable()
    model = torch.compile(model.eval())

Fine-tuning a convnet with its batch norms in eval mode then saves one activation per
conv-BN pair for backward instead of two. The forward is computed as written, and the gradients are
eval mode's up to rounding. PyTorch's flag
``torch._inductor.config.efficient_conv_bn_eval_fx_passes = True`` does the same as ``enable()``.
Without a compiler, ``convbn_inductor_pass.turn_on(model)`` does it in eager mode.

Start reading at ``plugin`` (how Inductor calls us), ``passes.base`` (what every pass shares) and
``passes.scale_gradient``. Importing this package loads no compiler.
"""

from typing import TYPE_CHECKING, Any

from . import plugin
from .codes import Code
from .config import Options, get_options, options, set_options
from .eager.modes import decisions, turn_off, turn_on
from .freeze import freeze_batch_norms, unfreeze_batch_norms
from .plugin import disable, enable, install, is_installed, uninstall
from .records import PassFailedWarning, Record, clear_records, records, summary

if TYPE_CHECKING:
    from .explanation import Explanation, explain

__version__ = "0.2.0"

__all__ = ["Code", "Explanation", "Options", "PassFailedWarning", "Record", "__version__"]
__all__ += ["clear_records", "decisions", "disable", "enable", "explain", "freeze_batch_norms"]
__all__ += ["get_options", "install", "is_installed", "options", "records", "set_options"]
__all__ += ["summary", "turn_off", "turn_on", "unfreeze_batch_norms", "uninstall"]


def __getattr__(name: str) -> Any:
    if name not in ("Explanation", "explain"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import explanation  # which loads the compiler

    return getattr(explanation, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


plugin.install()
