"""Adapters for trainers, a module each; import the one that you use: see docs/trainers.md."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..freeze import freeze_batch_norms
from ..plugin import enable


class TuneMode:
    """Turns tune mode on, and keeps batch norms in eval mode while a trainer runs and after it.

    ``modules`` (paths or patterns) are passed to ``freeze_batch_norms``, ``options`` to the
    package's ``enable``. Adapters call :meth:`enable` before anything is compiled, and
    :meth:`freeze` once the model is built, wrapped and converted.
    """

    def __init__(self, modules: Sequence[str] | None = None, **options: Any) -> None:
        super().__init__()
        self.modules, self.options = modules, options

    def enable(self) -> None:
        enable(**self.options)

    def freeze(self, model: nn.Module) -> None:
        freeze_batch_norms(model, self.modules)
