"""How the passes get into Inductor, and out again.

``install`` adds one ``CustomGraphPass`` to ``torch._inductor.config.pre_grad_custom_pass`` and one
to ``joint_custom_pre_pass`` (the gradient half: batch norms, and other scales) and one to
``post_grad_custom_pre_pass`` (the kernel half: before Inductor's own patterns, which fuse what it
leaves), after the passes that are there. Two passes of PyTorch's are
wrapped: its own pass of the same flag steps aside, since it runs first and would take the
pairs, and freezing's folding is held back where it is wrong. ``uninstall`` undoes all of it.

Cache keys: Inductor asks the pass for its ``uuid``, which covers this package's sources, the
options, and the passes wrapped where torch takes one pass only. The flag itself is part of
Inductor's key already.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import pathlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx

from ._torch import compat
from ._torch import inductor
from .functional import conv_bn
from .passes.forward_folding import decide
from .passes import freezing
from .passes.cpu_codegen import invariants
from .passes.cpu_codegen import masks
# GONE import pipeline
from . import records
from .passes.scale_gradient import decide
from .passes.scale_gradient import rewrite
from .config import get_options

__all__ = [
    "ConvBNEvalPass",
    "ConvBNForwardPass",
    "ConvBNScalesPass",
    "PassFailedWarning",
    "install",
    "is_installed",
    "uninstall",
]


class PassFailedWarning(UserWarning):
    """The pass did not run as it should; the compilation went on without it.

    Turn it into an error in tests: ``warnings.simplefilter("error", PassFailedWarning)``.
    """


@functools.cache
def _sources_hash() -> str:
    """Hash of this package's Python files, by relative name and content."""
    digest = hashlib.sha256()
    root = pathlib.Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def _enabled() -> bool:
    return bool(inductor.config.efficient_conv_bn_eval_fx_passes)


class _Pass(inductor.CustomGraphPass):
    """What the passes share: the flag, the cache key, and that a failure costs nothing."""

    _uuid: str  # the one instance's name in Inductor's cache keys

    def __call__(self, graph: fx.Graph) -> None:
        if not _enabled():
            return
        try:
            self._run(graph)
        except Exception as error:
            # A user's compilation must not fail because of an optimisation. Every rewrite
            # leaves the graph whole, so that what is done so far is right.
            warnings.warn(
                f"convbn_inductor_pass failed and was skipped: {type(error).__name__}: {error}",
                PassFailedWarning,
                stacklevel=2,
            )
            records.log.warning("convbn_inductor_pass failed and was skipped", exc_info=True)

    def _run(self, graph: fx.Graph) -> None:
        raise NotImplementedError

    def uuid(self) -> str:
        if not _enabled():
            return f"{self._uuid}, off"
        options = repr(get_options()).encode()
        return f"{self._uuid} {_sources_hash()} {hashlib.sha256(options).hexdigest()}"

    def __reduce__(self) -> tuple[Any, ...]:
        # torch 2.11 pickles the pass into cache keys, where only the uuid may count.
        return _unpickle, (type(self), self.uuid())


def _unpickle(kind: type[_Pass], _uuid: str) -> _Pass:
    return next(p for p in _HOOKS.values() if type(p) is kind)


class ConvBNEvalPass(_Pass):
    """The pre-grad pass: gives ``layer -> eval-mode batch norm`` tune mode's gradient.

    Does nothing while ``torch._inductor.config.efficient_conv_bn_eval_fx_passes`` is False.
    """

    _uuid = "convbn_inductor_pass"

    def _run(self, graph: fx.Graph) -> None:
        decisions = pipeline.analyze(graph, get_options())
        if not decisions:
            return
        made = records.make_records(decisions)
        records.dump_graph("before", graph)
        fused = pipeline.apply(decisions)
        if fused:
            compat.counters["inductor"]["efficient_conv_bn_eval"] += fused
            for function in (conv_bn.conv_bn_eval, conv_bn.linear_bn_eval):
                inductor.mark_cacheable(function, self.uuid())
        records.dump_graph("after", graph)
        records.publish(made)


class ConvBNForwardPass(_Pass):
    """The post-grad pass: folds what follows a layer into it (``forward``).

    Also stores masks fast (``masks``), and computes once what is the same for many numbers
    (``invariants``). Folds nothing with ``forward="exact"``, the default, and does nothing at all
    while ``torch._inductor.config.efficient_conv_bn_eval_fx_passes`` is False.
    """

    _uuid = "convbn_inductor_pass, forward"

    def uuid(self) -> str:
        """What is decided depends on settings of PyTorch's, too, that no cache knows of."""
        return f"{super().uuid()} {inductor.library_settings()}"

    def _run(self, graph: fx.Graph) -> None:
        rewritten = masks.rewrite_masks(graph)
        compat.counters["inductor"]["efficient_conv_bn_eval_masks"] += rewritten
        if get_options().forward != "exact":
            self._fold(graph)
        stored = invariants.store_invariants(graph)
        compat.counters["inductor"]["efficient_conv_bn_eval_invariants"] += stored

    def _fold(self, graph: fx.Graph) -> None:
        decisions = forward.analyze(graph, get_options(), measure=True)
        if not decisions:
            return
        made = records.make_forward_records(decisions)
        records.dump_graph("before (forward)", graph)
        folded = forward.apply(decisions, graph)
        compat.counters["inductor"]["efficient_conv_bn_eval_forward"] += folded
        records.dump_graph("after (forward)", graph)
        records.publish_forward(made)


class ConvBNScalesPass(_Pass):
    """The joint pass: gradients of trainable scales from weight gradients (``scales``).

    Does nothing while ``torch._inductor.config.efficient_conv_bn_eval_fx_passes`` is False.
    """

    _uuid = "convbn_inductor_pass, scales"

    def _run(self, graph: fx.Graph) -> None:
        decisions = decide.analyze(graph, get_options())
        if not decisions:
            return
        made = records.make_scale_records(decisions)
        records.dump_graph("before (scales)", graph)
        rewritten = rewrite.apply(decisions, graph)
        compat.counters["inductor"]["efficient_conv_bn_eval_scales"] += rewritten
        records.dump_graph("after (scales)", graph)
        records.publish_scales(made)


class _InOrder(inductor.CustomGraphPass):
    """Several passes in the one place that torch 2.11 and 2.12 have for them."""

    def __init__(self, *passes: Callable[[fx.Graph], None]) -> None:
        self.passes = passes

    def __call__(self, graph: fx.Graph) -> None:
        for each in self.passes:
            each(graph)

    def uuid(self) -> Any:
        uuids = [
            p.uuid() if isinstance(p, inductor.CustomGraphPass) else None for p in self.passes
        ]
        return None if None in uuids else tuple(uuids)


_Passes = tuple[Callable[[fx.Graph], None], ...]
_HOOKS: dict[str, _Pass] = {
    "pre_grad_custom_pass": ConvBNEvalPass(),
    "joint_custom_pre_pass": ConvBNScalesPass(),
    "post_grad_custom_pre_pass": ConvBNForwardPass(),
}
_WITHOUT = {
    "pre_grad_custom_pass": "no pair is fused",
    "joint_custom_pre_pass": "scales other than batch norms' keep their layer's output",
    "post_grad_custom_pre_pass": "nothing is folded, and the rest is computed as Inductor does",
}


def _current_passes(hook: str) -> _Passes:
    """The passes of a hook, one by one, in whatever form they are configured."""
    passes = inductor.custom_passes(hook)
    if len(passes) == 1 and isinstance(passes[0], _InOrder):
        return passes[0].passes
    return passes


def _set_passes(hook: str, passes: _Passes) -> None:
    value: Any
    if not passes:
        value = None
    elif len(passes) == 1:
        value = passes[0]
    else:
        value = _InOrder(*passes) if inductor.one_pass_per_hook else list(passes)
    setattr(inductor.config, hook, value)


@contextlib.contextmanager
def passes_added(hook: str, *passes: Callable[[fx.Graph], None]) -> Iterator[None]:
    """Run further passes in one of Inductor's hooks, after those that are there."""
    before = getattr(inductor.config, hook)
    _set_passes(hook, (*_current_passes(hook), *passes))
    try:
        yield
    finally:
        setattr(inductor.config, hook, before)


class _Installation:
    """Whether we are installed, and what was in the place of each ``apply`` that we wrapped."""

    installed = False
    before: tuple[tuple[Any, Callable[..., Any] | None], ...] = ()


def install() -> None:
    """Register the passes with Inductor. Importing the package does this; again is harmless.

    Call it again if other code has overwritten one of the hooks since.
    """
    for hook, ours in _HOOKS.items():
        if ours not in _current_passes(hook):
            _set_passes(hook, (*_current_passes(hook), ours))
    if not _Installation.installed:
        wrapped = (
            (inductor.efficient_conv_bn_eval_pass(), _instead_of_builtin),
            (inductor.binary_folding_pass(), _around_freezing),
        )
        _Installation.before = tuple((p, p.__dict__.get("apply")) for p, _ in wrapped)
        for builtin, ours_instead in wrapped:
            builtin.apply = functools.partial(ours_instead, builtin.apply)
        _Installation.installed = True


def uninstall() -> None:
    """Undo :func:`install`: other passes stay, PyTorch's own pass sees the pairs again."""
    for hook, ours in _HOOKS.items():
        if ours in _current_passes(hook):
            _set_passes(hook, tuple(p for p in _current_passes(hook) if p is not ours))
    if _Installation.installed:
        _set_applies(_Installation.before)
        _Installation.installed = False


def _set_applies(applies: tuple[tuple[Any, Callable[..., Any] | None], ...]) -> None:
    for builtin, apply in applies:
        if apply is not None:
            builtin.apply = apply
        elif "apply" in builtin.__dict__:
            del builtin.apply


@contextlib.contextmanager
def installation(installed: bool) -> Iterator[None]:
    """Be installed, or not, in a ``with`` block; after it all is exactly as it was.

    That a hook was overwritten stays so, and so does the order of the passes in it.
    """
    hooks = {name: getattr(inductor.config, name) for name in _HOOKS}
    builtins = (inductor.efficient_conv_bn_eval_pass(), inductor.binary_folding_pass())
    applies = tuple((b, b.__dict__.get("apply")) for b in builtins)
    before = _Installation.installed, _Installation.before
    try:
        (install if installed else uninstall)()
        yield
    finally:
        for name, value in hooks.items():
            setattr(inductor.config, name, value)
        _set_applies(applies)
        _Installation.installed, _Installation.before = before


def is_installed() -> bool:
    """Whether Inductor will run the pass (given the flag)."""
    there = all(ours in _current_passes(hook) for hook, ours in _HOOKS.items())
    return _Installation.installed and there


def _instead_of_builtin(builtin_apply: Callable[..., Any], graph: Any) -> int:
    """Runs where PyTorch's pass of this flag would; leaves the pairs to ours.

    If ours was overwritten, the pairs are left alone rather than given to a pass that is
    known to be wrong on some of them, and the user is told; so of the other hooks.
    """
    if not _enabled():
        return builtin_apply(graph)
    for hook, ours in _HOOKS.items():
        if ours not in _current_passes(hook):
            warnings.warn(
                f"convbn_inductor_pass is installed, but {hook} was overwritten since; "
                f"{_WITHOUT[hook]}. Call convbn_inductor_pass.install() after setting your own "
                "pass, or uninstall() to get PyTorch's pass back.",
                PassFailedWarning,
                stacklevel=2,
            )
    return 0


def _around_freezing(builtin_apply: Callable[..., Any], graph: Any) -> int:
    """Runs where Inductor folds constants under ``freezing=True``."""
    if not _enabled():
        return builtin_apply(graph)
    return freezing.fold_what_is_right(builtin_apply, graph)
