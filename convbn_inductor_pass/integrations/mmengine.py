"""MMEngine: a hook that trains with batch norms in eval mode, and in tune mode if compiled.

Example, in a config::

    custom_imports = dict(imports=["convbn_inductor_pass.integrations.mmengine"])
    custom_hooks = [dict(type="TuneModeHook", modules=["backbone"])]
    compile = True

It takes the place of MMEngine's ``efficient_conv_bn_eval`` and of a backbone's ``norm_eval``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS

from ..freeze import freeze_batch_norms
from ..plugin import enable

__all__ = ["TuneModeHook"]


@HOOKS.register_module()
class TuneModeHook(Hook):
    """Turns tune mode on, and keeps batch norms in eval mode while ``train`` runs and after it.

    Args:
        modules: which batch norms, as for ``freeze_batch_norms``: paths in the model, or patterns
            of these. By default all.
        options: as for ``enable``.
    """

    def __init__(self, modules: Iterable[str] | None = None, **options: Any) -> None:
        self.modules = None if modules is None else list(modules)
        self.options = options

    def before_train(self, runner: Any) -> None:
        """Once the model is wrapped, and before its first step, which compiles it."""
        enable(**self.options)
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        freeze_batch_norms(model, self.modules)
