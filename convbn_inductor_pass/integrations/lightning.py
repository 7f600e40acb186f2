"""Lightning: a callback that trains with batch norms in eval mode, and in tune mode if compiled.

For ``lightning`` and ``pytorch_lightning``, 2.2 or later.
"""

import importlib.util
from typing import Any

from . import TuneMode

_LIBRARY = "lightning.pytorch" if importlib.util.find_spec("lightning") else "pytorch_lightning"
Callback: Any = importlib.import_module(_LIBRARY).Callback


class TuneModeCallback(TuneMode, Callback):
    """:class:`.TuneMode` from the start of ``fit``, with the same arguments."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        # Validation before training may already compile the model.
        if stage == "fit":
            self.enable()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.freeze(pl_module)
