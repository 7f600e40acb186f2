"""Tune mode without ``torch.compile``: ``turn_on`` and ``turn_off`` are in :mod:`modes`."""
