"""One verdict for every test: is the fused function what the unfused one is?

Three runs of the same function on the same numbers: eager, compiled without the pass, compiled
with it. The pass may change neither whether something is raised, nor a bit of any output or of
the final state of any argument, nor which gradients there are and in which dtype. Gradients are
held against a float64 run: their error may be a few times that of the compiler without the
pass, plus a rounding band. Where the exact gradient is zero, all of a gradient is error; if the
function itself computes in float64, all there is then is rounding of the other gradients' size.

A gradient may be a small sum of large terms, such as a batch norm weight's between other layers.
In float32 the band has room for that; bfloat16 and float16 have not the digits. A narrow gradient
outside its band is therefore accepted on two conditions, neither of which a wrong formula meets:
the same function on float64 arguments, where autocast changes nothing, is fused as often and its
gradients agree with the unfused ones to ``WIDE``; and the narrow error is at most ``NOISE`` times
what rounding the arguments once, to the narrow dtype, changes in the gradient in float64, which
is the rounding of the terms and not of their sum.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from joint_graphs import PassResult, recording_backend
from torch import Tensor, fx

from convbn_inductor_pass import Code, testing

__all__ = [
    "Outcome",
    "PassRecorder",
    "assert_same_as_unfused",
    "compare",
    "relative_error",
    "run",
]

FACTOR = 8.0
ULPS = 64.0
NOISE = 4.0
ZERO = 1e-6
WIDE = 1e-9
PERTURBATIONS = 8


@dataclasses.dataclass
class Outcome:
    """What one run gave, or what it raised."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    state: dict[str, Tensor]
    error: BaseException | None = None


class PassRecorder:
    """The fast backend, that keeps what the pass did, and asserts that refusals change nothing."""

    def __init__(self) -> None:
        self.results: list[PassResult] = []
        self.backend = recording_backend(self.add)

    @property
    def codes(self) -> list[Code]:
        """Of batch norms."""
        return [code for result in self.results for code in result.codes]

    @property
    def fused(self) -> int:
        """Batch norms and other scales that are fused."""
        records = [r for result in self.results for r in result.records]
        return sum(r.code.rewritten for r in records)

    def add(self, result: PassResult) -> None:
        changed = result.before != result.after
        if changed != any(r.code.rewritten for r in result.records):
            raise AssertionError(f"{result.records}\n{result.before}\n{result.after}")
        self.results.append(result)

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        return self.backend(gm, example_inputs)


def run(
    fn: Callable[..., Any],
    arguments: Mapping[str, Tensor],
    call: Callable[[Callable[..., Any], Mapping[str, Tensor]], Any] | None = None,
) -> Outcome:
    """Call ``fn`` with ``arguments`` and run backward; whatever it raises is kept.

    ``call(fn, arguments)`` may take over the call itself.
    """

    def forward() -> Any:
        return fn(*arguments.values()) if call is None else call(fn, arguments)

    leaves = {n: t for n, t in arguments.items() if t.is_leaf and t.requires_grad}
    try:
        outputs, gradients = testing.outputs_and_gradients(forward, leaves, ())
    except Exception as error:
        return Outcome([], {}, {}, error)
    state = {name: tensor.detach().clone() for name, tensor in arguments.items()}
    return Outcome(outputs, gradients, state)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """The largest error relative to the largest element of the reference."""
    if value.numel() == 0:
        return 0.0
    scale = reference.abs().max().item() or 1.0
    return (value.to(reference) - reference).abs().max().item() / scale


def _largest(value: Tensor) -> float:
    return value.abs().max().item() if value.numel() else 0.0


def _max_error(value: Tensor, reference: Tensor) -> float:
    return _largest(value.to(reference) - reference)


def _perturbed(arguments: Mapping[str, Tensor], relative: float, seed: int) -> Mapping[str, Tensor]:
    """``arguments``, each number changed in place by ``relative``, up or down at random."""
    generator = torch.Generator().manual_seed(seed)
    seen = set()
    for tensor in arguments.values():
        storage = tensor.untyped_storage().data_ptr()
        if tensor.is_floating_point() and storage not in seen:
            sign = torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
            tensor.data.mul_(1 + relative * sign.to(tensor.dtype))
        seen.add(storage)
    return arguments


def rounding_noise(
    outcome: Callable[[Any, Mapping[str, Tensor]], Outcome],
    arguments: Callable[[], Mapping[str, Tensor]],
    dtype: torch.dtype,
    fused: int,
) -> dict[str, float]:
    """By gradient name, how far one rounding of the arguments to ``dtype`` moves the gradient.

    Args:
        outcome: runs the function with a backend (None: eager mode) on float64 arguments.
        arguments: makes the same float64 arguments anew.
        dtype: the narrow dtype.
        fused: how many pairs are fused in the narrow run.

    Returns:
        The largest changes; nothing if the function cannot be run in float64, or is not fused
        there as it is in the narrow run: then that tells nothing of the narrow run.

    Raises:
        AssertionError: the pass is wrong, which float64 shows beyond doubt.
    """
    recorder = PassRecorder()
    by_pass = outcome(recorder, arguments())
    by_unfused = outcome(testing.fast_backend(fuse=False), arguments())
    exact = outcome(None, arguments())
    if any(o.error is not None for o in (by_pass, by_unfused, exact)) or recorder.fused != fused:
        return {}
    noise = dict.fromkeys(exact.gradients, 0.0)
    for seed in range(PERTURBATIONS):
        rounded = outcome(None, _perturbed(arguments(), torch.finfo(dtype).eps / 2, seed))
        for name, value in rounded.gradients.items():
            if value.isfinite().all():
                noise[name] = max(noise[name], _max_error(value, exact.gradients[name]))
    for name, reference in by_unfused.gradients.items():
        error = _max_error(by_pass.gradients[name], reference)
        scale = max(noise[name], reference.abs().max().item() if reference.numel() else 0.0)
        if not error <= WIDE * scale:
            raise AssertionError(
                f"gradient of {name} in float64: error {error:.2e} at a scale of {scale:.2e}\n"
                f"with the pass: {by_pass.gradients[name]}\nwithout: {reference}"
            )
    return noise


def _assert_same_bits(what: str, a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(
        a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}", check_stride=True
    )


def compare(
    fused: Outcome,
    unfused: Outcome,
    eager: Outcome,
    exact: Outcome | None,
    computed_in: torch.dtype = torch.float32,
    noise: Callable[[torch.dtype], Mapping[str, float]] | None = None,
) -> None:
    """Raise AssertionError unless ``fused`` may stand for ``unfused``; see the top of this file.

    ``computed_in`` is the narrowest dtype that is computed in, which autocast may choose: a
    float32 gradient that went through bfloat16 is not more precise than that. ``noise`` is
    :func:`rounding_noise`, called only for a narrow gradient outside its band.
    """
    if (fused.error is None) != (unfused.error is None):
        if (unfused.error is None) == (eager.error is None):
            errors = {"with the pass": fused, "without": unfused, "eager": eager}
            raise AssertionError("\n".join(f"{k}: {o.error!r}" for k, o in errors.items())) from (
                fused.error or unfused.error
            )
        return
    if fused.error is not None:
        return
    if len(fused.outputs) != len(unfused.outputs):
        raise AssertionError(f"{len(fused.outputs)} outputs, without {len(unfused.outputs)}")
    for i, (a, b) in enumerate(zip(fused.outputs, unfused.outputs, strict=True)):
        _assert_same_bits(f"output {i}", a, b)
    for name in unfused.state:
        _assert_same_bits(f"final state of {name}", fused.state[name], unfused.state[name])
    if fused.gradients.keys() != unfused.gradients.keys():
        raise AssertionError(f"gradients {[*fused.gradients]}, without {[*unfused.gradients]}")
    sizes = (_largest(g) for g in unfused.gradients.values() if g.isfinite().all())
    rounding = ULPS * torch.finfo(torch.float64).eps * max(sizes, default=0.0)
    for name, by_unfused in unfused.gradients.items():
        value = fused.gradients[name]
        if (value.dtype, value.shape) != (by_unfused.dtype, by_unfused.shape):
            raise AssertionError(f"gradient of {name}: {value} instead of {by_unfused}")
        if torch.equal(value.isfinite(), by_unfused.isfinite()) is False:
            raise AssertionError(f"gradient of {name}: {value}, without {by_unfused}")
        if not by_unfused.isfinite().all():
            continue
        coarsest = max(value.dtype, computed_in, key=lambda dtype: torch.finfo(dtype).eps)
        eps = torch.finfo(coarsest).eps
        is_narrow = coarsest in (torch.bfloat16, torch.float16)
        band = (8 if is_narrow else ULPS) * eps
        reference = by_unfused.double()
        error, allowed = relative_error(value, reference), band
        if exact is not None and exact.error is None and name in exact.gradients:
            by_exact = exact.gradients[name].double()
            by_eval = relative_error(by_unfused, by_exact)
            if _largest(by_exact) <= ZERO * _largest(reference):
                # Zero but for rounding, as a bias's before a batch norm in training mode.
                error, allowed = _largest(value) / (_largest(reference) or 1.0), FACTOR
            # Where the compiler itself is not what eager mode is, it is the reference.
            if by_eval < 0.5:
                reference = by_exact
                error, allowed = relative_error(value, reference), FACTOR * by_eval + band
        scale = _largest(reference) or 1.0
        allowed = max(allowed, rounding / scale)
        if not error <= allowed and is_narrow and noise is not None:
            allowed = max(allowed, NOISE * noise(coarsest).get(name, 0.0) / scale)
        if not error <= allowed:
            raise AssertionError(
                f"gradient of {name}: error {error:.2e}, allowed {allowed:.2e}\n"
                f"with the pass: {value}\nwithout: {by_unfused}"
            )


def assert_same_as_unfused(
    fn: Callable[..., Any],
    arguments: Callable[[], Mapping[str, Tensor]],
    *,
    double: Callable[[], Mapping[str, Tensor]] | None = None,
    make_function: Callable[[], Callable[..., Any]] | None = None,
    make_double_function: Callable[[], Callable[..., Any]] | None = None,
    call: Callable[[Callable[..., Any], Mapping[str, Tensor]], Any] | None = None,
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    always: bool = True,
    computed_in: torch.dtype = torch.float32,
    **compile_options: Any,
) -> PassRecorder:
    """Compile and run ``fn`` with the pass and without, compare, and return what the pass did.

    Args:
        fn: the function; ``make_function`` gives a fresh one for each run instead.
        arguments: makes the same arguments anew for each run.
        double: makes the same arguments in float64, if gradients can be held against them.
        make_double_function: the function for them, if it is another one.
        call: see :func:`run`. context: entered around each run.
        always: compare even if nothing is fused.
        computed_in: see :func:`compare`.
        compile_options: for ``torch.compile``.
    """
    recorder = PassRecorder()

    make_function = make_function or (lambda: fn)

    def outcome(backend: Any) -> Outcome:
        with context():
            return compiled_run(make_function(), backend, arguments())

    def outcome_in_float64(backend: Any, values: Mapping[str, Tensor]) -> Outcome:
        return compiled_run((make_double_function or make_function)(), backend, values)

    def compiled_run(
        function: Callable[..., Any], backend: Any, values: Mapping[str, Tensor]
    ) -> Outcome:
        torch._dynamo.reset()
        if backend is not None:
            function = torch.compile(function, backend=backend, **compile_options)
        return run(function, values, call)

    fused = outcome(recorder)
    if always or recorder.fused:
        # With nothing fused it is the unfused function; held against float64 all the same.
        unfused = outcome(testing.fast_backend(fuse=False)) if recorder.fused else fused
        exact = noise = None
        if double is not None:
            exact = outcome_in_float64(None, double())
            noise = functools.cache(
                lambda dtype: rounding_noise(outcome_in_float64, double, dtype, recorder.fused)
            )
        compare(fused, unfused, outcome(None), exact, computed_in, noise)
    torch._dynamo.reset()
    return recorder
