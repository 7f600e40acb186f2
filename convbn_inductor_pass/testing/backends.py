"""Backends for ``torch.compile`` that stop before code generation, and what passes do in them."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from .._torch import inductor, registry, tracing
from ..codes import Code
from ..passes.scale_gradient import ScaleGradientPass
from ..passes.wanted_gradients import MaskBitsPass, WantedGradientsPass
from ..records import Record


@dataclasses.dataclass(frozen=True)
class PassResult:
    """One joint graph before and after the tune-mode pass, as code, and what was decided."""

    before: str
    after: str
    records: tuple[Record, ...]

    @property
    def codes(self) -> list[Code]:
        """The codes of batch norms, one per call."""
        return [r.code for r in self.records if r.kind == "batch norm"]


def _code(graph: fx.Graph) -> str:
    return graph.python_code("self").src.strip()


def run_on_graph(graph: fx.Graph) -> PassResult:
    """Apply the tune-mode pass to one graph in aten IR, whatever the flag says."""
    before = _code(graph)
    found = ScaleGradientPass().run(graph).records
    found += WantedGradientsPass().run(graph).records
    graph.lint()
    return PassResult(before, _code(graph), found)


def run_pass(fn: Callable[..., Any], *inputs: Any, dynamic: bool | None = None) -> list[PassResult]:
    """Trace ``fn`` on fake tensors and apply the tune-mode pass: one result per graph in aten IR.

    Graphs inside a higher-order operator come before the graph that contains it.
    """
    results: list[PassResult] = []
    backend = fast_backend(on_result=results.append)

    def on_graph(gm: fx.GraphModule, example_inputs: list[Any]) -> None:
        with inductor.tracing_apart():
            backend(tracing.copy_graph_module(gm), example_inputs)

    tracing.trace(fn, inputs, on_graph, dynamic=dynamic)
    return results


def fast_backend(
    *, fuse: bool = True, on_result: Callable[[PassResult], object] = lambda result: None
) -> Callable[..., Any]:
    """A backend for ``torch.compile``: Inductor up to its post-grad passes, then eager execution.

    Of our passes only tune mode and wanted gradients run, whatever the flag says; none run with
    ``fuse=False``, which gives eval mode to compare with. The partitioner decides what is saved for
    backward; no code is generated. ``on_result`` gets what the pass did to each graph in aten IR.
    """

    def rewrite(graph: fx.Graph) -> None:
        on_result(run_on_graph(graph))

    def pack(forward: fx.Graph, backward: fx.Graph) -> None:
        MaskBitsPass().run(forward, backward)
        forward.lint()
        backward.lint()

    passes: dict[str, Callable[..., None]] = {
        "joint_custom_pre_pass": rewrite,
        registry.PARTITIONER: pack,
    }
    return _backend(passes if fuse else {}, efficient_conv_bn_eval_fx_passes=False)


def post_grad_backend(
    on_graph: Callable[[fx.Graph], None] = lambda graph: None,
) -> Callable[..., Any]:
    """A backend like Inductor up to its post-grad passes, ours included, then eager execution.

    Our passes run as the flag and the options say. ``on_graph`` gets each graph in aten IR as they
    left it.
    """

    def on_post_grad(graph: fx.Graph) -> None:
        for each in registry.passes_of("post_grad_custom_pre_pass"):
            each(graph)
        graph.lint()
        on_graph(graph)

    return _backend(on_post_grad=on_post_grad)


def _backend(
    passes: Mapping[str, Callable[..., None]] = {},
    on_post_grad: Callable[[fx.Graph], None] = lambda graph: None,
    **settings: Any,
) -> Callable[..., Any]:
    """A backend: Inductor with further passes, by hook, and ``settings``, then eager execution."""

    def run_eagerly(gm: fx.GraphModule, _inputs: list[Any], **_kwargs: Any) -> Callable[..., Any]:
        # As Inductor does first: strides may differ from those that were traced.
        for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
            node.target = torch.ops.aten.reshape.default
        on_post_grad(gm.graph)
        gm.recompile()
        return inductor.make_boxed_func(gm)

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        with inductor.caches_off(**settings), registry.passes_added(passes):
            return inductor.compile_with(run_eagerly, gm, example_inputs)

    return backend


@contextlib.contextmanager
def fresh_compile(*, flag: bool = True) -> Iterator[None]:
    """Compile without caches inside a ``with`` block, with the flag set as given.

    Neither Dynamo's code nor Inductor's and AOTAutograd's caches are used, so every graph goes
    through the pass. Code compiled before is dropped (``torch._dynamo.reset``).
    """
    torch._dynamo.reset()
    with inductor.caches_off(efficient_conv_bn_eval_fx_passes=flag):
        yield
    torch._dynamo.reset()
