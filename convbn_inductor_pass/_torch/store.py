"""Text stored with compiled code, and returned again when that code comes from a cache.

On a hit in Inductor's cache no pass runs, but Inductor repeats the counts in
``counters["inductor"]`` that were made while the code was compiled. So a text is written to a file
in Inductor's cache folder, named after its content, and a counter of that name is increased. A
count that this process did not make itself means that stored code is in use, unless the passes ran
anyway: if modules have other names than then, AOTAutograd's cache, which is asked first, misses.
"""

import contextlib
import hashlib
import pathlib
from collections import Counter

from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.runtime.cache_dir_utils import cache_dir

_PREFIX = "convbn_inductor_pass_decisions_"
_HITS = "hits"
_known: Counter[str] = Counter()  # counts that this process made or has told of
_counted: list[Counter[str]] = []  # in this Counter


def put(text: str) -> None:
    """Store ``text`` with the code being compiled; call it in a post-grad pass."""
    if config.force_disable_caches or not config.fx_graph_cache:
        return
    from torch._inductor.codecache import write_atomic  # here, since this loads no compiler

    name = _PREFIX + hashlib.sha256(text.encode()).hexdigest()[:32]
    write_atomic(str(_path(name)), text, make_dirs=True, encode_utf_8=True)
    _notice_clearing()
    for counts in (counters["inductor"], _known):
        counts[name] += 1


def take() -> list[str]:
    """The texts of stored code that came into use since the last call.

    A text whose file is gone is left out.
    """
    _notice_clearing()
    hits = counters["aot_autograd"]["autograd_cache_hit"]
    ran, _known[_HITS] = hits == _known[_HITS], hits
    stored = {k: n for k, n in list(counters["inductor"].items()) if k.startswith(_PREFIX)}
    new = Counter(stored) - _known
    dict.update(_known, stored)  # a Counter's own update adds
    found = []
    for path in [] if ran else map(_path, new.elements()):
        with contextlib.suppress(FileNotFoundError):
            found.append(path.read_text("utf-8"))
    return found


def _notice_clearing() -> None:
    """Start again where someone has cleared all counters, or Inductor's."""
    now = counters["inductor"]
    if not (_counted and _counted[0] is now) or any(
        name not in now for name in _known if name != _HITS
    ):
        _known.clear()
        _counted[:] = [now]


def _path(name: str) -> pathlib.Path:
    return pathlib.Path(cache_dir()) / "convbn_inductor_pass" / f"{name}.json"
