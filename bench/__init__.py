"""Benchmarks of tune mode against eval mode, PyTorch's own pass, deploy mode and recomputation.

``python -m bench --help`` is the entry; README.md in this folder states the rules of
measurement. In the order of the code: ``cases`` (what is run) -> ``workload`` (one set-up for
every metric) -> ``providers`` (who runs it) -> ``metrics`` -> ``suites`` and ``runner`` (which, and
in what order) -> ``results`` -> ``reporting``. What is measured in other ways has a module for each
question: ``eager_coverage``, ``recognition``, ``readers``, ``selective``, ``gradient_error``,
``forward_error``, ``experiments``. ``commands`` runs all of them.
"""
