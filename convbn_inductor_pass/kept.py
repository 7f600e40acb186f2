"""What is computed from parameters alone is kept between calls, and never stale.

Before:  s, shift = f(gamma, beta, mean, var);  w = pack(s * W);  y = conv(x, w, shift)
After:   w, shift = kept([W, gamma, beta, mean, var], ...);       y = conv(x, w, shift)

oneDNN's convolution brings a weight into a layout of its own in each call. With one image that
takes a quarter of ResNet-50's time on one core. ``freezing=True`` does it when compiling, once and
for all, and later changes of the weights go unseen. ``kept`` keeps the scaled and packed weights,
too, but in each call reads the live parameters once to see whether they are those that its results
were made of (:mod:`fingerprint`; that a change goes unnoticed has a probability below 2**-61). For
a layer of which a bit has changed, what is kept is made anew.

Results are kept as long as the first parameter that they were made of. In inference only: what
changes in each call would be read once for nothing.

How to make them travels as source code in an argument of the operator, since Inductor's caches
keep compiled code from one process to the next.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import operator
from collections.abc import Callable, MutableMapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx

from . import _compat, ops
from .aten_ir import tensor_of
from .build import erase_unused
from .fingerprint import BYTES, fingerprints

__all__ = ["keep_packed", "made_of_parameters"]

_library = torch.library.Library("convbn_inductor_pass", "FRAGMENT")
_library.define(
    "kept(Tensor[] parameters, str digest, str program) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)


@dataclasses.dataclass(frozen=True)
class _Part:
    """A function of the parameters from ``begin`` to ``end``."""

    begin: int
    end: int
    function: Callable[..., tuple[Tensor, ...]]


class _Kept(NamedTuple):
    """The parts' results, and the fingerprints of what they were made of."""

    made_of: bytes
    results: list[tuple[Tensor, ...]]
    flat: list[Tensor]


_kept: MutableMapping[Tensor, dict[str, _Kept]] = _compat.WeakIdKeyDictionary()
_parts_by_digest: dict[str, tuple[_Part, ...]] = {}


@torch.library.impl(_library, "kept", "CPU")
def _kept_cpu(parameters: list[Tensor], digest: str, program: str) -> list[Tensor]:
    """Results of all parts, which nobody may write to."""
    made_of = fingerprints(*parameters)
    by_digest = _kept.setdefault(parameters[0], {})
    before = by_digest.get(digest)
    if before is not None and before.made_of == made_of:
        return before.flat
    results = []
    for i, part in enumerate(_parts(digest, program)):
        its = slice(BYTES * part.begin, BYTES * part.end)
        if before is not None and before.made_of[its] == made_of[its]:
            results.append(before.results[i])
        else:
            results.append(part.function(*parameters[part.begin : part.end]))
    now = _Kept(made_of, results, [tensor for result in results for tensor in result])
    by_digest[digest] = now
    return now.flat


@torch.library.impl(_library, "kept", "Meta")
def _kept_meta(parameters: list[Tensor], digest: str, program: str) -> list[Tensor]:
    parts = _parts(digest, program)
    return [t for p in parts for t in p.function(*parameters[p.begin : p.end])]


def _parts(digest: str, program: str) -> tuple[_Part, ...]:
    parts = _parts_by_digest.get(digest)
    if parts is None:
        begin, made = 0, []
        for count, _, source in json.loads(program):
            made.append(_Part(begin, begin + count, _function(source)))
            begin += count
        parts = _parts_by_digest[digest] = tuple(made)
    return parts


@functools.cache
def _function(source: str) -> Callable[..., tuple[Tensor, ...]]:
    return _compat.function_of_source(source)


kept = torch.ops.convbn_inductor_pass.kept.default


def made_of_parameters(node: fx.Node | None, channels: int) -> bool:
    """Whether ``node`` is computed from nothing but inputs with one number, or one per channel.

    Such inputs are parameters, or as good: what comes from an activation has more numbers on
    its way. None is computed from nothing.
    """
    ancestors = [] if node is None else _ancestors([node])
    for n in ancestors:
        value = tensor_of(n)
        if value is None or value.numel() not in (1, channels) or not value.is_contiguous():
            return False
        if n.op != "placeholder" and not _compat.is_pure(n.target):
            return False
    return True


def keep_packed(graph: fx.Graph) -> int:
    """Keep the weights that ``ops.pack`` packs, and the biases that go with them.

    ``graph`` is in aten IR and writes to nothing. Returns the number of weights.
    """
    groups = [_with_biases(node) for node in graph.find_nodes(op="call_function", target=ops.pack)]
    if not groups:
        return 0
    parameters: list[fx.Node] = []
    program = []
    for group in groups:
        inputs, source = _program_of(group)
        parameters += inputs
        # Numbers in memory mean nothing without their sizes and strides.
        values = [tensor_of(n) for n in inputs]
        layout = [f"{v.dtype} {list(v.shape)} {v.stride()}" for v in values if v is not None]
        program.append((len(inputs), layout, source))
    text = json.dumps(program)
    digest = hashlib.sha256(text.encode()).hexdigest()[:32]
    _compat.keep_output(kept)
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        call = graph.call_function(kept, (parameters, digest, text))
    results = [(node, users) for group in groups for node, users in _users(group)]
    after = call
    for i, (node, users) in enumerate(results):
        with graph.inserting_after(after):
            after = graph.call_function(operator.getitem, (call, i))
        after.meta = dict(node.meta)
        for user in users:
            user.replace_input_with(node, after)
    call.meta["val"] = [n.meta["val"] for group in groups for n in group]
    for group in groups:
        for node in group:
            erase_unused(node)
    return len(groups)


def _with_biases(packed: fx.Node) -> list[fx.Node]:
    """A packed weight, and the biases of the convolutions with it if they can be kept, too."""
    biases = {u.args[2]: None for u in packed.users if isinstance(u.args[2], fx.Node)}
    found = [packed]
    for bias in biases:
        value = tensor_of(bias)
        if value is not None and bias.op == "call_function":
            found += [bias] * made_of_parameters(bias, value.numel())
    return found


def _users(group: list[fx.Node]) -> list[tuple[fx.Node, list[fx.Node]]]:
    """The convolutions that take each of a group's results."""
    convs = list(group[0].users)
    return [(node, [c for c in convs if node in c.args]) for node in group]


def _ancestors(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """``nodes`` and all that they are computed from, in an order in which that can be done."""
    found: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> None:
        if node not in found:
            for source in node.all_input_nodes:
                visit(source)
            found[node] = None

    for node in nodes:
        visit(node)
    return list(found)


def _program_of(results: Sequence[fx.Node]) -> tuple[list[fx.Node], str]:
    """Inputs of the graph that ``results`` are computed from, and a function's source code."""
    graph, inputs = fx.Graph(), []
    copies: dict[fx.Node, fx.Node] = {}
    for node in _ancestors(results):
        if node.op == "placeholder":
            inputs.append(node)
            copies[node] = graph.placeholder(f"p{len(inputs)}")
    for node in _ancestors(results):
        if callable(node.target):
            args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
            copies[node] = graph.call_function(node.target, args, kwargs)
    graph.output(tuple(copies[node] for node in results))
    return inputs, graph.python_code("self").src
