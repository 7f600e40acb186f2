"""Bytes that a compiled model saves for backward, exactly, and without running it.

The model is traced by Dynamo on fake tensors and goes through Inductor up to where code would be
generated. What the partitioned forward hands to the backward is then read off the graph.

*New* bytes are those that exist only because of backward: parameters, buffers, inputs of the
graph and views of them are alive anyway and are not counted.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import fx

from . import plugin
from ._torch import compat, inductor, registry
from ._torch.tracing import copy_graph_module, trace
from .config import get_options
from .deployed import merge_pairs
from .graph import layers
from .graph.provenance import module_path
from .graph.uses import depending_on, reachable, users_of
from .passes.forward_folding.decide import decide_all
from .passes.scale_gradient.decide import decide
from .passes.scale_gradient.records import NamedRecord, account
from .passes.scale_gradient.rewrite import apply
from .passes.wanted_gradients import MaskBitsPass, WantedGradientsPass
from .records import Record

Kind = Literal["activation", "weight", "mask"]
Mode = Literal["eval", "builtin", "tune", "deploy"]


@dataclasses.dataclass(frozen=True)
class SavedTensor:
    """One tensor saved for backward; where sizes are symbolic, ``nbytes`` is of the example."""

    name: str  # of the node of the forward graph that makes it
    shape: tuple[int | str, ...]  # symbolic sizes as strings
    dtype: str
    nbytes: int
    kind: Kind  # "weight": computed from parameters and buffers alone; "mask": bool, uint8
    layer: str = ""  # node of the nearest layer that it is computed from, element by element
    readers: tuple[str, ...] = ()  # operators of the backward that take it, up to views
    module: str = ""  # path of the module that makes it, if known


@dataclasses.dataclass(frozen=True)
class SavedForBackward:
    """New tensors that one or several compiled graphs save for backward, each storage once.

    ``peak_bytes`` estimates a step's peak memory beyond parameters, buffers and inputs, gradients
    included: graphs run in order, and nothing is fused.
    """

    tensors: tuple[SavedTensor, ...]
    copied_bytes: int = 0
    peak_bytes: int = 0
    graphs: int = 1

    @property
    def new_bytes(self) -> int:
        """Bytes without Inductor's channels-last copies of weights and inputs: ``copied_bytes``."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def all_bytes(self) -> int:
        """Bytes of all tensors, with ``copied_bytes``."""
        return self.new_bytes + self.copied_bytes

    def bytes_of(self, kind: str) -> int:
        """Bytes of one kind: "activation", "weight" or "mask"."""
        return sum(t.nbytes for t in self.tensors if t.kind == kind)

    def bytes_after(self, layer: str) -> int:
        """Bytes of tensors computed by pointwise calls from that layer (in one graph)."""
        return sum(t.nbytes for t in self.tensors if t.layer == layer)

    def __add__(self, other: "SavedForBackward") -> "SavedForBackward":
        """The total of two graphs that run one after the other."""
        copied = self.copied_bytes + other.copied_bytes
        peak = max(self.peak_bytes, self.all_bytes + other.peak_bytes)
        graphs = self.graphs + other.graphs
        return SavedForBackward(self.tensors + other.tensors, copied, peak, graphs)


def saved_for_backward(
    fn: Callable[..., Any], *inputs: Any, mode: Mode = "tune", dynamic: bool | None = None
) -> SavedForBackward:
    """New bytes that ``torch.compile(fn)(*inputs)`` saves for backward in one mode.

    Args:
        fn: a module or function. It is not run; its parameters are neither read nor changed.
        inputs: its inputs; tensors may be real or fake.
        mode: "eval" without any pass, "builtin" with PyTorch's own, "tune" with ours,
            "deploy" with every pair merged into one layer with trainable weight and bias.
        dynamic: as in ``torch.compile``.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    made: list[SavedForBackward] = []
    trace(fn, inputs, lambda gm, args: made.append(saved_by_graph(gm, args, mode)), dynamic=dynamic)
    return sum(made, SavedForBackward((), graphs=0))


def saved_by_graph(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    mode: Mode | Literal["scale_gradient"],
    report: Callable[[Iterable[NamedRecord]], None] = lambda records: None,
) -> SavedForBackward:
    """What one Dynamo graph saves for backward in ``mode``; ``gm`` is left as it is.

    Mode "scale_gradient" is "tune" without wanted gradients. There ``report`` gets the records of
    that pass; in mode "tune" those of the others. Needs the tracing context of a Dynamo backend.
    """
    graphs: dict[bool, fx.GraphModule] = {}
    static_inputs: set[int] = set()
    is_tune, is_builtin = mode == "tune", mode == "builtin"

    def stop_before_codegen(inner: fx.GraphModule, _inputs: Any, **kwargs: Any) -> Any:
        graphs[bool(kwargs.get("is_backward"))] = inner
        if not kwargs.get("is_backward"):
            static_inputs.update(kwargs.get("static_input_idxs") or ())
        return inner

    def report_others(records: Iterable[Record]) -> None:
        report(("", record) for record in records)

    def rewrite(graph: fx.Graph) -> None:
        decisions = decide(graph, get_options())
        if not is_tune:
            report(account(graph, decisions))
        apply(decisions, graph)
        if is_tune:
            report_others(WantedGradientsPass().run(graph).records)

    def pack(forward: fx.Graph, backward: fx.Graph) -> None:
        report_others(MaskBitsPass().run(forward, backward).records)

    gm = copy_graph_module(gm)
    if mode == "deploy":
        for module in gm.modules():  # with the bodies of higher-order operators
            if isinstance(module, fx.GraphModule):
                merge_pairs(module.graph)
                module.recompile()
    passes: dict[str, registry.GraphPass] = {"joint_custom_pre_pass": rewrite}
    if is_tune:
        passes[registry.PARTITIONER] = pack
    with (
        plugin.installation(False) if is_builtin else contextlib.nullcontext(),
        registry.passes_added(passes if is_tune or mode == "scale_gradient" else {}),
        inductor.caches_off(freezing=False, efficient_conv_bn_eval_fx_passes=is_builtin),
        inductor.functorch_config.patch(force_non_lazy_backward_lowering=True),
        inductor.tracing_apart(),
    ):
        inductor.compile_with(stop_before_codegen, gm, example_inputs)
        if False in graphs:  # with what is known of the inputs while compiling
            forward = graphs[False].graph
            if is_tune and get_options().forward != "exact":
                report_others(record for _, record in decide_all(forward, get_options()))
            channels_last = inductor.makes_channels_last(forward)
    if True not in graphs:  # nothing requires a gradient
        return SavedForBackward(())
    forward, backward = graphs[False].graph, graphs[True].graph
    tensors = tuple(_new_tensors(forward, backward, static_inputs))
    copied = _copied_bytes(forward, backward) if channels_last else 0
    inputs = [{*g.find_nodes(op="placeholder")} for g in (forward, backward)]
    new = {t.name for t in tensors}
    old = {n for n in inputs[1] if n.name not in new and not n.name.startswith("tangents_")}
    peaks = (inductor.most_alive(forward, inputs[0]), inductor.most_alive(backward, old))
    return SavedForBackward(tensors, copied, copied + max(peaks))


def _new_tensors(
    forward: fx.Graph, backward: fx.Graph, static_inputs: set[int]
) -> Iterator[SavedTensor]:
    """Tensors that the backward graph takes from the forward and that are not its inputs."""
    made_by = {node.name: node for node in forward.nodes}
    inputs = forward.find_nodes(op="placeholder")
    seen = {compat.storage_key(n.meta.get("val")) for n in inputs}
    from_weights = _computed_from_parameters(forward, static_inputs)
    for taken in backward.find_nodes(op="placeholder"):
        value, node = layers.tensor_of(taken), made_by.get(taken.name)
        if value is None or node is None or taken.name.startswith(("tangents_", "primals_")):
            continue
        key = compat.storage_key(node.meta.get("val"))
        if key is not None and key in seen:
            continue
        seen.add(key)
        dtype = str(value.dtype).removeprefix("torch.")
        kind: Kind = "weight" if node in from_weights else "activation"
        if value.dtype in (torch.bool, torch.uint8):
            kind = "mask"
        readers = sorted({str(n.target) for n in users_of(taken) if n.op == "call_function"})
        yield SavedTensor(
            *(node.name, compat.shape_of(value), dtype, layers.bytes_of(taken)),
            *(kind, _nearest_layer(node), tuple(readers), module_path(node)),
        )


def _copied_bytes(forward: fx.Graph, backward: fx.Graph) -> int:
    """Bytes of channels-last copies of inputs that the backward takes, made for convolutions."""
    saved = {n.name for n in backward.find_nodes(op="placeholder")}
    calls = forward.find_nodes(op="call_function", target=torch.ops.aten.convolution.default)
    taken = {n: layers.value_of(n) for call in calls for n in call.args[:2] if n.name in saved}
    return sum(
        layers.bytes_of(n)
        for n, value in taken.items()
        if n.op == "placeholder"
        and value.ndim == 4
        and not value.is_contiguous(memory_format=torch.channels_last)
    )


def _nearest_layer(node: fx.Node) -> str:
    def sources(n: fx.Node) -> list[fx.Node]:
        is_step = n is node or compat.is_pointwise(n.target) or compat.is_view(n.target)
        return n.all_input_nodes if is_step else []

    found = (n.name for n in reachable([node], sources) if layers.layer_of(n) is not None)
    return next(found, "")


def _computed_from_parameters(graph: fx.Graph, static_inputs: set[int]) -> set[fx.Node]:
    """Nodes of a partitioned forward that depend on parameters and buffers only."""
    inputs = graph.find_nodes(op="placeholder")
    static = {n for i, n in enumerate(inputs) if i in static_inputs}
    others = (n for n in graph.nodes if not n.all_input_nodes and n not in static)
    return {*graph.nodes} - depending_on(others)
