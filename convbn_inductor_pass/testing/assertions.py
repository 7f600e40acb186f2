"""What a model's CI can assert: which batch norms are fused, bytes saved, outputs and gradients."""

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..codes import Code
from ..explanation import explain
from ..saved_tensors import saved_for_backward
from .backends import fast_backend


def assert_fused(fn: Callable[..., Any], *inputs: Any, count: int) -> None:
    """Raise AssertionError unless exactly ``count`` batch norms are fused."""
    explanation = explain(fn, *inputs)
    if explanation.fused != count:
        raise AssertionError(f"expected {count} batch norms to be fused\n{explanation}")


def assert_none_left(
    fn: Callable[..., Any], *inputs: Any, except_codes: Iterable[Code] = ()
) -> None:
    """Raise AssertionError if a batch norm is left alone for a code not in ``except_codes``.

    Those that are not compiled count, too, and those that are not called: ``Code.NOT_COMPILED``.
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

    Each output gets a gradient of its own, the same in every call, so that no two parts of a
    gradient cancel by symmetry. Gradients of inputs are named ``input0``, ``input1``, ...
    Gradients that were there before are there again afterwards.
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

    The tolerance is not a constant: each gradient's error against a float64 run of the model
    in eval mode may be at most ``factor`` times the largest error that eval mode itself makes
    in a gradient under the same compiler, plus a rounding band of 8 units in the last place
    of its dtype. (The largest, because tune mode computes a batch norm weight's gradient from
    the layer's weight gradient and the batch norm bias's, with their rounding.) A gradient that is
    zero but for rounding, where eval mode's error is half of it or more, counts for itself alone.
    Both modes must compute the same: no dropout in training mode.

    Args:
        model: a module whose parameters and inputs are float32 or narrower.
        inputs: its inputs, real tensors.
        factor: see above.
        backend: a backend factory like :func:`fast_backend`, which is the default.
        bits: also require that the outputs are bitwise identical to eval mode.

    Returns:
        By output and gradient name: (error of tune mode, error of eval mode), both relative
        to the largest element of the reference.

    Raises:
        AssertionError: an error is too large, a gradient is missing or has another dtype.
    """
    make_backend = fast_backend if backend is None else backend
    reference = copy.deepcopy(model).double()
    doubles = pytree.tree_map_only(Tensor, _as_double, inputs)
    exact = _named(*outputs_and_gradients(reference, dict(reference.named_parameters()), doubles))
    runs = []
    for fuse in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=make_backend(fuse=fuse))
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
