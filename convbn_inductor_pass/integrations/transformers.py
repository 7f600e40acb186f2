"""Transformers: a callback that trains with batch norms in eval mode, in tune mode if compiled."""

from typing import Any

from transformers import TrainerCallback

from . import TuneMode


class TuneModeCallback(TuneMode, TrainerCallback):
    """:class:`.TuneMode` from the start of ``train``, with the same arguments."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.enable()
        self.freeze(kwargs["model"])
