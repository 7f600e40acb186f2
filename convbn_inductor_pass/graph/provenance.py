"""Provenance of a node in the user's model, as tracing recorded it: module and line of code."""

import re
from typing import Any

from torch import fx

# Of a call, what stays true of one that takes its place.
_KEPT = ("stack_trace", "nn_module_stack", "fwd_nn_module_stack", "seq_nr", "partitioner_tag")

_ROOT = re.compile(r"^[A-Z]\W\w+\.?")  # Dynamo's name of the outermost module: L['self'].
_FILE_LINE = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


def provenance_of(node: fx.Node) -> dict[str, Any]:
    """Metadata for calls that take the place of ``node``: where that came from."""
    return {k: v for k, v in node.meta.items() if k in _KEPT}


def module_path(node: fx.Node) -> str:
    """Path of the module that a node comes from, as in ``named_modules()``; "" if unknown."""
    # A node of the backward has that of the node whose gradient it computes.
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return ""
    path = str(next(reversed(stack.values()))[0])
    path = _ROOT.sub("", path.replace("._modules['", ".").replace("']", "").replace("['", "."))
    return path.replace("_orig_mod.", "")  # torch.compile's wrapper


def source_line(node: fx.Node) -> str:
    """File and line of the user's code that made the call, outside ``torch.nn``; "" if unknown."""
    frames = _FILE_LINE.findall(node.meta.get("stack_trace") or "")
    outside = [f for f in frames if "/torch/nn/" not in f[0]]
    return "{}:{}".format(*(outside or frames)[-1]) if frames else ""
