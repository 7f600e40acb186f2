"""What every pass shares: flag, cache key, guard, log, records, counter; and refusals."""

import dataclasses
import functools
import hashlib
import json
import logging
import pathlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import fx
from torch._logging import trace_structured

from .. import announce
from .._torch import compat, registry
from ..codes import Code
from ..config import Options, get_options
from ..graph.layers import bytes_of, value_of
from ..graph.provenance import module_path, source_line
from ..records import PassFailedWarning, Record, log, publish


class Outcome(NamedTuple):
    """What a pass did to one graph: the number of rewrites, and a record per decision."""

    rewritten: int
    records: tuple[Record, ...] = ()


class Pass(registry.CustomGraphPass):
    """A graph pass of this package; does nothing while PyTorch's flag is False.

    A subclass has a ``name``, the ``hook`` of Inductor's that calls it, and ``run``. Rewrites are
    counted in ``torch._dynamo.utils.counters["inductor"]``, under ``convbn_inductor_pass_{name}``
    and under ``also_counted``.
    """

    name: ClassVar[str]
    hook: ClassVar[str]
    also_counted: ClassVar[tuple[str, ...]] = ()
    KEY: ClassVar[str] = "convbn_inductor_pass.records"  # in a node's metadata

    # Rewrites a graph in place (mask_bits two: forward and backward). If it raises, the graph
    # must be correct as it is then.
    run: Callable[..., Outcome]

    def __call__(self, graph: fx.Graph, *others: fx.Graph) -> None:
        if not registry.is_enabled():
            return
        from torch._dynamo.utils import counters  # here: importing a pass loads no compiler

        announce.listen()
        debug = log.isEnabledFor(logging.DEBUG)
        before = graph.python_code("self", verbose=True).src if debug else ""
        try:
            outcome = self.run(graph, *others)
        except Exception as error:
            # A user's compilation must not fail because of an optimization.
            warnings.warn(
                f"convbn_inductor_pass.{self.name} failed and was skipped: "
                f"{type(error).__name__}: {error}",
                PassFailedWarning,
                stacklevel=2,
            )
            log.warning("%s failed and was skipped", self.name, exc_info=True)
            return
        if debug and outcome.rewritten:
            log.debug("before %s\n%s", self.name, before)
            after = graph.python_code("self", verbose=True).src
            log.debug("after %s\n%s", self.name, after)
        for node in graph.nodes if outcome.records else ():
            if node.op == "call_function":  # for DecisionLogPass
                node.meta[self.KEY] = (*node.meta.get(self.KEY, ()), outcome.records)
        name = f"convbn_inductor_pass_{self.name}"
        for counter in (name, *self.also_counted) if outcome.rewritten else ():
            counters["inductor"][counter] += outcome.rewritten
        if outcome.records:
            publish(outcome.records)
            trace_structured(
                "artifact",
                metadata_fn=lambda: {"name": name, "encoding": "json"},
                payload_fn=lambda: json.dumps([r.to_dict() for r in outcome.records], indent=1),
            )

    def uuid(self) -> Any:
        """Part of Inductor's cache keys: the package's source files, the options, and settings."""
        # Of PyTorch's settings, those that decisions depend on and that are in no key otherwise.
        cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
        libraries = (cudnn.enabled, cudnn.deterministic, mkldnn.enabled)
        key = f"convbn_inductor_pass.{self.name} {[*map(bool, libraries)]}"
        if not registry.is_enabled():
            return f"{key} off"
        announce.listen()  # here as well, because no pass is called if the code is in the cache
        decisive = dataclasses.replace(get_options(), announce=True)
        options = hashlib.sha256(repr(decisive).encode()).hexdigest()
        return f"{key} {sources_hash()} {options}"

    def __deepcopy__(self, memo: Any) -> "Pass":
        return self  # Inductor's configuration copies what a thread reads for the first time

    def __reduce__(self) -> tuple[Any, ...]:
        # torch 2.11 pickles the pass into cache keys, where only the uuid may count.
        return _unpickle, (type(self), self.uuid())


class DecisionLogPass(Pass):
    """Stores decisions with the compiled code, for :func:`records` after a cache hit.

    Runs on the forward after the others, and changes nothing. The partitioner copies the metadata
    of calls, to which each pass attaches its records.
    """

    name = "decision_log"
    hook = "post_grad_custom_pre_pass"

    def run(self, graph: fx.Graph) -> Outcome:
        from .._torch import store
        from ..graph.uses import backward_of

        found = {id(made): made for node in graph.nodes for made in node.meta.get(self.KEY, ())}
        if found and not backward_of(graph):
            store.put(json.dumps([r.to_dict() for made in found.values() for r in made]))
        return Outcome(0)


def _unpickle(kind: type[Pass], _uuid: str) -> Pass:
    from . import PASSES

    return next(p for p in PASSES if type(p) is kind)


@functools.cache
def sources_hash(root: pathlib.Path = pathlib.Path(__file__).parent.parent) -> str:
    """Hash of the Python files under ``root``, this package's, by relative name and content."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


Refusals = Iterator[tuple[Code, str]]
"""Codes with details, one for each reason to refuse. The first counts; no other is computed."""


def denied(options: Options, *nodes: fx.Node) -> str | None:
    """The module paths of ``nodes`` if ``allow`` and ``deny`` leave them out, else None."""
    paths = dict.fromkeys(map(module_path, nodes))
    return None if options.allows(*paths) else " and ".join(filter(None, paths))


def record_of(node: fx.Node | None, *, at: fx.Node | None = None, **fields: Any) -> Record:
    """A record about the result of ``node``, if there is one, and the user's line of ``at``."""
    if node is not None:
        fields["layer"] = module_path(node) or str(node)
        fields["output_shape"] = compat.shape_of(value_of(node))
        fields["output_bytes"] = bytes_of(node)
    line = at or node
    return Record(source="" if line is None else source_line(line), **fields)
