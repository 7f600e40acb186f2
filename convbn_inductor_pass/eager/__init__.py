"""``turn_on`` and ``turn_off``: tune mode without ``torch.compile``."""
