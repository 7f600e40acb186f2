"""The paper's experiments, small, on data that comes inside a package. One module, one claim."""

from __future__ import annotations

from types import ModuleType

from . import adversarial, bn_tuning, detection, stability, transfer

__all__ = ["EXPERIMENTS"]

# Each has a function run().
EXPERIMENTS: dict[str, ModuleType] = {
    "transfer": transfer,
    "stability": stability,
    "adversarial": adversarial,
    "bn_tuning": bn_tuning,
    "detection": detection,
}
