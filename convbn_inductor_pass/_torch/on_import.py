"""Run a callback as soon as a module is imported, without importing it.

Importing Inductor takes seconds, and a user of this package may never compile. So a finder in
``sys.meta_path`` waits for it.
"""

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

_waiting: dict[str, list[Callable[[], object]]] = {}


def when_imported(name: str, callback: Callable[[], object]) -> None:
    """Call ``callback()`` once module ``name`` is there: now, or right after its import."""
    if name in sys.modules:
        callback()
        return
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)
    _waiting.setdefault(name, []).append(callback)


class _Finder:
    @staticmethod
    def find_spec(
        name: str, path: Any, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in _waiting:
            return None
        callbacks = _waiting.pop(name)
        spec = importlib.util.find_spec(name)  # by those after us
        loader: Any = spec and spec.loader

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module  # from here on, as if the module had been found without us
            loader.exec_module(module)
            for callback in callbacks:
                callback()

        if loader is not None:
            loader.exec_module = exec_module
        return spec
