"""MMEngine: a hook that trains with batch norms in eval mode, and in tune mode if compiled.

It takes the place of MMEngine's ``efficient_conv_bn_eval`` and of a backbone's ``norm_eval``.
"""

from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS

from . import TuneMode


@HOOKS.register_module()
class TuneModeHook(TuneMode, Hook):
    """:class:`.TuneMode` from the start of ``train``, with the same arguments."""

    def before_train(self, runner: Any) -> None:
        self.enable()
        self.freeze(runner.model.module if is_model_wrapper(runner.model) else runner.model)
