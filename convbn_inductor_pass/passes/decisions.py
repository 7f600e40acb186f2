"""Decisions: tables of refusals, the modules that the options leave out, and records."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import fx

from .._torch import compat
from ..codes import Code
from ..config import Options
from ..graph.layers import bytes_of, value_of
from ..graph.provenance import module_path, name_of, source_line
from ..records import Record

Row = tuple[Code, Callable[..., "str | None"]]
"""A code, and a function that returns a detail if it applies, None if not."""


def first_refusal(rows: Iterable[Row], *about: Any) -> tuple[Code, str] | None:
    """The code and the detail of the first of ``rows`` that applies to ``about``."""
    found = ((code, applies(*about)) for code, applies in rows)
    return next(((code, detail) for code, detail in found if detail is not None), None)


def denied(options: Options, *nodes: fx.Node) -> str | None:
    """The module paths of ``nodes`` if ``allow`` and ``deny`` leave them out, else None."""
    paths = dict.fromkeys(map(module_path, nodes))
    return None if options.allows(*paths) else " and ".join(filter(None, paths))


def record_of(node: fx.Node | None, *, at: fx.Node | None = None, **fields: Any) -> Record:
    """A record about the result of ``node``, if there is one, and the user's line of ``at``."""
    if node is not None:
        fields["layer"] = name_of(node)
        fields["output_shape"] = compat.shape_of(value_of(node))
        fields["output_bytes"] = bytes_of(node)
    line = at or node
    return Record(source="" if line is None else source_line(line), **fields)
