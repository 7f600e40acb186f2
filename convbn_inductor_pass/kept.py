"""What is computed from parameters alone is kept between calls, and never stale.

Before:  s, shift = f(gamma, beta, mean, var);  w = pack(s * W);  y = conv(x, w, shift)
After:   w, shift = kept([W, gamma, beta, mean, var], ...);       y = conv(x, w, shift)

oneDNN's convolution brings a weight into a layout of its own in each call. With one image that
takes a quarter of ResNet-50's time on one core. ``freezing=True`` does it when compiling, once and
for all, and later changes of the weights go unseen. ``kept`` keeps the scaled and packed weights,
too, but in each call reads the live parameters once to see whether they are those that its results
were made of (:mod:`fingerprint`; that a change goes unnoticed has a probability below 2**-61). For
a layer of which a bit has changed, what is kept is made anew.

Results are kept as long as the memory of the weight, whoever owns it: 16 at most for one weight,
the ones used last (it may be used at several places, and for several sizes of input). What a result
depends on is all in its key and its fingerprint, so that nothing but time depends on what is kept.

Only what the user's module owns counts as a parameter: what is passed in from outside may be
another in each call. In inference only, where parameters stay as they are for many calls.

How to make results travels as source code in an argument of the operator, since Inductor's caches
keep compiled code from one process to the next.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import operator
import weakref
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from . import _compat, _inductor, ops
from .aten_ir import tensor_of
from .build import erase_unused
from .fingerprint import BYTES, fingerprints, sizes_of

__all__ = ["is_parameter", "keep_packed", "made_of_parameters"]

_library = torch.library.Library("convbn_inductor_pass", "FRAGMENT")
_library.define(
    "kept(Tensor[] parameters, str digest, str program) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)


@dataclasses.dataclass(frozen=True)
class _Part:
    """A weight and its biases: a function of the parameters from ``begin`` to ``end``.

    The first of these is the weight. ``digest`` stands for all that is known when compiling, and
    ``results`` say what comes out, as far as graphs tell: dtype, sizes and strides of each.
    """

    begin: int
    end: int
    function: Callable[..., tuple[Tensor, ...]]
    digest: str
    results: list[tuple[str, list[int], list[int]]]


@dataclasses.dataclass(eq=False)
class _Result:
    """What a part has made, and the fingerprints of what it was made of."""

    made_of: bytes
    tensors: tuple[Tensor, ...]


_MOST = 16  # results for one weight
_results: MutableMapping[torch.UntypedStorage, collections.OrderedDict[Any, _Result]] = (
    weakref.WeakKeyDictionary()
)
# By program: the fingerprints in its last call, and its results if they are still there.
_last_call: dict[str, tuple[bytes, list[weakref.ref[_Result]]]] = {}
# By program: its parameters' sizes, which are part of it.
_sizes: dict[str, Any] = {}
_parts_by_digest: dict[str, tuple[_Part, ...]] = {}


@torch.library.impl(_library, "kept", "CPU")
def kept_on_cpu(parameters: list[Tensor], digest: str, program: str) -> list[Tensor]:
    """Results of all parts, which nobody may write to. Compiled code calls it by this name.

    ``parameters`` may be of subclasses of Tensor; results are not.
    """
    with _compat.torch_functions_off():
        sizes = _sizes.get(digest)
        if sizes is None:
            sizes = _sizes[digest] = sizes_of(parameters)
        made_of = fingerprints(*parameters, sizes=sizes)
        before, references = _last_call.get(digest, (b"", []))
        results = [r for r in (ref() for ref in references) if r is not None]
        if before != made_of or len(results) < len(references):
            with _compat.real_tensors(), torch.no_grad():
                results = [
                    _result(part, parameters[part.begin : part.end], _part_of(made_of, part))
                    for part in _parts(digest, program)
                ]
            _last_call[digest] = made_of, [weakref.ref(r) for r in results]
        return [tensor for result in results for tensor in result.tensors]


def _part_of(made_of: bytes, part: _Part) -> bytes:
    return made_of[BYTES * part.begin : BYTES * part.end]


def _result(part: _Part, parameters: list[Tensor], made_of: bytes) -> _Result:
    """The part's result for parameters with these fingerprints: the one that is kept, or anew."""
    weight = parameters[0]
    results = _results.setdefault(weight.untyped_storage(), collections.OrderedDict())
    key = part.digest, weight.storage_offset()
    # Taken out meanwhile: frees the memory of what is stale, and what is not comes back as the
    # latest. Another thread that looks for it then makes its own.
    result = results.pop(key, None)
    if result is None or result.made_of != made_of:
        del result
        result = _Result(made_of, part.function(*parameters))
        # Another thread may have written to the parameters since their fingerprints were taken.
        if fingerprints(*parameters) != made_of:
            return result
    results[key] = result
    if len(results) > _MOST:
        with contextlib.suppress(KeyError):  # emptied by other threads
            results.popitem(last=False)
    return result


@torch.library.impl(_library, "kept", "Meta")
def _kept_meta(parameters: list[Tensor], digest: str, program: str) -> list[Tensor]:
    # The function itself may make tensors on a device, which has nothing to do with those here.
    return [
        torch.empty_strided(sizes, strides, dtype=getattr(torch, dtype), device="meta")
        for part in _parts(digest, program)
        for dtype, sizes, strides in part.results
    ]


def _parts(digest: str, program: str) -> tuple[_Part, ...]:
    parts = _parts_by_digest.get(digest)
    if parts is None:
        begin, made = 0, []
        for layouts, source, results in json.loads(program):
            end = begin + len(layouts)
            part = _Part(begin, end, _function(source), _digest([layouts, source]), results)
            made.append(part)
            begin = end
        parts = _parts_by_digest[digest] = tuple(made)
    return parts


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


@functools.cache
def _function(source: str) -> Callable[..., tuple[Tensor, ...]]:
    return _compat.function_of_source(source)


kept = torch.ops.convbn_inductor_pass.kept.default


def is_parameter(node: fx.Node) -> bool:
    """Whether ``node`` is a parameter or buffer, of a size that is known."""
    value = tensor_of(node)
    return (
        value is not None
        and all(isinstance(size, int) for size in value.shape)
        and node in _inductor.static_inputs(node.graph)
    )


def made_of_parameters(node: fx.Node, channels: int) -> bool:
    """Whether ``node`` is computed from parameters of one number, or one per channel, alone."""
    for n in _ancestors([node]):
        value = tensor_of(n)
        if value is None or not all(isinstance(size, int) for size in value.shape):
            return False
        if value.numel() not in (1, channels):
            return False
        if n.op == "placeholder":
            if not is_parameter(n) or not value.is_contiguous():
                return False
        elif not _compat.is_pure(n.target):
            return False
    return True


def keep_packed(graph: fx.Graph) -> int:
    """Keep the weights that ``ops.pack`` packs, and the biases that go with them.

    ``graph`` is in aten IR and writes to nothing. Returns the number of weights.
    """
    packed = graph.find_nodes(op="call_function", target=ops.pack)
    for node in packed:
        erase_unused(node)  # as where a rewrite failed half-way
    groups = [_with_biases(node) for node in packed if node.users]
    if not groups:
        return 0
    parameters: list[fx.Node] = []
    program = []
    for group in groups:
        inputs, source = _program_of(group)
        parameters += inputs
        # Numbers in memory mean nothing without their sizes and strides.
        values = [tensor_of(n) for n in inputs]
        layouts = [f"{v.dtype} {list(v.shape)} {v.stride()}" for v in values if v is not None]
        made = [n.meta["val"] for n in group]
        kinds = [(str(v.dtype).split(".")[1], list(v.shape), list(v.stride())) for v in made]
        program.append((layouts, source, kinds))
    text, digest = json.dumps(program), _digest(program)
    _inductor.keep_output(kept, kept_on_cpu)
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
        value, made = tensor_of(bias), bias
        while _compat.is_view(made.target):
            made = made.all_input_nodes[0]
        # A view of a parameter stays live: kept, it would be of memory that the parameter had.
        if value is not None and made.op != "placeholder":
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
    """Inputs of the graph that ``results`` are computed from, and a function's source code.

    The first input is the weight that the first result, a packed weight, is made of.
    """
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
