"""What the tests of wanted gradients share: compare with the passes and without, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from joint_graphs import PassResult, recording_backend
from torch import Tensor, fx, nn

from convbn_inductor_pass import Code, Record, testing
from convbn_inductor_pass._torch import tracing
from convbn_inductor_pass.saved_tensors import saved_by_graph

__all__ = ["Compared", "check_bits", "codes", "compare", "wanted_records"]

KINDS = ("shape", "activation", "pooling", "mask")


class Compared:
    """Outputs and gradients with the passes and without, and what the passes did."""

    def __init__(self, runs: list[Any], results: list[PassResult]) -> None:
        (self.outputs, self.gradients), (self.plain_outputs, self.plain_gradients) = runs
        self.results = results

    @property
    def codes(self) -> list[tuple[str, Code]]:
        found = [r for result in self.results for r in result.records]
        return [(r.kind, r.code) for r in found if r.kind in KINDS]


def compare(
    fn: Callable[..., Any], *inputs: Tensor, dynamic: bool | None = None, autocast: bool = False
) -> Compared:
    """Run ``fn`` and backward twice, graphs by aten kernels; the outputs' bits have to be equal."""
    parameters = dict(fn.named_parameters()) if isinstance(fn, nn.Module) else {}
    results: list[PassResult] = []
    runs = []
    for backend in (
        recording_backend(results.append),
        testing.fast_backend(fuse=False),
    ):
        torch._dynamo.reset()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            compiled = torch.compile(fn, backend=backend, dynamic=dynamic)
            runs.append(testing.outputs_and_gradients(compiled, parameters, inputs))
    for result in results:
        changed = result.before != result.after
        assert changed == any(r.code.rewritten for r in result.records)
    compared = Compared(runs, results)
    same(compared.outputs, compared.plain_outputs)
    return compared


def check_bits(fn: Callable[..., Any], *inputs: Tensor, **options: Any) -> Compared:
    """:func:`compare`, and every bit of the gradients has to be equal, too."""
    compared = compare(fn, *inputs, **options)
    assert compared.gradients
    same(compared.gradients, compared.plain_gradients)
    return compared


def same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def wanted_records(
    fn: Callable[..., Any], *inputs: Tensor, dynamic: bool | None = None
) -> list[Record]:
    """What ``explain`` says of wanted gradients, without its other modes."""
    records: list[Record] = []

    def on_graph(gm: fx.GraphModule, example_inputs: list[Any]) -> None:
        found: list[tuple[str, Record]] = []
        saved_by_graph(gm, example_inputs, "tune", found.extend)
        # Only now: Dynamo may have given up above.
        records.extend(r for _, r in found if r.kind in KINDS)

    tracing.trace(fn, inputs, on_graph, dynamic=dynamic)
    return records


def codes(fn: Callable[..., Any], *inputs: Tensor, **options: Any) -> list[tuple[str, Code]]:
    return [(r.kind, r.code) for r in wanted_records(fn, *inputs, **options)]
