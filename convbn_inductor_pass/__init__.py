"""Tune mode for convolutions with eval-mode batch norm, under ``torch.compile``.

    import torch, convbn_inductor_pass
    torch._inductor.config.efficient_conv_bn_eval_fx_passes = True
    model = torch.compile(model.eval())

Fine-tuning a convnet with its batch norms in eval mode then keeps one activation per
conv-BN pair for backward instead of two. The forward is computed as written, and the gradients are
eval mode's up to rounding.
Without a compiler, ``convbn_inductor_pass.turn_on(model)`` does the same in eager mode.

The story in the order of the code: ``hook`` (how Inductor calls us) -> ``pipeline`` (find,
decide, rewrite, record) -> ``autograd`` (the gradient). ``scales`` does the same for trained scales
that are no batch norm to PyTorch. ``forward`` is the other half: on request it folds batch norms
into layers in the forward and in inference. ``explain`` says what was done and what it saves.
"""

from ._torch import compat

compat.check_torch_version()

from .codes import Code, ForwardCode, ScaleCode  # noqa: E402
from .config import Options, get_options, options, set_options  # noqa: E402
from .eager.modes import decisions, turn_off, turn_on  # noqa: E402
from .explain import Explanation, explain  # noqa: E402
from .plugin import PassFailedWarning, install, is_installed, uninstall  # noqa: E402
from .records import (  # noqa: E402
    ForwardRecord,
    Record,
    Records,
    ScaleRecord,
    clear_records,
    forward_records,
    records,
    scale_records,
)

__version__ = "0.1.0"

__all__ = [
    "Code",
    "Explanation",
    "ForwardCode",
    "ForwardRecord",
    "Options",
    "PassFailedWarning",
    "Record",
    "Records",
    "ScaleCode",
    "ScaleRecord",
    "__version__",
    "clear_records",
    "decisions",
    "explain",
    "forward_records",
    "get_options",
    "install",
    "is_installed",
    "options",
    "records",
    "scale_records",
    "set_options",
    "turn_off",
    "turn_on",
    "uninstall",
]

install()
