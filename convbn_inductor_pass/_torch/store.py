"""Text kept beside compiled code, which is told again when that code comes from a cache.

On a hit in Inductor's cache no pass runs. What Inductor does then is to count again what was
counted while the code was made, in ``counters["inductor"]``. So a text is written to a file in
Inductor's cache folder, named after its content, and a count of that name is made. A count that
this process did not make itself means that stored code is in use. Unless the passes ran all the
same, and decided for themselves: where a model's modules have other names than when the code was
made, AOTAutograd's cache, which is asked first, does not have it, and Inductor's has.
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


def put(text: str) -> None:
    """Keep ``text`` with the code that is being made; to be called in a post-grad pass."""
    if config.force_disable_caches or not config.fx_graph_cache:
        return
    from torch._inductor.codecache import write_atomic  # here, since this loads no compiler

    name = _PREFIX + hashlib.sha256(text.encode()).hexdigest()[:32]
    write_atomic(str(_path(name)), text, make_dirs=True, encode_utf_8=True)
    counters["inductor"][name] += 1
    _known[name] += 1


def take() -> list[str]:
    """The texts of stored code that came into use since the last call.

    A text whose file is gone is left out.
    """
    hits = counters["aot_autograd"]["autograd_cache_hit"]
    ran, _known[_HITS] = hits == _known[_HITS], hits
    found = []
    for name, count in list(counters["inductor"].items()):
        if name.startswith(_PREFIX):
            with contextlib.suppress(FileNotFoundError):
                found += [] if ran else [_path(name).read_text("utf-8")] * (count - _known[name])
            _known[name] = count
    return found


def _path(name: str) -> pathlib.Path:
    return pathlib.Path(cache_dir()) / "convbn_inductor_pass" / f"{name}.json"
