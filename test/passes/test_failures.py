"""A pass that fails in the middle of its rewrites: the graph is right all the same."""

import contextlib
import warnings

import pytest
import torch
from common import Residual

import convbn_inductor_pass as cbn
from convbn_inductor_pass import testing
from convbn_inductor_pass.graph.builder import Builder


@pytest.mark.parametrize("forward", ["exact", "fold"])
@pytest.mark.parametrize("nth", [1, 2, 3, 7, 20, 45, 80])
def test_a_call_that_fails(forward, nth, monkeypatch):
    """The backend checks each graph; what was rewritten before the failure counts or is undone."""
    right, calls = Builder.call, iter(range(1, 1 << 20))

    def call(*args, **kwargs):
        if next(calls) == nth:
            raise RuntimeError("on purpose")
        return right(*args, **kwargs)

    model, x = Residual(), torch.randn(2, 3, 32, 32, requires_grad=True)
    parameters = dict(model.named_parameters())
    expected = testing.outputs_and_gradients(model, parameters, (x,))
    monkeypatch.setattr(Builder, "call", call)
    with contextlib.ExitStack() as stack:
        stack.enter_context(testing.fresh_compile())
        stack.enter_context(cbn.options(forward=forward))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("always", cbn.PassFailedWarning)
        caught = stack.enter_context(warnings.catch_warnings(record=True))
        compiled = torch.compile(model, backend=testing.post_grad_backend())
        got = testing.outputs_and_gradients(compiled, parameters, (x,))
    failed = [w for w in caught if issubclass(w.category, cbn.PassFailedWarning)]
    assert len(failed) == 1
    assert "on purpose" in str(failed[0].message)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
