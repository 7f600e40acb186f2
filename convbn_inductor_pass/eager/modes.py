"""``turn_on`` and ``turn_off``: the four modes of conv-BN blocks, without ``torch.compile``.

Source: "Efficient ConvBN Blocks for Transfer Learning and Beyond", arXiv 2305.11624.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..freeze import describe, is_frozen
from ..records import Record
from . import deploy
from .events import Ledger
from .intercept import Hook, add_hooks, callers, forget_interrupted, remove_hooks

Mode = Literal["train", "eval", "tune", "deploy"]
_ATTRIBUTE = "_convbn_mode"


@dataclasses.dataclass
class _State:
    """Stored on the model: what is needed to undo :func:`turn_on`. Holds paths, not modules."""

    mode: Mode
    training: dict[str, bool]
    ledger: Ledger
    replaced: list[deploy.Replaced] = dataclasses.field(default_factory=list)
    deployed: list[Record] = dataclasses.field(default_factory=list)


def turn_on(
    model: nn.Module,
    mode: Mode = "tune",
    *,
    modules: Sequence[str] | None = None,
    example_inputs: tuple[Any, ...] | None = None,
) -> nn.Module:
    """Put the conv-BN blocks of a model in one of four modes, in place; returns ``model``.

    Blocks are found while the model runs: modules may be nested, wrapped, reused or called as
    functions. ``model.train()`` still puts batch norms in training mode; call ``turn_on`` again
    after it. Under ``torch.compile`` this does nothing; the compiled pass takes over.

    Args:
        model: the model. Copies and pickles of it keep the mode.
        mode: ``"train"``, ``"eval"``: the batch norms' own modes. ``"tune"``: eval mode, with
            bitwise identical outputs, that does not save the convolutions' outputs where that is
            provably legal and pays off (see :func:`decisions`). ``"deploy"``: the blocks become
            plain convolutions with new parameters, each batch norm an empty ``nn.Sequential``. For
            inference only: training them is unstable.
        modules: paths of submodules (``["backbone"]``) to restrict this to.
        example_inputs: for ``"deploy"``, inputs for the forwards that find the blocks, run under
            ``no_grad`` in eval mode. If not given, the inputs of the first forward are used;
            parameters change after it, so create the optimizer later.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: unknown mode or module path, nothing to pair there, or batch norms to be trained
            that are frozen; the model is then unchanged.
    """
    if mode not in get_args(Mode):
        allowed = ", ".join(repr(m) for m in get_args(Mode))
        raise ValueError(f"mode must be one of {allowed}, got {mode!r}")
    if example_inputs is not None and mode != "deploy":
        raise ValueError(f"example_inputs are for mode 'deploy', not {mode!r}")
    if not isinstance(example_inputs, tuple | None):
        kind = type(example_inputs).__name__
        raise ValueError(f"example_inputs must be a tuple such as (batch,), got a {kind}")
    given, model = model, getattr(model, "_orig_mod", model)  # what torch.compile wraps
    scopes = _scopes(model, modules, mode)
    if example_inputs is not None:
        deploy.run_once(model, example_inputs, {})  # what it raises, it raises before any change
    turn_off(model)
    state = _State(mode, {}, Ledger())
    norms = {m for scope in scopes for m in scope.modules() if isinstance(m, _BatchNorm)}
    for path, module in model.named_modules():
        if module in norms:
            state.training[path] = module.training
            module.train(mode == "train")
    object.__setattr__(model, _ATTRIBUTE, state)
    if mode == "tune":
        for scope in scopes:
            add_hooks(scope, state.ledger)
    if mode == "deploy":
        advice = "training merged convolutions is unstable; use mode='tune' to train at this cost"
        warnings.warn(f"deploy mode is for inference: {advice}", stacklevel=2)
        merge = _Merge(state.ledger)
        if example_inputs is not None:
            merge(model, example_inputs, {})
        else:
            model.register_forward_hook(merge, with_kwargs=True)
    return given


def turn_off(model: nn.Module) -> nn.Module:
    """Undo :func:`turn_on`: hooks, training flags of batch norms, parameters merged by deploy.

    Training done in deploy mode is lost. A model that was never turned on is left alone.
    Returns ``model``.
    """
    forget_interrupted()
    given, model = model, getattr(model, "_orig_mod", model)
    state: _State | None = getattr(model, _ATTRIBUTE, None)
    if state is None:
        return given
    remove_hooks(model, state.ledger)
    for path, name, value in state.replaced:
        setattr(model.get_submodule(path), name, value)
    norms = dict(model.named_modules(remove_duplicate=False))
    for path, training in state.training.items():
        norm = norms.get(path)
        # If it is not as turn_on left it, other code has changed it.
        if norm is not None and norm.training == (state.mode == "train"):
            norm.train(training)
    delattr(model, _ATTRIBUTE)
    return given


def decisions(model: nn.Module) -> tuple[Record, ...]:
    """What was done with each batch norm, in the last forward or when merged for deploy, and why.

    One record per call of a batch norm (per batch norm in deploy mode), with the codes of the
    compiled pass. Parts of the model that were turned on separately are included.
    """
    names = deploy.tensor_paths(model)
    made: dict[Any, Record] = {}
    for m in model.modules():
        state: _State | None = vars(m).get(_ATTRIBUTE)
        if state is not None:
            made.update({("deploy", r.batch_norm): r for r in state.deployed})
            for events in list(state.ledger.forwards.values()):
                made.update({k: e.record(names) for k, e in events.items() if e.code})
    return tuple(made.values())


def _scopes(model: nn.Module, modules: Sequence[str] | None, mode: Mode) -> list[nn.Module]:
    """The modules to be turned on, in which there is something to pair."""
    if isinstance(modules, str):
        raise ValueError(f"modules must be a list of module paths such as [{modules!r}]")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {model!r}")
    paths = dict(model.named_modules(remove_duplicate=False))
    chosen = [""] if modules is None else modules
    unknown = [m for m in chosen if m not in paths]
    if unknown or not chosen:
        children = ", ".join(repr(n) for n, _ in model.named_children())
        raise ValueError(
            f"no module at {', '.join(map(describe, unknown)) or '[]'}; they are given by path, "
            f"the top-level ones here are: {children}"
        )
    scopes, kinds = [paths[m] for m in chosen], (_BatchNorm, deploy.MergedBatchNorm)
    inside = [m for scope in scopes for m in scope.modules()]
    layers = sum(p.ndim >= 2 for scope in scopes for p in scope.parameters())
    norms = sum(isinstance(m, kinds) for m in inside)
    if not layers or not norms:
        where = ", ".join(map(repr, modules or ())) or "the model"
        raise ValueError(
            f"nothing to pair in {where}: it needs a convolution or linear layer and a batch norm, "
            f"but has {layers} layer weights and {norms} batch norms"
        )
    if mode == "train" and any(is_frozen(m) for m in inside):
        raise ValueError("batch norms are frozen: call unfreeze_batch_norms(model) first")
    uncalled = [m for m in chosen if not callers(paths[m], kinds)]
    if uncalled and mode == "tune":
        raise ValueError(
            f"no module in {', '.join(map(repr, uncalled))} calls a batch norm, as a ModuleList "
            "does not: give the module whose forward calls it"
        )
    return scopes


class _Merge(Hook):
    """Finds and merges the pairs; a forward hook where there are no example inputs."""

    def __call__(self, model: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        if not torch.compiler.is_compiling():
            state: _State = getattr(model, _ATTRIBUTE)
            remove_hooks(model, state.ledger)
            state.replaced, state.deployed = deploy.merge_pairs(model, args, kwargs, state.training)
