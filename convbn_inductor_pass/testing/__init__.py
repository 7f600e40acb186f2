"""Helpers for the tests of this package and for the CI of its users.

A model's CI can check what the pass does to it::

    from convbn_inductor_pass import Code, testing

    def test_tune_mode():
        model = my_model().eval()
        testing.assert_fused(model, batch, count=53)
        testing.assert_none_left(model, batch, except_codes=[Code.NOT_AFTER_LAYER])
        testing.assert_saved_like_deploy(model, batch)
        testing.assert_numerics(model, batch)

None of these generates code: models are traced by Dynamo, go through the pass, and, where
values are needed, AOTAutograd runs the graphs eagerly (:func:`fast_backend`).
"""

from .assertions import (
    assert_fused,
    assert_none_left,
    assert_numerics,
    assert_saved_at_most,
    assert_saved_like_deploy,
    outputs_and_gradients,
)
from .backends import (
    PassResult,
    fast_backend,
    fresh_compile,
    post_grad_backend,
    run_on_graph,
    run_pass,
)

__all__ = [
    "PassResult",
    "assert_fused",
    "assert_none_left",
    "assert_numerics",
    "assert_saved_at_most",
    "assert_saved_like_deploy",
    "fast_backend",
    "fresh_compile",
    "outputs_and_gradients",
    "post_grad_backend",
    "run_on_graph",
    "run_pass",
]
