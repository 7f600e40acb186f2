"""Every torch-private import and every branch on torch's version, in one place.

Supported: torch 2.11 to 2.15. What differs between them, by name:

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
from torch._dynamo import config as dynamo_config
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._functorch.aot_autograd import make_boxed_func as boxed
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.inductor_prims import force_stride_order
from torch._logging import trace_structured
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd import forward_ad
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

__all__ = [
    "CustomGraphPass",
    "FakeTensor",
    "FakeTensorMode",
    "OptimizedModule",
    "TracingContext",
    "WeakIdKeyDictionary",
    "benchmark_gpu",
    "binary_folding_pass",
    "boxed",
    "check_torch_version",
    "copy_dynamo_source",
    "counters",
    "counters_kept",
    "custom_passes",
    "dynamo_config",
    "efficient_conv_bn_eval_pass",
    "fake_mode_of",
    "for_python",
    "function_of_source",
    "force_stride_order",
    "functorch_config",
    "has_cudnn_epilogues",
    "has_onednn_epilogues",
    "in_functional_transform",
    "in_subgraph",
    "inductor_config",
    "is_functorch_tensor",
    "is_generated",
    "is_mutable",
    "is_pointwise",
    "is_pure",
    "is_view",
    "keep_output",
    "lazy_graph_module",
    "load_cpp",
    "lookup_timings",
    "makes_channels_last",
    "mark_cacheable",
    "may_measure",
    "one_pass_per_hook",
    "plain_dispatch",
    "reads_strides",
    "real_tensors",
    "remove_function_mode",
    "saved_tensors_hooks",
    "size_hint",
    "sort_graph",
    "static_inputs",
    "storage_key",
    "surely",
    "torch_functions_off",
    "trace_decomposed",
    "trace_structured",
    "tracing",
]

_OLDEST = "2.11"
_version = TorchVersion(torch.__version__)
one_pass_per_hook: bool = _version < "2.13.0a0"
_pre_grad_before_cache: bool = _version < "2.12.0a0"


def check_torch_version() -> None:
    """Raise ImportError where torch is older than what this package is written for."""
    if _version < f"{_OLDEST}.0a0":
        raise ImportError(
            f"convbn_inductor_pass needs torch {_OLDEST} or later, found {torch.__version__}"
        )


def storage_key(value: Any) -> int | None:
    """Identity of the storage behind a tensor; None if it has none that can be compared.

    Two tensors can alias only if their keys are equal. Fake tensors keep the aliasing of the
    tensors that they stand for, graph inputs included.
    """
    if not isinstance(value, Tensor) or is_functorch_tensor(value):
        return None
    try:
        return value.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse tensors and wrapper subclasses
        return None


def is_functorch_tensor(value: Tensor) -> bool:
    """Whether ``value`` belongs to a level of torch.func (vmap, grad, jvp)."""
    return torch._C._functorch.is_functorch_wrapped_tensor(value)


def in_functional_transform() -> bool:
    """Whether torch.func or forward-mode automatic differentiation is at work here."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    )


def saved_tensors_hooks() -> tuple[Any, Any] | None:
    """The innermost ``torch.autograd.graph.saved_tensors_hooks``; checkpoint uses them, too."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def torch_functions_off() -> contextlib.AbstractContextManager[None]:
    """Call torch with no ``__torch_function__``, of a mode or of a subclass, in between."""
    return torch._C.DisableTorchFunction()


def remove_function_mode(mode: TorchFunctionMode) -> bool:
    """Leave ``mode`` without its ``__exit__``, if it is the innermost; whether it was."""
    if _get_current_function_mode() is not mode:
        return False
    _pop_mode()
    return True


def mark_cacheable(function: Any, uuid: str) -> None:
    """Let AOTAutogradCache of torch 2.11 store graphs that call ``function``.

    There, the cache sees the graph after our pass and refuses functions outside torch unless
    they are listed with a version, which becomes part of the key. Later versions look their
    cache up before the pass runs, and know the pass by its uuid.
    """
    if _pre_grad_before_cache:
        name = f"{function.__module__}.{function.__name__}"
        inductor_config.unsafe_marked_cacheable_functions = {
            **inductor_config.unsafe_marked_cacheable_functions,
            name: uuid,
        }


_UNBACKED = 8192  # what Inductor guesses for a size that depends on data


def size_hint(value: int | torch.SymInt) -> int:
    """The number that tracing saw for a possibly symbolic size; a guess if it saw none."""
    if isinstance(value, int):
        return value
    if value.node.has_hint():
        return int(value.node.hint)
    expression = value.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, _UNBACKED)))


def lazy_graph_module(root: torch.nn.Module, graph: torch.fx.Graph) -> torch.fx.GraphModule:
    """A graph module as Dynamo makes it: its code is not compiled before it is called.

    PyTorch's own efficient_conv_bn_eval needs that: it puts a builtin function among a node's
    arguments, which does not print as Python.
    """
    with _use_lazy_graph_module(True):
        return _make_graph_module(root, graph)


def copy_dynamo_source(old: Any, new: Any) -> None:
    """Copy what tells AOTAutograd that a graph is Dynamo's and which inputs are parameters.

    Without it parameters count as activations, and the partitioner's choice differs.
    """
    for name in ("_dynamo_source", "_param_name_to_source"):
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))


@contextlib.contextmanager
def counters_kept() -> Iterator[None]:
    """Leave Dynamo's and Inductor's counters as they were."""
    before = {name: counter.copy() for name, counter in counters.items()}
    try:
        yield
    finally:
        counters.clear()
        counters.update(before)


def trace_decomposed(function: Any, *inputs: Tensor) -> torch.fx.Graph:
    """What ``function`` is made of in aten IR, with Inductor's decompositions."""
    from torch._inductor.decomposition import select_decomp_table

    with unset_fake_temporarily(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        # The wrapper hides signatures with defaults, which make_fx would take for inputs.
        traced = make_fx(lambda *args: function(*args), decomposition_table=select_decomp_table())
        return traced(*inputs).graph


def is_pointwise(target: Any) -> bool:
    """Whether an aten operator computes each number of its result from one of each input."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    convert = torch.ops.prims.convert_element_type.default
    return torch.Tag.pointwise in target.tags or target is convert


def is_mutable(target: Any) -> bool:
    """Whether calling ``target`` may write to its arguments; of what is not known, it may."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    return isinstance(target, torch._ops.HigherOrderOperator)


def is_view(target: Any) -> bool:
    """Whether the result of ``target`` is in the memory of one of its arguments."""
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    return any(r.alias_info is not None for r in target._schema.returns)


def reads_strides(target: Any) -> bool:
    """Whether ``target`` may depend on how its arguments lie in memory."""
    if not isinstance(target, torch._ops.OpOverload):
        return isinstance(target, torch._ops.HigherOrderOperator)
    is_as_strided = target._schema.name.startswith("aten::as_strided")
    return is_as_strided or target.namespace not in ("aten", "prims", "mkldnn")


def is_pure(target: Any) -> bool:
    """Whether ``target`` always computes the same from the same tensors, and does nothing else."""
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    return torch.Tag.nondeterministic_seeded not in target.tags and target.namespace in (
        "aten",
        "prims",
    )


def fake_mode_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The mode that ``tensor`` is fake in."""
    return tensor.fake_mode if isinstance(tensor, FakeTensor) else contextlib.nullcontext()


@contextlib.contextmanager
def plain_dispatch() -> Iterator[None]:
    """Call operators as they are: without autocast and without recording for autograd."""
    with torch.no_grad(), torch._C._DisableAutocast():
        yield


def surely(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on symbolic sizes holds for every input; asking makes no guard."""
    return bool(statically_known_true(condition))


def sort_graph(graph: torch.fx.Graph) -> None:
    """Put every node after what it depends on; what is in order stays so."""
    from torch._inductor.pattern_matcher import stable_topological_sort

    stable_topological_sort(graph)


@functools.cache
def has_onednn_epilogues(dtype: torch.dtype) -> bool:
    """Whether oneDNN's convolution with post-ops runs here, and Inductor lowers it."""
    mkldnn = torch.backends.mkldnn
    if not (mkldnn.is_available() and mkldnn.enabled):
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


@contextlib.contextmanager
def real_tensors() -> Iterator[None]:
    """Compute with real tensors and their dtypes, as outside of any compilation or autocast."""
    with _disable_current_modes(), torch_functions_off(), torch._C._DisableAutocast():
        yield


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


def benchmark_gpu(function: Callable[[], Any]) -> float:
    """Median seconds of ``function`` on the current GPU, caches flushed before each call."""
    from torch._inductor.runtime.benchmarking import benchmarker

    return float(benchmarker.benchmark_gpu(function)) / 1e3


def for_python() -> bool:
    """Whether the compiled code is run by this process's Python, which knows our operators."""
    from torch._inductor.virtualized import V

    return not (inductor_config.cpp_wrapper or V.aot_compilation)


def load_cpp(source: str) -> Any:
    """A library (ctypes) of C++ code, compiled as Inductor compiles its own and kept in its cache.

    Raises what Inductor raises where there is no compiler.
    """
    from torch._inductor.codecache import CppCodeCache

    return CppCodeCache.load(source)


def function_of_source(source: str) -> Callable[..., Any]:
    """The function that ``torch.fx.Graph.python_code`` has written."""
    from torch.fx.graph import _custom_builtins

    namespace: dict[str, Any] = {name: builtin.obj for name, builtin in _custom_builtins.items()}
    exec(source, namespace)
    return functools.partial(namespace["forward"], None)


@functools.cache
def keep_output(target: Any) -> None:
    """Have Inductor call ``target`` and neither look into its results nor write to them afterwards.

    Inductor asserts the strides of what operators return, which a tensor in oneDNN's layout has
    not, and gives memory that is not used any more to other results.
    """
    from torch._inductor import ir, lowering
    from torch._inductor.virtualized import V
    from torch.utils import _pytree as pytree

    def keep(buffer: Any) -> Any:
        buffer.codegen_size_asserts = lambda wrapper: None
        buffer.codegen_alignment_asserts = lambda wrapper: None
        V.graph.never_reuse_buffers.add(buffer.get_name())
        return ir.TensorBox.create(buffer)

    @lowering.register_lowering(target, type_promotion_kind=None)
    def _lower(*args: Any, **kwargs: Any) -> Any:
        return pytree.tree_map(keep, ir.FallbackKernel.create(target, *args, **kwargs))


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


def may_measure() -> bool:
    """Whether compiling may depend on how fast something runs here."""
    deterministic = inductor_config.deterministic or torch.are_deterministic_algorithms_enabled()
    return not deterministic


_GENERATED = ("aten", "prims")  # other libraries' operators are called


def in_subgraph() -> bool:
    """Whether Inductor's post-grad passes are at a graph inside another one (cond, scan, ...).

    The only thing that tells is that they are called for it from within those of the outer one.
    """
    frame, depth = inspect.currentframe(), 0
    while frame is not None:
        depth += frame.f_code.co_name == "_recursive_post_grad_passes"
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
    value = getattr(inductor_config, hook)
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)
