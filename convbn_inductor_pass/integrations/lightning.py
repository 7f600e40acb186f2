"""Lightning: a callback that trains with batch norms in eval mode, and in tune mode if compiled.

Example::

    from convbn_inductor_pass.integrations.lightning import TuneModeCallback

    trainer = lightning.Trainer(callbacks=[TuneModeCallback(["backbone"])])
    trainer.fit(torch.compile(module), loader)

For ``lightning`` and ``pytorch_lightning``, 2.2 or later.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

from ..freeze import freeze_batch_norms
from ..plugin import enable

_LIBRARY = "lightning.pytorch" if importlib.util.find_spec("lightning") else "pytorch_lightning"
Callback: Any = importlib.import_module(_LIBRARY).Callback

__all__ = ["TuneModeCallback"]


class TuneModeCallback(Callback):
    """Turns tune mode on, and keeps batch norms in eval mode while ``fit`` runs and after it.

    Args:
        modules: which batch norms, as for ``freeze_batch_norms``: paths in the LightningModule, or
            patterns of these. By default all.
        options: as for ``enable``.
    """

    def __init__(self, modules: Iterable[str] | None = None, **options: Any) -> None:
        self.modules = None if modules is None else list(modules)
        self.options = options

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Before anything is compiled, which the validation before training may cause."""
        if stage == "fit":
            enable(**self.options)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Once the model is built, wrapped and, with ``sync_batchnorm=True``, converted."""
        freeze_batch_norms(pl_module, self.modules)
