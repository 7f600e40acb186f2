"""Adapters for trainers, a module each; import the one that you use: see docs/trainers.md."""
