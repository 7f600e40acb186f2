"""One verdict for every test: is the fused function what the unfused one is?

Three runs of the same function on the same numbers: eager, compiled without the pass, compiled
with it. The pass may change neither whether something is raised, nor a bit of any output or of
the final state of any argument, nor which gradients there are and in which dtype. Gradients are
held against a float64 run: their error may be a few times that of the compiler without the
pass, plus a rounding band.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from convbn_inductor_pass import Code, testing
from convbn_inductor_pass.testing import PassResult
from convbn_inductor_pass.tracing import copy_graph_module, graph_modules

__all__ = ["Outcome", "PassRecorder", "assert_same_as_unfused", "compare", "run"]

FACTOR = 8.0
ULPS = 64.0


@dataclasses.dataclass
class Outcome:
    """What one run gave, or what it raised."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    state: dict[str, Tensor]
    error: BaseException | None = None


class PassRecorder:
    """A backend that applies the pass, keeps its results, and asserts that refusals do nothing.

    Graphs in which nothing is fused are not compiled further: they are what they were.
    """

    def __init__(self, *, compile_unfused: bool = False) -> None:
        self.results: list[PassResult] = []
        self.skipped = False
        self.compile_unfused = compile_unfused

    @property
    def codes(self) -> list[Code]:
        return [code for result in self.results for code in result.codes]

    @property
    def fused(self) -> int:
        return sum(code.fused for code in self.codes)

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        results = [testing.run_on_graph(m) for m in graph_modules(copy_graph_module(gm))]
        for result in results:
            changed = result.before != result.after
            if changed != (result.records.fused > 0):
                raise AssertionError(f"{result.records}\n{result.before}\n{result.after}")
        self.results += results
        if self.compile_unfused or any(r.records.fused for r in results):
            return testing.fast_backend()(gm, example_inputs)
        self.skipped = True
        return gm.forward


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


def _relative_error(value: Tensor, reference: Tensor) -> float:
    if value.numel() == 0:
        return 0.0
    scale = reference.abs().max().item() or 1.0
    return (value.to(reference) - reference).abs().max().item() / scale


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
) -> None:
    """Raise AssertionError unless ``fused`` may stand for ``unfused``; see the top of this file.

    ``computed_in`` is the narrowest dtype that is computed in, which autocast may choose: a
    float32 gradient that went through bfloat16 is not more precise than that.
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
    for name, by_unfused in unfused.gradients.items():
        value = fused.gradients[name]
        if (value.dtype, value.shape) != (by_unfused.dtype, by_unfused.shape):
            raise AssertionError(f"gradient of {name}: {value} instead of {by_unfused}")
        if torch.equal(value.isfinite(), by_unfused.isfinite()) is False:
            raise AssertionError(f"gradient of {name}: {value}, without {by_unfused}")
        if not by_unfused.isfinite().all():
            continue
        eps = max(torch.finfo(dtype).eps for dtype in (value.dtype, computed_in))
        band = (ULPS if eps < 1e-3 else 8) * eps
        error, allowed = _relative_error(value, by_unfused.double()), band
        if exact is not None and exact.error is None and name in exact.gradients:
            reference = exact.gradients[name].double()
            by_eval = _relative_error(by_unfused, reference)
            # Where the compiler itself is not what eager mode is, it is the reference.
            if by_eval < 0.5:
                error, allowed = _relative_error(value, reference), FACTOR * by_eval + band
        if not error <= allowed:
            raise AssertionError(
                f"gradient of {name}: error {error:.2e}, allowed {allowed:.2e}\n"
                f"with the pass: {value}\nwithout: {by_unfused}"
            )


def assert_same_as_unfused(
    fn: Callable[..., Any],
    arguments: Callable[[], Mapping[str, Tensor]],
    *,
    exact: Callable[[], Outcome] | None = None,
    make_function: Callable[[], Callable[..., Any]] | None = None,
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
        exact: the run in float64 to hold gradients against, if there is one.
        call: see :func:`run`. context: entered around each run.
        always: compare even if nothing is fused.
        computed_in: see :func:`compare`.
        compile_options: for ``torch.compile``.
    """
    recorder = PassRecorder(compile_unfused=always)

    def outcome(backend: Any) -> Outcome:
        function = fn if make_function is None else make_function()
        torch._dynamo.reset()
        if backend is not None:
            function = torch.compile(function, backend=backend, **compile_options)
        with context():
            return run(function, arguments(), call)

    fused = outcome(recorder)
    if recorder.fused and recorder.skipped:  # another graph of the same function
        recorder = PassRecorder(compile_unfused=True)
        fused = outcome(recorder)
    if always or recorder.fused:
        # With nothing fused it is the unfused function; held against float64 all the same.
        unfused = outcome(testing.fast_backend(fuse=False)) if recorder.fused else fused
        compare(fused, unfused, outcome(None), None if exact is None else exact(), computed_in)
    torch._dynamo.reset()
    return recorder
