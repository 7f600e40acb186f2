"""Compile up to Inductor's post-grad passes, or through Inductor, with nothing cached."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config

from convbn_inductor_pass._torch import inductor, registry

__all__ = ["fresh_compile", "outputs_and_gradients", "post_grad_backend"]

HOOK = "post_grad_custom_pre_pass"


@contextlib.contextmanager
def fresh_compile(*, flag: bool = True) -> Iterator[None]:
    """Compile everything again inside, with PyTorch's flag as given."""
    torch._dynamo.reset()
    with (
        inductor_config.patch(
            efficient_conv_bn_eval_fx_passes=flag, fx_graph_cache=False, fx_graph_remote_cache=False
        ),
        functorch_config.patch(enable_autograd_cache=False),
    ):
        yield
    torch._dynamo.reset()


def post_grad_backend(
    on_graph: Callable[[fx.Graph], None] = lambda graph: None,
    before: Callable[[fx.Graph], None] = lambda graph: None,
) -> Callable[..., Any]:
    """A backend like Inductor up to its post-grad passes, with eager execution of the graphs.

    ``before`` and ``on_graph`` get each graph as the passes found it and as they left it.
    """

    def run_eagerly(gm: fx.GraphModule, _inputs: list[Any], **_kwargs: Any) -> Callable[..., Any]:
        # As Inductor does first: strides may become others than those that were traced.
        for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
            node.target = torch.ops.aten.reshape.default
        before(gm.graph)
        for each in registry.passes_of(HOOK):
            each(gm.graph)
        gm.graph.lint()
        on_graph(gm.graph)
        gm.recompile()
        return inductor.boxed(gm)

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        return inductor.compile_with(run_eagerly, gm, example_inputs)

    return backend


def outputs_and_gradients(
    fn: Callable[[], tuple[Tensor, ...]], leaves: Mapping[str, Tensor]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Call ``fn`` and run backward; its outputs, and the gradients of ``leaves`` by name.

    Each output gets a gradient of its own, the same in every call.
    """
    outputs = list(fn())
    differentiable = [o for o in outputs if o.requires_grad]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(o.shape, generator=generator).to(o) for o in differentiable]
    if differentiable:
        torch.autograd.backward(differentiable, weights)
    gradients = {n: t.grad.clone() for n, t in leaves.items() if t.grad is not None}
    return [o.detach().clone() for o in outputs], gradients
