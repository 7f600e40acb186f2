"""Helpers for the tests of this package and for the CI of its users: see docs/testing.md.

No assertion generates code; where values are needed, graphs run eagerly (:func:`fast_backend`).
"""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ._torch import inductor, registry
from .codes import Code
from .explanation import explain
from .passes.scale_gradient import ScaleGradientPass
from .passes.wanted_gradients import MaskBitsPass, WantedGradientsPass
from .records import Record
from .saved_tensors import saved_for_backward

__all__ = ["assert_fused", "assert_none_left", "assert_numerics"]
__all__ += ["assert_saved_at_most", "assert_saved_like_deploy", "fast_backend", "fresh_compile"]
__all__ += ["outputs_and_gradients", "post_grad_backend", "run_on_graph"]


def assert_fused(fn: Callable[..., Any], *inputs: Any, count: int) -> None:
    """Raise AssertionError unless exactly ``count`` batch norms are fused."""
    explanation = explain(fn, *inputs)
    if explanation.fused != count:
        raise AssertionError(f"expected {count} batch norms to be fused\n{explanation}")


def assert_none_left(
    fn: Callable[..., Any], *inputs: Any, except_codes: Iterable[Code] = ()
) -> None:
    """Raise AssertionError if a batch norm is left alone for a code not in ``except_codes``.

    Those that are not compiled or not called count, too: ``Code.NOT_COMPILED``.
    """
    explanation = explain(fn, *inputs)
    _require_graphs(explanation.graphs)
    if left := explanation.left(except_codes=tuple(except_codes)):
        codes = ", ".join(sorted({r.code.name for r in left}))
        norms = "batch norm" if len(left) == 1 else "batch norms"
        raise AssertionError(f"{len(left)} {norms} left alone ({codes})\n{explanation}")


def assert_saved_at_most(fn: Callable[..., Any], *inputs: Any, nbytes: int) -> None:
    """Raise AssertionError if tune mode saves more than ``nbytes`` new bytes for backward.

    As ``explain`` counts them, with channels-last copies that Inductor makes of the model's own.
    """
    kept = saved_for_backward(fn, *inputs, mode="tune")
    _require_graphs(kept.graphs)
    if kept.all_bytes > nbytes:
        largest = sorted(kept.tensors, key=lambda t: -t.nbytes)[:10]
        lines = "\n".join(f"  {t.name} {t.shape} {t.dtype}: {t.nbytes:,}" for t in largest)
        raise AssertionError(
            f"{kept.all_bytes:,} bytes are saved for backward, expected at most {nbytes:,}; "
            f"the largest:\n{lines}"
        )


def assert_saved_like_deploy(fn: Callable[..., Any], *inputs: Any) -> None:
    """Raise AssertionError if tune mode saves more for backward than the merged model does."""
    deploy = saved_for_backward(fn, *inputs, mode="deploy")
    assert_saved_at_most(fn, *inputs, nbytes=deploy.all_bytes)


def _require_graphs(graphs: int) -> None:
    if not graphs:
        raise AssertionError("nothing is compiled: Dynamo captures no graph")


def outputs_and_gradients(
    fn: Callable[..., Any], parameters: Mapping[str, Tensor], inputs: tuple[Any, ...]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Run ``fn`` and backward; returns its tensor outputs and all gradients by name.

    Each output gets a gradient of its own, the same in every call, so that nothing cancels by
    symmetry. Inputs are named ``input0``, ``input1``, ... What ``grad`` was before, it is again.
    """
    leaves = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
    named = dict(parameters)
    named.update({f"input{i}": t for i, t in enumerate(leaves) if t.requires_grad})
    before = [t.grad for t in named.values()]
    for tensor in named.values():
        tensor.grad = None
    try:
        outputs = [t for t in pytree.tree_leaves(fn(*inputs)) if isinstance(t, Tensor)]
        if differentiable := [o for o in outputs if o.requires_grad]:
            generator = torch.Generator().manual_seed(0)
            random = partial(torch.randn, generator=generator, dtype=torch.float64)
            torch.autograd.backward(differentiable, [random(o.shape).to(o) for o in differentiable])
        gradients = {n: t.grad.clone() for n, t in named.items() if t.grad is not None}
    finally:
        for tensor, gradient in zip(named.values(), before, strict=True):
            tensor.grad = gradient
    return [o.detach().clone() for o in outputs], gradients


_NOISE = 0.5  # an error with which nothing is known of the largest element


def _error(value: Tensor, reference: Tensor) -> float:
    """Largest error relative to the largest element of the reference."""
    if reference.numel() == 0:
        return 0.0
    scale = reference.abs().max().item() or 1.0
    return (value.to(reference) - reference).abs().max().item() / scale


def assert_numerics(
    model: nn.Module,
    *inputs: Any,
    factor: float = 2.0,
    backend: Callable[..., Any] | None = None,
    bits: bool = True,
) -> dict[str, tuple[float, float]]:
    """Check forward and gradients of tune mode against float64 and against eval mode.

    Each gradient's error against a float64 run of eval mode may be at most ``factor`` times the
    largest that eval mode itself makes in a gradient under the same compiler, plus 8 units in the
    last place of its dtype. (The largest, because a batch norm weight's gradient inherits the
    rounding of others.) A gradient that is zero but for rounding, where eval mode's error is half
    of it or more, counts for itself alone. Both modes must compute the same: no dropout.

    Args:
        model, inputs: a module and real tensors, all float32 or narrower.
        backend: a backend factory like :func:`fast_backend`, which is the default.
        bits: also require that the outputs are bitwise identical to eval mode.

    Returns:
        By name, errors relative to the reference's largest element: (tune mode's, eval mode's).

    Raises:
        AssertionError: an error is too large, a gradient is missing or has another dtype.
    """
    reference = copy.deepcopy(model).double()
    doubles = pytree.tree_map_only(Tensor, _as_double, inputs)
    exact = _named(*outputs_and_gradients(reference, dict(reference.named_parameters()), doubles))
    runs = []
    for fuse in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=(backend or fast_backend)(fuse=fuse))
        runs.append(outputs_and_gradients(compiled, dict(model.named_parameters()), inputs))
    torch._dynamo.reset()
    (eval_outputs, eval_gradients), (outputs, gradients) = runs
    for i, pair in enumerate(zip(outputs, eval_outputs, strict=True) if bits else ()):
        message = partial("output {}: {}".format, i)
        torch.testing.assert_close(*pair, rtol=0, atol=0, equal_nan=True, msg=message)
    if gradients.keys() != eval_gradients.keys():
        raise AssertionError(f"gradients {sorted(gradients)} instead of {sorted(eval_gradients)}")
    in_eval, in_tune = _named(eval_outputs, eval_gradients), _named(outputs, gradients)
    errors = {n: (_error(in_tune[n], exact[n]), _error(in_eval[n], exact[n])) for n in in_eval}
    largest = max((error for _, error in errors.values() if error < _NOISE), default=0.0)
    for name, (error, eval_error) in errors.items():
        dtype = in_tune[name].dtype
        if dtype != in_eval[name].dtype:
            raise AssertionError(f"{name} is {dtype}, in eval mode {in_eval[name].dtype}")
        band = 8 * torch.finfo(dtype).eps
        allowed = largest if eval_error < _NOISE else 4 * eval_error
        if not error <= factor * allowed + band:
            raise AssertionError(
                f"{name}: error {error:.2e} in tune mode, {eval_error:.2e} in eval mode, "
                f"allowed {factor} times {allowed:.2e} plus {band:.1e}"
            )
    return errors


def _named(outputs: list[Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """All that is rounded, by name."""
    floating = {f"output{i}": t for i, t in enumerate(outputs) if t.is_floating_point()}
    return {**floating, **gradients}


def _as_double(t: Tensor) -> Tensor:
    return t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t


def run_on_graph(graph: fx.Graph) -> tuple[Record, ...]:
    """Apply tune mode and wanted gradients to a joint graph, whatever the flag says: records."""
    found = ScaleGradientPass().run(graph).records + WantedGradientsPass().run(graph).records
    graph.lint()
    return found


def fast_backend(
    *, fuse: bool = True, on_graph: Callable[[fx.Graph], object] = run_on_graph
) -> Callable[..., Any]:
    """A backend for ``torch.compile``: Inductor up to its post-grad passes, then eager execution.

    Of our passes only tune mode and wanted gradients run, whatever the flag says; none run with
    ``fuse=False``, which gives eval mode. No code is generated. ``on_graph`` runs on each joint
    graph.
    """

    def pack(forward: fx.Graph, backward: fx.Graph) -> None:
        MaskBitsPass().run(forward, backward)
        forward.lint()
        backward.lint()

    passes: dict[str, registry.GraphPass] = {
        "joint_custom_pre_pass": on_graph,
        registry.PARTITIONER: pack,
    }
    return _backend(passes if fuse else {}, efficient_conv_bn_eval_fx_passes=False)


def post_grad_backend(
    on_graph: Callable[[fx.Graph], None] = lambda graph: None,
) -> Callable[..., Any]:
    """A backend like Inductor up to its post-grad passes, then eager execution.

    Our passes run as the flag and the options say; ``on_graph`` gets each graph as they left it.
    """

    def on_post_grad(graph: fx.Graph) -> None:
        for each in registry.passes_of("post_grad_custom_pre_pass"):
            each(graph)
        graph.lint()
        on_graph(graph)

    return _backend(on_post_grad=on_post_grad)


def _backend(
    passes: Mapping[str, registry.GraphPass] = {},
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
    """Compile inside a ``with`` block with the flag set as given, and every graph anew.

    Caches are off, and code compiled before is dropped (``torch._dynamo.reset``).
    """
    torch._dynamo.reset()
    try:
        with inductor.caches_off(efficient_conv_bn_eval_fx_passes=flag):
            yield
    finally:
        torch._dynamo.reset()
