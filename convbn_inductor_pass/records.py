"""Decisions as users see them: records, logs, and the trace artifact.

A record is made when a pass runs on a graph, and holds no tensor and no node.
"""

import collections
import dataclasses
import json
import logging
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from .codes import Code

log = logging.getLogger("convbn_inductor_pass")
if log.level == logging.NOTSET:
    log.setLevel(logging.INFO)  # or the one-line report (announce.py) would not be shown


class PassFailedWarning(UserWarning):
    """A pass failed or could not run; the compilation continued without it (docs/testing.md)."""


Kind = Literal["batch norm", "scale", "shape", "activation", "pooling", "mask", "layer"]


@dataclasses.dataclass(frozen=True)
class Record:
    """The decision about one batch norm, other scale, tensor saved for backward, or layer.

    Attributes:
        pass_name: "scale_gradient", "wanted_gradients", "mask_bits", "forward_folding" or "eager".
        kind: "batch norm" for each call of one; "scale" for a layer whose output backward would sum
            over for the gradient of other scales; "shape", "activation", "pooling" and "mask" for a
            tensor that a rule of ``passes.wanted_gradients`` covers; "layer" in forward folding.
        code, detail: what was decided, and the nodes concerned.
        layer: module path of the convolution or linear layer, or of what computes the tensor, or
            the node's name.
        batch_norm: the same of the batch norm.
        source: file and line of the user's call.
        output_shape, output_bytes: of the layer's output, or of the tensor: symbolic sizes are
            strings, bytes the example's.
        bytes_saved: bytes not saved for backward because of this decision. From ``explain``, how
            much less the partitioner saves; while compiling, the size of the layer's output.
        epilogue: what the folded layer's kernel also computes: "relu", "add+relu", ...
        kernel: "cudnn", "onednn" or "aten": what computes the layer if it is folded.
        bytes_exact, bytes_folded: bytes moved as written and folded, besides the layer's own input
            and output, by estimate.

    What is unknown, or concerns other kinds, is "" or 0; the last four are of forward folding.
    """

    pass_name: str
    kind: Kind
    code: Code
    detail: str = ""
    layer: str = ""
    batch_norm: str = ""
    source: str = ""
    output_shape: tuple[int | str, ...] = ()
    output_bytes: int = 0
    bytes_saved: int = 0
    epilogue: str = ""
    kernel: str = ""
    bytes_exact: int = 0
    bytes_folded: int = 0

    def __str__(self) -> str:
        """One line: the pass, the modules, the decision, and the user's source line."""
        norm = f" -> {self.batch_norm}" if self.kind == "batch norm" else ""
        detail = f" {self.detail}" if self.detail else ""
        where = f" ({self.source})" if self.source else ""
        return f"{self.pass_name}: {self.layer or '-'}{norm} {self.code.name}{detail}{where}"

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        return {**dataclasses.asdict(self), "code": self.code.name, "reason": self.code.value}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Record":
        """The inverse of :meth:`to_dict`, of the same version; else a KeyError or TypeError."""
        fields = {k: v for k, v in data.items() if k != "reason"}
        fields["code"] = Code[fields["code"]]
        fields["output_shape"] = tuple(fields["output_shape"])
        return cls(**fields)


def summary(found: Iterable[Record]) -> str:
    """How many calls of batch norms are in tune mode, and how often each other code was given.

    A call counts once in each graph: a recompilation is another one.
    """
    norms = [r for r in found if r.kind == "batch norm"]
    in_tune_mode = (Code.FUSED, Code.WEIGHT_COPY)
    left = collections.Counter(r.code for r in norms if r.code not in in_tune_mode)
    lines = [f"{len(norms) - left.total()} of {len(norms)} batch norms in tune mode"]
    lines += [f"  {n} x {code.name}: {code.value}" for code, n in left.most_common()]
    return "\n".join(lines)


# The newest records of this process, those that :func:`take_new` has not returned yet apart.
# Bounded: a long-running process compiles many.
_taken: collections.deque[Record] = collections.deque(maxlen=1 << 16)
_new: collections.deque[Record] = collections.deque(maxlen=1 << 16)


def records() -> list[Record]:
    """Decisions about the code that this process has compiled, newest last (131,072 at most).

    Includes code from a compile cache: its decisions are stored with it.
    """
    if "torch._inductor.config" in sys.modules:  # else there is no compiled code
        from ._torch import store

        for text in store.take():
            _new.extend([Record.from_dict(each) for each in json.loads(text)])
    return [*_taken, *_new]


def take_new() -> list[Record]:
    """The records since the last call; like :func:`records`, including cached code."""
    records()
    new = [_new.popleft() for _ in range(len(_new))]  # not all at once: others publish meanwhile
    _taken.extend(new)
    return new


def clear_records() -> None:
    """Forget the records so far."""
    take_new()
    _taken.clear()


def publish(made: Sequence[Record]) -> None:
    """Keep records for :func:`records`, and log them at debug level: a summary, and a line each."""
    _new.extend(made)
    if any(r.kind == "batch norm" for r in made):
        log.debug("%s", summary(made))
    for r in made:
        log.debug("%s", r)
