"""Reports what was done: one line for each model and result, at the end of a compilation.

The line goes to the logger ``convbn_inductor_pass``: as a warning if more than half of the batch
norms could gain from tune mode but are not in it, otherwise as information. If logging is not set
up, it goes to stderr, as loggers' warnings do in Python. The option ``announce=False`` or a level
above ``WARNING`` silences it.

Dynamo calls back at the end of each compilation, of which each part of a model with graph breaks
has one. Inference is not reported, nor are graphs without batch norms in which nothing is gained.
Bytes are ``Record.bytes_saved``, estimated.
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
    """Report when the current compilation ends; call it in each: Dynamo's reset drops callbacks."""
    from ._torch import registry  # here, since its import may load the passes, which import this

    registry.call_after_compilation(_on_end)


def _on_end(_compilation: object) -> None:
    try:
        say(take_new())
    except Exception:  # a user's compilation must not fail because of a line
        log.warning("convbn_inductor_pass: cannot report what was done", exc_info=True)


def say(made: Iterable[Record]) -> None:
    """Report the decisions about batch norms, and the bytes saved, of graphs with a backward."""
    made = list(made)
    norms = [r for r in made if r.kind == "batch norm" and r.code is not Code.NO_GRAD]
    done = [r for r in made if r.code.rewritten]
    # Wanted gradients save memory with and without batch norms in tune mode.
    saved = sum(r.bytes_saved for r in done)
    if not (norms or saved) or not get_options().announce:
        return
    fused = [r for r in norms if r.code.rewritten]
    left = collections.Counter(r.code for r in norms if not r.code.rewritten)
    # If nothing was done, all parts of a model with graph breaks would have the same line. Of the
    # sizes only channels, which another batch does not change.
    told = fused if norms else done
    where = ((r.kind, r.code, r.layer, r.batch_norm, r.output_shape[1:2]) for r in told)
    key = (frozenset(where), len(norms), len(fused), frozenset(left.items()))
    if key not in _said:
        _said.add(key)
        left_out = sum(n for code, n in left.items() if code not in _NOTHING_TO_GAIN)
        level = logging.WARNING if 2 * left_out > len(norms) else logging.INFO
        line = _line(len(norms), len(fused), saved, left)
        if log.hasHandlers():
            log.log(level, "%s", line)
        elif log.isEnabledFor(level):
            print(line, file=sys.stderr)


def _line(norms: int, fused: int, saved: int, left: collections.Counter[Code]) -> str:
    from rich.filesize import decimal

    line = f"{fused} of {norms} batch norms in tune mode"
    less = f"about {decimal(saved, precision=1)} less saved for backward"
    if saved and norms:
        line = f"{line}, {less}" if fused else f"{less}; {line}"
    elif saved:
        line = less
    line = f"convbn_inductor_pass: {line}"  # for loggers whose format has no names, too
    if not left:
        return line
    [(code, count)] = left.most_common(1)
    if fused or count < norms:
        line += f"; {count} {'is' if count == 1 else 'are'} not"
    line += f": {code.value}"
    return f"{line}; {code.remedy}" if code.remedy else line
