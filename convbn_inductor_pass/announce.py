"""Says what was done: one line for each model and result, when a compilation has ended.

The line goes to the logger ``convbn_inductor_pass``: as a warning if fewer than half of the batch
norms are in tune mode though they could gain by it, else as information. Where no logging is set
up it goes to stderr, as Python's warnings of loggers do. To silence it: the option
``announce=False``, or a level above ``WARNING`` for that logger.

Dynamo calls back at the end of each compilation, and only there is it known what code from a cache
had been decided. It makes one graph or, for DDP, several; a graph break ends it, so that each part
of a broken model has a line. Nothing is said of inference, and of graphs without batch norms.
"""

import collections
import logging
import sys
from collections.abc import Hashable, Iterable

from .codes import Code
from .config import get_options
from .records import Record, log, take_new

_NOTHING_TO_GAIN = (Code.AFFINE_FROZEN, Code.LAYER_FROZEN, Code.SAVED_ANYWAY)
_said: set[Hashable] = set()


def listen() -> None:
    """Have the line said when the current compilation ends; to be called once it has begun.

    In each of them, since ``torch._dynamo.reset`` drops all callbacks.
    """
    from ._torch import registry  # here, since its import may load the passes, which import this

    registry.call_after_compilation(_on_end)


def _on_end(_compilation: object) -> None:
    try:
        say(take_new())
    except Exception:  # a user's compilation must not fail because of a line
        log.warning("convbn_inductor_pass: cannot say what was done", exc_info=True)


def say(made: Iterable[Record]) -> None:
    """Say what was decided about the batch norms of graphs that have a backward."""
    made = list(made)
    norms = [r for r in made if r.kind == "batch norm" and r.code is not Code.NO_GRAD]
    if not norms or not get_options().announce:
        return
    fused = [r for r in norms if r.code.rewritten]
    left = collections.Counter(r.code for r in norms if not r.code.rewritten)
    # Where nothing was done, the parts of a broken model would all have the same line.
    paths = frozenset(r.batch_norm for r in norms) if fused else None
    key = (paths, len(fused), frozenset(left.items()))
    if key not in _said:
        _said.add(key)
        left_out = sum(n for code, n in left.items() if code not in _NOTHING_TO_GAIN)
        level = logging.WARNING if 2 * left_out > len(norms) else logging.INFO
        # Wanted gradients save with batch norms in tune mode, and without.
        saved = sum(r.bytes_saved for r in made if r.code.rewritten)
        _write(level, _line(len(norms), len(fused), saved, left))


def _line(norms: int, fused: int, saved: int, left: collections.Counter[Code]) -> str:
    from rich.filesize import decimal

    line = f"{fused} of {norms} batch norms in tune mode"
    less = f"{decimal(saved, precision=2)} less saved for backward"
    if saved:
        line = f"{line}, {less}" if fused else f"{less}; {line}"
    line = f"convbn_inductor_pass: {line}"  # for loggers whose format has no names, too
    if not left:
        return line
    [(code, count)] = left.most_common(1)
    if fused or count < norms:
        line += f"; {count} {'is' if count == 1 else 'are'} not"
    line += f": {code.value}"
    return f"{line}; {code.remedy}" if code.remedy else line


def _write(level: int, line: str) -> None:
    if log.hasHandlers():
        log.log(level, "%s", line)
    elif log.isEnabledFor(level):
        print(line, file=sys.stderr)
