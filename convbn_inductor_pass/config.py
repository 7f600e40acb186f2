"""Options of the pass: a frozen, hashable value, part of every cache key except for ``announce``.

Whether the pass runs at all is decided by PyTorch's own flag,
``torch._inductor.config.efficient_conv_bn_eval_fx_passes``.
"""

import contextlib
import dataclasses
import fnmatch
from collections.abc import Iterator
from typing import Literal, get_args

Objective = Literal["memory", "speed"]
Forward = Literal["exact", "fold", "auto"]


@dataclasses.dataclass(frozen=True)
class Options:
    """Which of the legal rewrites to make.

    Attributes:
        objective: ``"memory"`` fuses every pair that saves bytes. ``"speed"`` skips a pair if five
            times the layer's weight is larger than its output: then scaling the weight and its
            gradient moves more bytes than reading the output once.
        fuse_frozen_layers: also fuse where the layer's weight needs no gradient but the batch
            norm's does (BN-tuning), at the cost of a weight gradient that is not needed otherwise.
        bit_masks: save masks for backward with eight elements per byte.
        forward: what forward folding does with a layer and the affine map after it, in inference
            and in the forward of training. ``"exact"``: nothing. ``"fold"`` scales the layer's
            weight each call, wherever that is legal, ``"auto"`` on CPU where fewer bytes are moved
            by estimate. Outputs then differ by rounding, and NaN may (docs/forward-folding.md).
        allow: shell-style patterns of module paths (``"backbone.*"``). If given, a layer is only
            rewritten if a pattern matches its path, or that of a batch norm or another step that
            would be fused with it.
        deny: the same, for what is never rewritten; takes precedence over ``allow``.
        announce: report in one line per model how many batch norms are in tune mode.

    In eager mode, ``turn_on`` uses only ``fuse_frozen_layers``, and its argument ``modules``.

    Raises:
        ValueError: a value is not one of those above.
    """

    objective: Objective = "memory"
    fuse_frozen_layers: bool = False
    bit_masks: bool = True
    forward: Forward = "exact"
    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    announce: bool = True

    def __post_init__(self) -> None:
        for name, choices in (("objective", Objective), ("forward", Forward)):
            if getattr(self, name) not in get_args(choices):
                allowed = ", ".join(repr(o) for o in get_args(choices))
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name in ("fuse_frozen_layers", "bit_masks", "announce"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("allow", "deny"):
            value = getattr(self, name)
            if not (isinstance(value, (tuple, list)) and all(isinstance(p, str) for p in value)):
                allowed = "a sequence of module path patterns such as ('backbone.*',)"
                raise ValueError(f"{name} must be {allowed}, got {value!r}")
            object.__setattr__(self, name, tuple(value))

    def allows(self, *module_paths: str) -> bool:
        """Whether ``allow`` and ``deny`` allow a rewrite that fuses these module paths."""

        def matches(patterns: tuple[str, ...]) -> bool:
            return any(fnmatch.fnmatchcase(m, p) for m in module_paths for p in patterns)

        return not matches(self.deny) and (not self.allow or matches(self.allow))


_current = Options()


def get_options() -> Options:
    """The options that the next compilation will use."""
    return _current


def set_options(**changes: object) -> Options:
    """Change some options for this process; returns the new value.

    As with every Inductor setting, code that is already compiled does not change until
    ``torch._dynamo.reset()``.

    Raises:
        ValueError: an unknown option or value; nothing is changed then.
    """
    global _current
    known = [field.name for field in dataclasses.fields(Options)]
    if unknown := sorted(set(changes) - set(known)):
        raise ValueError(f"unknown option {', '.join(unknown)}; known: {', '.join(known)}")
    _current = dataclasses.replace(_current, **changes)  # type: ignore[arg-type]
    return _current


@contextlib.contextmanager
def options(**changes: object) -> Iterator[Options]:
    """Like :func:`set_options`, for the duration of a ``with`` block.

    Options are process-wide: a block also applies to compilations in other threads. Blocks in two
    threads must not overlap, since each restores the options that it found.
    """
    global _current
    before = _current
    try:
        yield set_options(**changes)
    finally:
        _current = before
