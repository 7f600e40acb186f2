"""What was decided, for people: records, logs, and the trace artifact.

A record is made when the pass runs on a graph, and holds no tensor and no node. On a warm
compile cache of torch 2.12 and later the pass does not run at all: then there is no record,
which does not mean that nothing is fused. ``explain`` always traces anew.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
from typing import Any

from torch import Tensor, fx

from . import _compat
from .codes import Code, ForwardCode, ScaleCode
from .decide import Decision
from .forward_decision import ForwardDecision
from .origin import layer_path, layer_source, module_path, source_line
from .scales import ScaleDecision
from .torch_ir import ConvCall, tensor_of

__all__ = [
    "ForwardRecord",
    "Record",
    "Records",
    "ScaleRecord",
    "clear_records",
    "forward_records",
    "records",
    "scale_records",
]

log = logging.getLogger("convbn_inductor_pass")


@dataclasses.dataclass(frozen=True)
class Record:
    """The decision about one batch norm.

    Attributes:
        code: what was decided.
        detail: the nodes that it was about, "" if there is nothing to add.
        layer: module path of the convolution or linear layer, or its node's name.
        batch_norm: the same for the batch norm.
        source: the line of the user's code that called the batch norm, "" if unknown.
        output_shape: shape of the layer's output, symbolic sizes as strings.
        output_bytes: its size in bytes, which is what fusing saves; hints for symbolic sizes.
    """

    code: Code
    detail: str
    layer: str
    batch_norm: str
    source: str
    output_shape: tuple[int | str, ...]
    output_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        return {**dataclasses.asdict(self), "code": self.code.name, "reason": self.code.value}


@dataclasses.dataclass(frozen=True)
class Records:
    """All decisions about one graph."""

    records: tuple[Record, ...]

    @property
    def fused(self) -> int:
        return sum(r.code.fused for r in self.records)

    def by_code(self) -> dict[Code, int]:
        """How often each code was given, most frequent first."""
        return dict(collections.Counter(r.code for r in self.records).most_common())

    def __str__(self) -> str:
        lines = [f"{self.fused} of {len(self.records)} batch norms fused"]
        lines += [f"  {n} x {code.name}: {code.value}" for code, n in self.by_code().items()]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class ForwardRecord:
    """The kernel half's decision about one layer that something foldable follows.

    Attributes:
        code: what was decided.
        detail: the nodes that it was about, "" if there is nothing to add.
        layer: module path of the layer, or its node's name.
        epilogue: what the layer's kernel computes besides, as "relu" or "add+relu"; "" if nothing.
        source: the line of the user's code that called the layer, "" if unknown.
        output_shape: shape of the layer's output, symbolic sizes as strings.
        bytes_exact, bytes_folded: estimates of the bytes that each way moves besides reading
            the layer's inputs and writing its output, once per call.
        seconds_exact, seconds_folded: measured time of the layer and what follows it, once per
            call; None if nothing was measured.
        kernel: what computes the layer if it is rewritten, by its name in ``kernels``.
    """

    code: ForwardCode
    detail: str
    layer: str
    epilogue: str
    source: str
    output_shape: tuple[int | str, ...]
    bytes_exact: int
    bytes_folded: int
    seconds_exact: float | None = None
    seconds_folded: float | None = None
    kernel: str = "aten"

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        return {**dataclasses.asdict(self), "code": self.code.name, "reason": self.code.value}


def make_forward_records(decisions: list[ForwardDecision]) -> tuple[ForwardRecord, ...]:
    """Records of the kernel half's decisions; call it before they are applied."""
    return tuple(
        ForwardRecord(
            code=d.code,
            detail=d.detail,
            layer=layer_path(d.chain.layer.node) or str(d.chain.layer.node),
            epilogue=d.epilogue,
            source=layer_source(d.chain.layer.node),
            output_shape=_shape(d.chain.layer.out),
            bytes_exact=d.bytes_exact,
            bytes_folded=d.bytes_folded,
            seconds_exact=d.seconds_exact,
            seconds_folded=d.seconds_folded,
            kernel=d.kernel,
        )
        for d in decisions
    )


@dataclasses.dataclass(frozen=True)
class ScaleRecord:
    """The decision about one layer whose output backward sums over, for the gradients of scales.

    Attributes:
        code: what was decided.
        detail: the nodes that it was about, "" if there is nothing to add.
        layer: module path of the layer, or its node's name.
        source: the line of the user's code that called the layer, "" if unknown.
        output_shape: shape of the layer's output, symbolic sizes as strings.
        output_bytes: its size in bytes, which is what rewriting saves; hints for symbolic sizes.
    """

    code: ScaleCode
    detail: str
    layer: str
    source: str
    output_shape: tuple[int | str, ...]
    output_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        return {**dataclasses.asdict(self), "code": self.code.name, "reason": self.code.value}


def make_scale_records(decisions: list[ScaleDecision]) -> tuple[ScaleRecord, ...]:
    """Records of decisions about scales; call it before they are applied."""
    return tuple(
        ScaleRecord(
            code=d.code,
            detail=d.detail,
            layer=layer_path(d.layer.node) or str(d.layer.node),
            source=layer_source(d.layer.node),
            output_shape=_shape(d.layer.out),
            output_bytes=_compat.size_hint(d.layer.out.numel()) * d.layer.out.element_size(),
        )
        for d in decisions
    )


def _shape(tensor: Tensor) -> tuple[int | str, ...]:
    return tuple(s if isinstance(s, int) else str(s) for s in tensor.shape)


def _record(decision: Decision) -> Record:
    candidate = decision.candidate
    bn, layer = candidate.batch_norm, candidate.layer
    out = tensor_of(layer.node) if isinstance(layer, ConvCall) else None
    size = 0 if out is None else _compat.size_hint(out.numel()) * out.element_size()
    source_node = layer.node if layer is not None else candidate.source
    return Record(
        code=decision.code,
        detail=decision.detail,
        layer="" if source_node is None else module_path(source_node) or str(source_node),
        batch_norm=module_path(bn.node) or str(bn.node),
        source=source_line(bn.node),
        output_shape=() if out is None else _shape(out),
        output_bytes=size,
    )


def make_records(decisions: list[Decision]) -> Records:
    """Records of decisions; call it while the graph is still as it was decided about."""
    return Records(tuple(_record(d) for d in decisions))


# The newest graphs of this process. Bounded: a long-running process compiles many.
_history: collections.deque[Records] = collections.deque(maxlen=256)
_forward_history: collections.deque[ForwardRecord] = collections.deque(maxlen=1 << 16)
_scale_history: collections.deque[ScaleRecord] = collections.deque(maxlen=1 << 16)


def records() -> list[Records]:
    """Decisions of the graphs that the pass has seen in this process, newest last (256 at most).

    Empty after a warm compile cache hit on torch 2.12 and later, where the pass need not run.
    """
    return list(_history)


def forward_records() -> list[ForwardRecord]:
    """The kernel half's decisions in this process, newest last (65,536 at most).

    Empty after a warm compile cache hit, where the pass need not run.
    """
    return list(_forward_history)


def scale_records() -> list[ScaleRecord]:
    """Decisions about scales in this process, newest last (65,536 at most).

    Empty after a warm compile cache hit, where the pass need not run.
    """
    return list(_scale_history)


def clear_records() -> None:
    """Forget the records so far."""
    _history.clear()
    _forward_history.clear()
    _scale_history.clear()


def publish(made: Records) -> None:
    """Keep the records, log them, and add them to the structured trace (``TORCH_TRACE``)."""
    _history.append(made)
    if log.isEnabledFor(logging.INFO):
        log.info("%s", made)
        for r in made.records:
            log.debug(
                "%s -> %s: %s %s (%s)", r.layer, r.batch_norm, r.code.name, r.detail, r.source
            )
    _compat.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "convbn_inductor_pass_decisions", "encoding": "json"},
        payload_fn=lambda: json.dumps([r.to_dict() for r in made.records], indent=1),
    )


def publish_forward(made: tuple[ForwardRecord, ...]) -> None:
    """Keep the kernel half's records, log them, and add them to the structured trace."""
    _forward_history.extend(made)
    folded = sum(r.code.folded for r in made)
    log.info("forward: %d of %d layers folded with what follows them", folded, len(made))
    for r in made:
        log.debug("%s [%s]: %s %s (%s)", r.layer, r.epilogue, r.code.name, r.detail, r.source)
    _compat.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "convbn_inductor_pass_forward", "encoding": "json"},
        payload_fn=lambda: json.dumps([r.to_dict() for r in made], indent=1),
    )


def publish_scales(made: tuple[ScaleRecord, ...]) -> None:
    """Keep the records about scales, log them, and add them to the structured trace."""
    _scale_history.extend(made)
    rewritten = sum(r.code.rewritten for r in made)
    log.info("scales: %d of %d layers' outputs no longer kept for them", rewritten, len(made))
    for r in made:
        log.debug("%s: %s %s (%s)", r.layer, r.code.name, r.detail, r.source)
    _compat.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "convbn_inductor_pass_scales", "encoding": "json"},
        payload_fn=lambda: json.dumps([r.to_dict() for r in made], indent=1),
    )


def dump_graph(title: str, graph: fx.Graph) -> None:
    """Log a graph's code at debug level, and only then make it."""
    if log.isEnabledFor(logging.DEBUG):
        code = graph.python_code("self", verbose=True).src
        log.debug("%s\n%s", title, code)
