"""``freeze_batch_norms``: keeps batch norms in eval mode when a trainer calls ``model.train()``.

A frozen batch norm has its own ``train`` as an instance attribute: a ``functools.partial``, which
can be copied and pickled, unlike a closure or a bound method. The class does not change, for
``fully_shard`` and ``isinstance``, and forward is not touched, compiled or not.
"""

import fnmatch
import functools
import itertools
from collections.abc import Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def freeze_batch_norms(
    model: nn.Module, modules: Iterable[str | nn.Module] | None = None
) -> nn.Module:
    """Put batch norms in eval mode, and keep them there when ``model.train()`` is called.

    Everything else still follows ``train()``. Copies and pickles are frozen, too; loading such a
    pickle requires this package. Returns ``model``.

    Freeze after ``SyncBatchNorm.convert_sync_batchnorm``, which creates new modules, and unfreeze
    before ``torch.optim.swa_utils.update_bn``, which could not recompute the statistics.

    Args:
        model: any module; it may be compiled, wrapped in DDP or sharded, before or after this call.
        modules: modules of ``model``, their paths, or patterns such as ``"backbone.*"``, for the
            batch norms inside. A second call adds to the first.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: there is no batch norm in ``model``, or in one of ``modules``; the model is then
            unchanged.
    """
    norms = _batch_norms(model)
    if not norms:
        raise ValueError(f"there is no batch norm in this {type(model).__name__}")
    for norm in _choose(norms, modules):
        norm.train = functools.partial(_train_but_stay_in_eval_mode, norm)  # type: ignore[method-assign]
        norm.train(norm.training)
    return model


def unfreeze_batch_norms(model: nn.Module) -> nn.Module:
    """Undo :func:`freeze_batch_norms`: batch norms get the mode of ``model``, and follow it again.

    Batch norms that are not frozen are left alone. Returns ``model``.

    Raises:
        TypeError: ``model`` is not a module.
    """
    for norm in _batch_norms(model).values():
        if is_frozen(norm):
            del norm.train
            norm.train(model.training)
    return model


def is_frozen(module: nn.Module) -> bool:
    """Whether it is a batch norm that stays in eval mode."""
    return getattr(module.__dict__.get("train"), "func", None) is _train_but_stay_in_eval_mode


def _train_but_stay_in_eval_mode(norm: _BatchNorm, mode: bool = True) -> _BatchNorm:
    type(norm).train(norm, mode)  # the class's own, for submodules: timm's have an activation
    norm.training = False
    return norm


def _batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """All batch norms by path; one that is used in several places has several paths."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {describe(model)}")
    named = model.named_modules(remove_duplicate=False)
    return {path: m for path, m in named if isinstance(m, _BatchNorm)}


def _choose(
    norms: dict[str, _BatchNorm], modules: Iterable[str | nn.Module] | None
) -> list[_BatchNorm]:
    if modules is None:
        return list(norms.values())
    if isinstance(modules, str) or not isinstance(modules, Iterable):
        raise ValueError(f"modules must be a list such as ['backbone'], got {describe(modules)}")
    chosen: list[_BatchNorm] = []
    for each in modules:
        inside = {*each.modules()} if isinstance(each, nn.Module) else ()
        found = [n for path, n in norms.items() if n in inside or _matches(path, each)]
        if not found:
            paths = ", ".join(list(norms)[:3])
            raise ValueError(f"no batch norm in {describe(each)}; the model has: {paths}, ...")
        chosen += found
    if not chosen:
        raise ValueError("modules is empty: leave it out for all batch norms")
    return chosen


def _matches(path: str, pattern: str | nn.Module) -> bool:
    """Whether a pattern matches ``path``, or the path of an enclosing module."""
    parts = path.replace("_orig_mod.", "").split(".")  # without torch.compile's wrapper
    outer = itertools.accumulate(parts, "{}.{}".format)
    return isinstance(pattern, str) and any(fnmatch.fnmatchcase(p, pattern) for p in outer)


def describe(value: object) -> str:
    """A one-line description; the ``repr`` of a module has many lines."""
    return f"a {type(value).__name__}" if isinstance(value, nn.Module) else repr(value)
