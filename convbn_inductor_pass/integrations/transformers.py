"""Transformers: a callback that trains with batch norms in eval mode, and in tune mode if compiled.

Trainer calls ``model.train()`` in each step, after which ``model.eval()`` of one's own is undone.

Example::

    from convbn_inductor_pass.integrations.transformers import TuneModeCallback

    args = TrainingArguments(..., torch_compile=True)
    Trainer(model, args, callbacks=[TuneModeCallback()], ...).train()
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import TrainerCallback

from ..freeze import freeze_batch_norms
from ..plugin import enable

__all__ = ["TuneModeCallback"]


class TuneModeCallback(TrainerCallback):
    """Turns tune mode on, and keeps batch norms in eval mode while ``train`` runs and after it.

    Args:
        modules: which batch norms, as for ``freeze_batch_norms``: paths in the model, or patterns
            of these. By default all.
        options: as for ``enable``.
    """

    def __init__(self, modules: Iterable[str] | None = None, **options: Any) -> None:
        self.modules = None if modules is None else list(modules)
        self.options = options

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Once the model is wrapped, and before its first step, which compiles it."""
        enable(**self.options)
        freeze_batch_norms(kwargs["model"], self.modules)
