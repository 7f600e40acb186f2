"""Where a node comes from in the user's model: the module, and the line of code.

Both are read off what tracing recorded. A pair's one call has its batch norm's record, as what
stands in the batch norm's place; what is the layer's is kept beside it (:func:`note_layer`), so
that the later passes, which find the layer again in that call's decomposition, know it by its name.
"""

from __future__ import annotations

import re
from typing import Any

from torch import fx

__all__ = ["layer_path", "layer_source", "module_path", "note_layer", "source_line"]

# Annotations under "custom" are the one record that tracing passes on and does not interpret.
_KEY = "convbn_inductor_pass.layer"
_ROOT = re.compile(r"^[A-Z]\W\w+\.?")  # Dynamo's name of the outermost module: L['self'].
_FILE_LINE = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


def module_path(node: fx.Node) -> str:
    """Path of the module that a node comes from, as in ``named_modules()``; "" if unknown."""
    if node.op == "call_module":
        return str(node.target)
    # A node of the backward has that of the node whose gradient it computes.
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return ""
    path = str(next(reversed(stack.values()))[0])
    return _ROOT.sub("", path.replace("._modules['", ".").replace("']", "").replace("['", "."))


def source_line(node: fx.Node) -> str:
    """File and line of the user's code that made the call, "" if unknown.

    That is the innermost frame outside torch of the stack trace that tracing recorded.
    """
    frames = _FILE_LINE.findall(node.meta.get("stack_trace") or "")
    outside = [f for f in frames if "/torch/nn/" not in f[0]]
    return "{}:{}".format(*(outside or frames)[-1]) if frames else ""


def note_layer(fused: fx.Node, layer: fx.Node) -> None:
    """Keep where ``layer`` comes from with the call that computes it from now on."""
    noted = {"path": module_path(layer), "source": source_line(layer)}
    if any(noted.values()):
        fused.meta["custom"] = {**(fused.meta.get("custom") or {}), _KEY: noted}


def layer_path(node: fx.Node) -> str:
    """:func:`module_path` of a layer, also of one that was fused."""
    return _noted(node).get("path") or module_path(node)


def layer_source(node: fx.Node) -> str:
    """:func:`source_line` of a layer, also of one that was fused."""
    return _noted(node).get("source") or source_line(node)


def _noted(node: fx.Node) -> dict[str, Any]:
    return (node.meta.get("custom") or {}).get(_KEY) or {}
