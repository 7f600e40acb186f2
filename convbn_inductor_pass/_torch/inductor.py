"""Private imports from Inductor and AOTAutograd, and queries and settings that use them.

Loads the compiler. Registering with it is in :mod:`registry`, which does not.
"""

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd import descriptors as aot
from torch._functorch.aot_autograd import make_boxed_func as make_boxed_func
from torch._guards import TracingContext, tracing
from torch._inductor import config
from torch._inductor.inductor_prims import force_stride_order as force_stride_order

from . import compat


@contextlib.contextmanager
def caches_off(**settings: Any) -> Iterator[None]:
    """Inductor with these ``settings``, and without its caches and AOTAutograd's."""
    with (
        config.patch(fx_graph_cache=False, fx_graph_remote_cache=False, **settings),
        functorch_config.patch(enable_autograd_cache=False),
    ):
        yield


def tracing_apart() -> contextlib.AbstractContextManager[Any]:
    """Inside, what is traced leaves the tracing context of the compilation as it is."""
    return tracing(copy.copy(TracingContext.get()))


def sort_graph(graph: torch.fx.Graph) -> None:
    """Put every node after what it depends on; what is in order stays so."""
    from torch._inductor.pattern_matcher import stable_topological_sort

    stable_topological_sort(graph)


@contextlib.contextmanager
def update_metadata(graph: torch.fx.Graph) -> Iterator[None]:
    """Recompute, at the end, the metadata of what depends on what is changed in between.

    A library's kernel lays its result out in its own way, and what is computed from that follows.
    Inductor would notice only where it cannot recompute any more, and fail (2.15).
    """
    from torch._inductor.fx_utils import FakeTensorUpdater

    takes_graph = "graph" in inspect.signature(FakeTensorUpdater).parameters  # 2.11
    of: Any = graph if takes_graph else graph.owning_module
    updater = FakeTensorUpdater(of)
    arguments = [(node.args, node.kwargs) for node in graph.nodes]  # alive: it compares ids
    try:
        yield
    finally:
        updater.incremental_update()
        del arguments


def has_onednn_epilogues(dtype: torch.dtype) -> bool:
    """Whether oneDNN's convolution with post-ops runs here, and Inductor lowers it."""
    mkldnn, ops = torch.backends.mkldnn, torch.ops.mkldnn
    if not (mkldnn.is_available() and mkldnn.enabled) or ops._is_mkldnn_acl_supported():
        return False  # Arm's Compute Library has no post-ops
    return dtype == torch.float32 or bool(ops._is_mkldnn_bf16_supported())


def has_cudnn_epilogues(device: torch.device) -> bool:
    """Whether cuDNN's convolutions with epilogues, deterministic or not, may run on ``device``."""
    cudnn = torch.backends.cudnn
    if device.type != "cuda" or torch.version.hip or not (cudnn.is_available() and cudnn.enabled):
        return False
    return not (cudnn.deterministic or torch.are_deterministic_algorithms_enabled())


def makes_channels_last(graph: torch.fx.Graph) -> bool:
    """Whether Inductor makes what goes through the convolutions of ``graph`` channels-last."""
    from torch._inductor.graph import GraphLowering

    module = graph.owning_module
    if module is None:
        return False
    inputs = graph.find_nodes(op="placeholder")
    is_inference = not any(node.name.startswith("primals_") for node in inputs)
    return bool(GraphLowering.decide_layout_opt(module, is_inference=is_inference))


def for_python() -> bool:
    """Whether the compiled code is run by this process's Python, which knows our operators."""
    from torch._inductor.virtualized import V

    return not (config.cpp_wrapper or V.aot_compilation)


def restore_hidden_outputs(graph: torch.fx.Graph) -> None:
    """Have Inductor also restore the strides of outputs from which AOTAutograd builds the user's.

    These are the tensors inside a subclass and the bases of returned views. By itself Inductor
    restores only the strides of outputs that users get as they are (2.11 to 2.14).
    """
    (output,) = graph.find_nodes(op="output")
    visible, kinds = output.meta.get("user_visible_output_idxs"), output.meta.get("desc")
    if visible is not None and kinds is not None:
        hidden = (aot.SubclassGetAttrAOTOutput, aot.IntermediateBaseAOTOutput)
        found = (i for i, kind in enumerate(kinds) if isinstance(kind, hidden))
        output.meta["user_visible_output_idxs"] = sorted({*visible, *found})


def is_outermost(graph: torch.fx.Graph) -> bool:
    """Whether ``graph`` is no body of a higher-order operator (cond, scan, invoke_subgraph, ...).

    AOTAutograd describes the inputs of its own graphs, not those of the bodies inside (2.11 to
    2.15). Outputs do not tell: the partitioner describes those of an invoke_subgraph's body, too.
    """
    return any("desc" in node.meta for node in graph.find_nodes(op="placeholder"))


def is_generated(target: Any) -> bool:
    """Whether Inductor generates code for ``target``, and can take over the call before it."""
    from torch._inductor import lowering

    if not isinstance(target, torch._ops.OpOverload) or target in lowering.fallbacks:
        return False
    aten = torch.ops.aten
    called = (aten.convolution, aten.mm, aten.addmm, aten.bmm, aten.baddbmm)
    if target.overloadpacket in called or target.namespace not in ("aten", "prims"):
        return False
    # Pooling reads each element several times, and has its input computed first.
    return "_pool" not in target._schema.name


def most_alive(graph: torch.fx.Graph, kept: set[torch.fx.Node]) -> int:
    """The most bytes alive at once while ``graph`` runs in its order, unfused.

    Inputs count until their last use; those in ``kept`` stay alive and do not count.
    """
    from torch._inductor.fx_passes.memory_estimator import GraphAliasTracker

    def total(found: Any) -> int:
        return sum(compat.size_hint(s.storage.nbytes()) for s in found if s not in not_counted)

    storages = GraphAliasTracker([*graph.nodes])
    not_counted = {s for n in kept for s in storages.get_fresh_allocations(n)}
    inputs = graph.find_nodes(op="placeholder")
    most = now = sum(total(storages.get_fresh_allocations(n)) for n in inputs)
    for node in graph.nodes:
        if node.op != "placeholder":
            now += total(storages.get_fresh_allocations(node))
            most = max(most, now)
        now -= total(storages.get_storages_last_used(node))
    return most


def trained_inputs(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """Inputs of a joint graph whose gradient it returns; all of them where it does not say."""
    inputs, outputs = _described(graph)
    trained = {d.grad_of for d, n in outputs if isinstance(d, aot.GradAOTOutput) and n is not None}
    return {n for d, n in inputs if d in trained or not outputs}


def written_inputs(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """Inputs that are written to: at the end of the graph, or after it by AOTAutograd."""
    inputs, outputs = _described(graph)
    mutations = (d for d, _ in outputs if isinstance(d, aot.InputMutationAOTOutput))
    written = {_whole(d.mutated_input) for d in mutations}
    found = {n for d, n in inputs if d in written}
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            found.update(n for n in node.all_input_nodes if n.op == "placeholder")
    return found


def _described(graph: torch.fx.Graph) -> tuple[list[tuple[Any, Any]], list[tuple[Any, Any]]]:
    """Inputs and outputs, each with AOTAutograd's description; no outputs if there is none."""
    inputs = [(_whole(n.meta.get("desc")), n) for n in graph.find_nodes(op="placeholder")]
    (output,) = graph.find_nodes(op="output")
    returned: Any = output.args[0]
    return inputs, list(zip(map(_whole, output.meta.get("desc") or ()), returned, strict=False))


def _whole(description: Any) -> Any:
    """What describes the tensor subclass that a described tensor is a part of."""
    while isinstance(description, (aot.SubclassGetAttrAOTInput, aot.SubclassGetAttrAOTOutput)):
        description = description.base
    return description


def compile_with(inner: Callable[..., Any], gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    """Compile Dynamo's graph as Inductor does, but each graph in aten IR with ``inner``."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(gm, inputs, inner_compile=inner)
