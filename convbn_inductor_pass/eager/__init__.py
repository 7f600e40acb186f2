"""``turn_on`` and ``turn_off``: tune mode without ``torch.compile``."""

from .modes import decisions, turn_off, turn_on

__all__ = ["decisions", "turn_off", "turn_on"]
