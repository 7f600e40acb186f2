"""How errors of gradients are measured."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench import eager_coverage, gradient_error
from bench.models import covered


@pytest.mark.parametrize(
    ("module", "edges"),
    [
        (nn.ReLU(), [0.0]),
        (nn.ReLU(inplace=True), [0.0]),
        (nn.ReLU6(), [0.0, 6.0]),
        (nn.Hardswish(), [-3.0, 3.0]),
        (nn.Hardsigmoid(), [-3.0, 3.0]),
        (nn.MaxPool2d(2), []),
    ],
)
def test_sides_of_edges_are_told(module, edges):
    """What coverage leaves out: inputs for which rounding crosses an edge."""

    def choices(x):
        with eager_coverage.Choices() as made:
            module(x.clone())
        (found,) = made.made
        return found

    x = torch.full((1, 1, 2, 2), 1.5)
    for edge in edges:
        below, above = x * 0 + edge - 1e-6, x * 0 + edge + 1e-6
        assert not torch.equal(choices(below), choices(above))
        assert torch.equal(choices(above), choices(above.double()))
    x[..., 1, 1] += 1e-6
    assert torch.equal(choices(x), choices(x + 0.1))
    assert torch.equal(choices(x), choices(x.flip(-1))) == (len(edges) > 0)


def test_errors_without_flips():
    model = eager_coverage.prepare(covered.M())
    result = eager_coverage.largest_errors(model, [torch.randn(1, 3, 12, 12)])
    assert result["flipped"] == {"eval": 0, "tune": 0, "tune_float64": 0}
    assert 0 < result["error_tune"] < 1e-5
    assert 0 < result["error_tune_float64"] < 1e-13


def test_errors_of_compiled_modes():
    modes = gradient_error.compiled("fast")
    found = gradient_error.errors(modes, (2, 4, 6, 5, 3), 10.0, 0, "cpu", torch.float32)
    assert list(found) == ["eval", "tune"]
    for errors in found.values():
        assert len(errors) == len(gradient_error.NAMES)
        assert max(errors) < 1e-4
    dgamma = gradient_error.NAMES.index("dgamma")
    assert found["eval"][dgamma] != found["tune"][dgamma]  # summed up in another order


def test_errors_need_a_known_backend():
    with pytest.raises(ValueError, match="backend must be one of fast, inductor"):
        gradient_error.compiled("eager")
