"""Random affine chains: with ``forward="fold"``, and in training, all is as in eager mode.

By default 80 or 120 draws, always the same, up to Inductor's post-grad passes and then eager.
``CONVBN_FUZZ_EXAMPLES=5000`` draws that many, ``CONVBN_FUZZ_SEED=7`` other ones, and
``CONVBN_FUZZ_INDUCTOR=1`` generates code; a failing example prints as source code.
"""

from __future__ import annotations

import collections
import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch
from common import fuzz
from passes.random_chains import random_chains
from random_graphs import RandomFunction
from torch import Tensor

import convbn_inductor_pass as cbn
from convbn_inductor_pass import testing
from convbn_inductor_pass._torch import inductor

INDUCTOR = bool(os.environ.get("CONVBN_FUZZ_INDUCTOR"))

# Of the largest element of the result, and of one: what rounding may change.
BAND = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.2}


def run(
    function: RandomFunction, forward: str, *, flag: bool = True
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs and arguments after a call, and gradients, by name; ``forward=""`` is eager.

    Where nothing has a gradient, it is called a second time, with other values.
    """
    arguments = function.arguments()
    fn = function.function()
    backend: Any = "inductor" if INDUCTOR else testing.post_grad_backend()
    grad = any(t.requires_grad for t in arguments.values())
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=function.ambient_autocast)
    with contextlib.ExitStack() as stack:
        if forward:
            stack.enter_context(testing.fresh_compile(flag=flag))
            stack.enter_context(cbn.options(forward=forward))
            fn = torch.compile(fn, backend=backend, dynamic=function.dynamic)
        stack.enter_context(autocast)
        stack.enter_context(torch.set_grad_enabled(grad))
        leaves = {n: t for n, t in arguments.items() if t.requires_grad}
        if grad:
            outputs, gradients = testing.outputs_and_gradients(
                lambda: fn(*arguments.values()), leaves, ()
            )
        else:
            outputs, gradients = [t.clone() for t in fn(*arguments.values())], {}
            for tensor in {id(t): t for t in arguments.values() if t.is_floating_point()}.values():
                tensor.mul_(1.5)
            outputs += fn(*arguments.values())
    after = {f"after: {n}": t.detach().clone() for n, t in arguments.items()}
    return outputs, {**after, **{f"grad: {n}": g for n, g in gradients.items()}}


def differences(function: RandomFunction, got: Any, expected: Any) -> str:
    """What is not as expected, in a few words; "" if all is."""
    dtype = torch.bfloat16 if function.ambient_autocast else function.tensors[0].dtype
    found = [*((f"output {i}", *p) for i, p in enumerate(zip(got[0], expected[0], strict=True)))]
    found += [(name, got[1].get(name), value) for name, value in expected[1].items()]
    for name, out, value in found:
        if out is None or (out.shape, out.dtype) != (value.shape, value.dtype):
            return f"{name}: {None if out is None else (out.shape, out.dtype)}"
        if value.numel() and value.isfinite().all():
            error = (out.double() - value.double()).abs().max().item()
            if not error <= BAND[dtype] * (1 + value.abs().max().item()):
                return f"{name}: off by {error}"
    return ""


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Begin with no records, and let a pass that fails fail."""
    cbn.clear_records()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", cbn.PassFailedWarning)
        yield


def check_folding(function: RandomFunction, counts: collections.Counter) -> None:
    try:
        expected = run(function, "")
    except Exception:  # as autograd does, where the backward needs what was written to
        counts["raises"] += 1
        return
    with recorded():
        try:
            got = run(function, "fold")
        except Exception:
            try:
                run(function, "exact")
            except Exception:
                counts["raises"] += 1
                return
            raise  # only with folding
    records = [r for r in cbn.records() if r.pass_name == "forward_folding"]
    counts.update(r.code.name for r in records)
    counts["functions"] += 1
    counts["folded"] += any(r.code.rewritten for r in records)
    counts.update({r.kernel for r in records if r.code.rewritten})
    found = differences(function, got, expected)
    if found or INDUCTOR:
        plain = run(function, "exact")
        if found and differences(function, plain, expected):
            counts["wrong without folding, too"] += 1
            found = differences(function, got, plain)
        strides = [[_strides(t) for t in outputs] for outputs in (got[0], plain[0])]
        assert not INDUCTOR or strides[0] == strides[1]
    assert not found, found


def _strides(tensor: Tensor) -> list[int]:
    """Those that say where an element lies."""
    return [s for size, s in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]


def check_gradients(function: RandomFunction, counts: collections.Counter) -> None:
    """Gradients are eager mode's, and the outputs have the bits that they have without the pass."""
    try:
        expected = run(function, "")
        plain = run(function, "exact", flag=False)
    except Exception:  # as autograd does, where the backward needs what was written to
        counts["raises"] += 1
        return
    with recorded():
        got = run(function, "exact")
    codes = [r.code for r in cbn.records() if r.pass_name == "scale_gradient"]
    counts.update(code.name for code in codes)
    counts["functions"] += 1
    counts["rewritten"] += any(code.rewritten for code in codes)
    if not INDUCTOR:
        for a, b in zip(got[0], plain[0], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    found = differences(function, got, expected)
    if found and differences(function, plain, expected):
        counts["wrong without the pass, too"] += 1
        found = differences(function, got, plain)
    assert not found, found


def check_each(
    check: Callable[[RandomFunction, collections.Counter], None], examples: int, **options: bool
) -> collections.Counter:
    """Check random functions, each once: about half of what hypothesis draws, it has drawn before.

    Returns how often what happened.
    """
    counts: collections.Counter = collections.Counter()
    seen: set[str] = set()

    @fuzz(examples)
    @hypothesis.given(random_chains(**options))
    def each(function: RandomFunction) -> None:
        if str(function) not in seen:
            check(function, counts)
            seen.add(str(function))  # not if it failed: then it is run again

    each()
    print(dict(counts.most_common()))
    return counts


def test_random_gradients() -> None:
    counts = check_each(check_gradients, 24, trained=True)
    assert counts["rewritten"] >= counts["functions"] // 8  # else the draws test nothing


def test_random_chains() -> None:
    counts = check_each(check_folding, 40)
    assert counts["folded"] > counts["functions"] // 4


@pytest.mark.skipif(not inductor.has_onednn_epilogues(torch.float32), reason="needs oneDNN")
def test_random_chains_before_relu() -> None:
    """Residuals and ReLUs after convolutions of images."""
    counts = check_each(check_folding, 60, relu=True)
    assert counts["onednn"]


def test_random_chains_on_cudnn(monkeypatch) -> None:
    """The same around cuDNN's operator, which is computed by its parts here."""
    monkeypatch.setattr(inductor, "has_cudnn_epilogues", lambda device: True)
    counts = check_each(check_folding, 40, relu=True)
    assert counts["cudnn"] > counts["functions"] // 8
