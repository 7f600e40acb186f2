"""Inductor's hooks for custom passes: read them, and set them in every thread.

Loads only Inductor's configuration, whose entries are context-local from torch 2.13 on.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import fx
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass, CustomPartitionerFn

from . import version

GraphPass = Callable[..., object]
PARTITIONER = "custom_partitioner_fn"  # the hook whose passes run on what the partitioner made

# Up to 2.12 a hook takes one pass, and a configuration is the whole process's.
_one_pass_per_hook: bool = version < "2.13.0a0"


class _InOrder(CustomGraphPass):
    """Several passes in a hook that takes one."""

    def __init__(self, *passes: GraphPass) -> None:
        self.passes = passes

    def __call__(self, graph: fx.Graph) -> None:
        for each in self.passes:
            each(graph)

    def uuid(self) -> Any:
        uuids = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.passes]
        return None if None in uuids else tuple(uuids)


class _Partitioned(CustomPartitionerFn):
    """A partitioner, Inductor's own or another, and passes on the two graphs that it makes."""

    def __init__(self, partition: Any, *passes: GraphPass) -> None:
        self.partition, self.passes = partition, passes

    def __call__(self, gm: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
        from torch._functorch.partitioners import min_cut_rematerialization_partition

        partition = self.partition or min_cut_rematerialization_partition
        forward, backward = partition(gm, joint_inputs, **kwargs)
        for each in self.passes:
            each(forward.graph, backward.graph)
        for made in (forward, backward):
            made.recompile()
        return forward, backward

    def uuid(self) -> Any:
        theirs = "" if self.partition is None else self.partition.uuid()
        uuids = (theirs, _InOrder(*self.passes).uuid())
        return None if None in uuids else uuids


def is_enabled() -> bool:
    """PyTorch's own flag, which is ours, too."""
    return bool(config.efficient_conv_bn_eval_fx_passes)


def passes_of(hook: str) -> tuple[GraphPass, ...]:
    """The passes of a hook in this context, in whatever form they are configured."""
    return _as_tuple(getattr(config, hook))


def set_pass(hook: str, ours: GraphPass, wanted: bool) -> None:
    """Have a pass after those that are there, or no longer, in this context and every thread's."""
    for owner, name in ((config, hook), (_entry(hook), "default")):
        passes = _as_tuple(getattr(owner, name))
        if (ours in passes) != wanted:
            others = tuple(p for p in passes if p is not ours)
            setattr(owner, name, _as_value(hook, (*others, ours) if wanted else others))


def passes_added(passes: Mapping[str, GraphPass]) -> contextlib.AbstractContextManager[None]:
    """In a ``with`` block, run one more pass in each of these hooks, after those that are there."""
    return config.patch({h: _as_value(h, (*passes_of(h), p)) for h, p in passes.items()})


@contextlib.contextmanager
def hooks_restored(hooks: set[str]) -> Iterator[None]:
    """At the end of a ``with`` block, have hooks as they are now, in this context and elsewhere."""
    defaults = {hook: _entry(hook).default for hook in hooks}
    with config.patch({hook: getattr(config, hook) for hook in hooks}):
        try:
            yield
        finally:
            for hook, value in defaults.items():
                _entry(hook).default = value


def call_after_compilation(callback: Callable[[Any], None]) -> None:
    """Have Dynamo call ``callback`` when a compilation ends, this one too; idempotent."""
    from torch._dynamo.callback import callback_handler

    if callback not in callback_handler.end_callbacks:
        callback_handler.register_end_callback(callback)


def set_everywhere(name: str, value: Any) -> None:
    """Set an entry of the configuration in this context, and for threads that set nothing."""
    setattr(config, name, value)
    _entry(name).default = value


def _entry(hook: str) -> Any:
    # What a thread that set nothing itself reads: there is no public way to set it.
    return config._config[hook]  # type: ignore[attr-defined]


def _as_tuple(value: Any) -> tuple[GraphPass, ...]:
    if isinstance(value, _InOrder):
        return value.passes
    if isinstance(value, _Partitioned):
        return (*_as_tuple(value.partition), *value.passes)
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _as_value(hook: str, passes: tuple[GraphPass, ...]) -> Any:
    if hook == PARTITIONER:
        ours = [p for p in passes if not isinstance(p, CustomPartitionerFn)]
        theirs = next((p for p in passes if p not in ours), None)
        return _Partitioned(theirs, *ours) if ours else theirs
    if len(passes) < 2:
        return passes[0] if passes else None
    return _InOrder(*passes) if _one_pass_per_hook else list(passes)
