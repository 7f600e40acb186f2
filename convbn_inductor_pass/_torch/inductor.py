"""Every private import from Inductor, what is asked of it and what is told to it.

What differs between torch 2.11 and 2.15, by name:

* ``pre_grad_custom_pass`` takes one pass up to 2.12 and a list from 2.13 on;
* pre-grad passes run before AOTAutogradCache's lookup up to 2.11 (and the cache then refuses
  graphs with functions that it does not know), after it from 2.12 on.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch._aot_autograd.descriptors import SubclassGetAttrAOTOutput
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.inductor_prims import force_stride_order
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import make_fx

from .compat import TracingContext, version

__all__ = [
    "CustomGraphPass",
    "benchmark_gpu",
    "binary_folding_pass",
    "compile_with",
    "config",
    "custom_passes",
    "efficient_conv_bn_eval_pass",
    "for_python",
    "force_stride_order",
    "has_cudnn_epilogues",
    "has_onednn_epilogues",
    "in_subgraph",
    "is_generated",
    "keep_output",
    "load_cpp",
    "library_settings",
    "lookup_timings",
    "makes_channels_last",
    "mark_cacheable",
    "may_measure",
    "one_pass_per_hook",
    "parts_of_subclasses",
    "sort_graph",
    "static_inputs",
    "trace_decomposed",
    "update_metadata",
]

one_pass_per_hook: bool = version < "2.13.0a0"
_pre_grad_before_cache: bool = version < "2.12.0a0"


def mark_cacheable(function: Any, uuid: str) -> None:
    """Let AOTAutogradCache of torch 2.11 store graphs that call ``function``.

    There, the cache sees the graph after our pass and refuses functions outside torch unless
    they are listed with a version, which becomes part of the key. Later versions look their
    cache up before the pass runs, and know the pass by its uuid.
    """
    if _pre_grad_before_cache:
        name = f"{function.__module__}.{function.__name__}"
        config.unsafe_marked_cacheable_functions = {
            **config.unsafe_marked_cacheable_functions,
            name: uuid,
        }


def trace_decomposed(function: Any, *inputs: Tensor) -> torch.fx.Graph:
    """What ``function`` is made of in aten IR, with Inductor's decompositions."""
    from torch._inductor.decomposition import select_decomp_table

    with unset_fake_temporarily(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        # The wrapper hides signatures with defaults, which make_fx would take for inputs.
        traced = make_fx(lambda *args: function(*args), decomposition_table=select_decomp_table())
        return traced(*inputs).graph


def sort_graph(graph: torch.fx.Graph) -> None:
    """Put every node after what it depends on; what is in order stays so."""
    from torch._inductor.pattern_matcher import stable_topological_sort

    stable_topological_sort(graph)


@contextlib.contextmanager
def update_metadata(graph: torch.fx.Graph) -> Iterator[None]:
    """Recompute, at the end, the metadata of what depends on what is changed in between.

    A library's kernel lays its result out in another way than what it takes the place of, and so
    may all that is computed from that. Inductor notices by itself, but only after it has put its
    own functions into the graph for oneDNN's epilogues; then it cannot recompute these, and the
    compilation fails (2.15).
    """
    from torch._inductor.fx_utils import FakeTensorUpdater

    takes_graph = "graph" in inspect.signature(FakeTensorUpdater).parameters  # 2.11
    of: Any = graph if takes_graph else graph.owning_module
    updater = FakeTensorUpdater(of)
    try:
        yield
    finally:
        updater.incremental_update()


def library_settings() -> tuple[bool, ...]:
    """What the user has said about the libraries that the functions below ask for."""
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    return bool(cudnn.enabled), bool(cudnn.deterministic), bool(mkldnn.enabled)


def has_onednn_epilogues(dtype: torch.dtype) -> bool:
    """Whether oneDNN's convolution with post-ops runs here, and Inductor lowers it."""
    return bool(torch.backends.mkldnn.enabled) and _computes_with_onednn(dtype)


@functools.cache
def _computes_with_onednn(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if torch.ops.mkldnn._is_mkldnn_acl_supported():  # no post-ops there
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def has_cudnn_epilogues(device: torch.device) -> bool:
    """Whether cuDNN's convolutions with epilogues may be called for tensors on ``device``.

    PyTorch runs them whether they are deterministic or not.
    """
    cudnn = torch.backends.cudnn
    if device.type != "cuda" or torch.version.hip or not (cudnn.is_available() and cudnn.enabled):
        return False
    return not (cudnn.deterministic or torch.are_deterministic_algorithms_enabled())


def makes_channels_last(graph: torch.fx.Graph, *, is_inference: bool) -> bool:
    """Whether Inductor makes what goes through the convolutions of ``graph`` channels-last."""
    from torch._inductor.graph import GraphLowering

    module = graph.owning_module
    return module is not None and bool(
        GraphLowering.decide_layout_opt(module, is_inference=is_inference)
    )


class _Choice(NamedTuple):
    """What Inductor's cache of timings asks of a choice."""

    name: str

    def hash_key(self) -> str:
        return self.name


def lookup_timings(
    names: Sequence[str],
    operation: str,
    inputs: str,
    benchmark: Callable[[Sequence[str]], dict[str, float]] | None,
) -> dict[str, float]:
    """Timings from the file in which Inductor keeps those of its autotuning.

    What is not there for every name is measured with ``benchmark`` and stored; without it,
    what is there is returned.
    """
    from torch._inductor.codecache import PersistentCache

    def measure(choices: Any) -> Any:
        assert benchmark is not None
        return {_Choice(name): t for name, t in benchmark([c.name for c in choices]).items()}

    choices: Any = [_Choice(name) for name in names]
    found: Any = PersistentCache().lookup(
        choices, operation, inputs, None if benchmark is None else measure
    )
    return {choice.name: time for choice, time in found.items()}


def benchmark_gpu(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of ``function`` on a GPU, as Inductor's autotuning measures them."""
    from torch._inductor.runtime.benchmarking import benchmarker

    with torch.get_device_module(device).device(device):
        return float(benchmarker.benchmark_gpu(function)) / 1e3


def for_python() -> bool:
    """Whether the compiled code is run by this process's Python, which knows our operators."""
    from torch._inductor.virtualized import V

    return not (config.cpp_wrapper or V.aot_compilation)


def load_cpp(source: str) -> Any:
    """A library (ctypes) of C++ code, compiled as Inductor compiles its own and kept in its cache.

    Raises what Inductor raises where there is no compiler.
    """
    from torch._inductor.codecache import CppCodeCache

    return CppCodeCache.load(source)


@functools.cache
def keep_output(target: Any, function: Callable[..., Any]) -> None:
    """Have Inductor call ``function`` for ``target``, and leave its results alone.

    Inductor asserts the strides of what operators return, which a tensor in oneDNN's layout has
    not, and gives memory that is not used any more to other results.

    The operator itself is not called, since an argument may be of a plain subclass of Tensor. The
    subclass would make results its own, which it cannot with those in oneDNN's layout (2.11); or
    PyTorch, which looks for aliases in a first call, refuses it (2.13). Generated code, in whose
    place the call is, takes it.
    """
    from torch._inductor import ir, lowering
    from torch._inductor.virtualized import V

    module = function.__module__

    def keep(buffer: Any) -> Any:
        buffer.codegen_size_asserts = lambda wrapper: None
        buffer.codegen_alignment_asserts = lambda wrapper: None
        V.graph.never_reuse_buffers.add(buffer.get_name())
        return ir.TensorBox.create(buffer)

    @lowering.register_lowering(target, type_promotion_kind=None)
    def _lower(*args: Any, **kwargs: Any) -> Any:
        results: Any = ir.FallbackKernel.create(target, *args, **kwargs)
        call = results[0].inputs[0]
        codegen = call.codegen

        def codegen_with_import(wrapper: Any) -> None:
            wrapper.add_import_once(f"import {module}")
            codegen(wrapper)

        call.codegen = codegen_with_import
        call.python_kernel_name = f"{module}.{function.__name__}"
        return [keep(result) for result in results]


def static_inputs(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """Inputs of a graph without a backward that are parameters and buffers of a module.

    Empty where Dynamo has not said which they are.
    """
    context = TracingContext.try_get()
    metadata = None if context is None else context.fw_metadata
    if metadata is None or metadata.tokens:  # tokens are inputs, too
        return set()
    inputs = graph.find_nodes(op="placeholder")
    return {inputs[i] for i in metadata.static_input_indices or () if i < len(inputs)}


def parts_of_subclasses(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """What ``graph`` returns to make a tensor subclass of it, which takes several tensors."""
    (output,) = graph.find_nodes(op="output")
    returned: Any = output.args[0]
    kinds = output.meta.get("desc") or [None] * len(returned)
    return {
        node
        for node, kind in zip(returned, kinds, strict=True)
        if isinstance(kind, SubclassGetAttrAOTOutput)
    }


def may_measure() -> bool:
    """Whether compiling may depend on how fast something runs here."""
    deterministic = config.deterministic or torch.are_deterministic_algorithms_enabled()
    return not deterministic


_GENERATED = ("aten", "prims")  # other libraries' operators are called


def in_subgraph() -> bool:
    """Whether Inductor's post-grad passes are at a graph inside another one (cond, scan, ...).

    The only thing that tells is that they are called for it from within those of the outer one.
    """
    from torch._inductor.compile_fx import _recursive_post_grad_passes as passes

    frame, depth = inspect.currentframe(), 0
    while frame is not None:
        depth += frame.f_code.co_name == passes.__name__
        frame = frame.f_back
    return depth > 1


def is_generated(target: Any) -> bool:
    """Whether Inductor generates code for ``target``, and can take over the call before it."""
    from torch._inductor import lowering

    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in _GENERATED:
        return False
    libraries = (
        torch.ops.aten.convolution.default,
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten.baddbmm.default,
    )
    # Pooling reads each number several times, and has its input computed first.
    is_pooling = "_pool" in target._schema.name
    return target not in (*libraries, *lowering.fallbacks) and not is_pooling


def compile_with(inner: Callable[..., Any], gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    """Compile Dynamo's graph as Inductor does, but each graph in aten IR with ``inner``."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(gm, inputs, inner_compile=inner)


def binary_folding_pass() -> Any:
    """The patterns with which ``freezing=True`` folds constants into layers."""
    from torch._inductor.fx_passes import freezing_patterns

    return freezing_patterns.binary_folding_pass


def efficient_conv_bn_eval_pass() -> Any:
    """PyTorch's own pass behind the flag that is ours, too."""
    from torch._inductor.fx_passes import pre_grad

    return pre_grad.efficient_conv_bn_eval_pass


def custom_passes(hook: str) -> tuple[Any, ...]:
    """The passes configured for one of Inductor's hooks: none, one, or a list of them."""
    value = getattr(config, hook)
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)
