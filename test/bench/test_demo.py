"""The demonstration: its command line, and a small run of it under Inductor."""

import functools
import io
import sys

import pytest
from rich.console import Console
from typer.testing import CliRunner

from bench import demo
from bench.__main__ import app
from convbn_inductor_pass.testing import fresh_compile


def fails(*arguments):
    """What is said; the exit code must be 2."""
    done = CliRunner().invoke(app, ["demo", *arguments], env={"COLUMNS": "300"})
    assert done.exit_code == 2
    return done.output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--steps", "0"), "'--steps'"),
        (("--batch-size", "many"), "'--batch-size'"),
        (("--seed", "0.5"), "'--seed'"),
        (("--device", "abacus"), "expected cpu, cuda or cuda:N"),
    ],
)
def test_what_cannot_be_used_is_named(arguments, told):
    assert told in fails(*arguments)


def test_it_says_where_its_data_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "pip install scikit-learn" in fails()


def test_under_inductor(monkeypatch):
    """Small, but the real thing: both modes compiled, run, and compared."""
    monkeypatch.setattr(demo, "_PRETRAIN_STEPS", 5)
    monkeypatch.setattr(demo, "SmallResNet", functools.partial(demo.SmallResNet, stages=1))
    with fresh_compile(flag=False):
        result = demo.run(steps=1, batch_size=32, console=Console(quiet=True))
    assert (result.fused, result.batch_norms) == (3, 3)
    assert result.measured_bytes["tune"] == result.saved_bytes["tune"]
    assert result.measured_bytes["eval"] == result.saved_bytes["eval"]
    assert result.saved_bytes["tune"] <= result.saved_bytes["deploy"]
    for sizes in result.frozen_bytes.values():
        assert sizes["tune"] < sizes["eval"]
    assert result.accuracy_attacked <= result.accuracy["tune"]
    assert result.saved_bytes["tune"] < result.saved_bytes["builtin"] < result.saved_bytes["eval"]
    assert result.loss_difference == 0  # the first step's forward has eval mode's bits
    assert result.time_ratio is None
    table = io.StringIO()
    Console(file=table, width=80).print(result.table())
    assert "3 of 3" in table.getvalue()
    assert "…" not in table.getvalue()
