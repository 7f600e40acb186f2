"""The command line of the benchmarks: what it refuses, prints and writes."""

from __future__ import annotations

import json

import pytest
from torch import nn
from typer.testing import CliRunner

from bench import forward_error, gradient_error, recognition
from bench.__main__ import app
from bench.experiments import transfer


def test_runs_and_lists(tmp_path):
    run = CliRunner().invoke
    listed = run(app, ["list"]).output
    assert "r50_hybrid" in listed
    assert "bn_tuning" in listed
    out = tmp_path / "out.jsonl"
    arguments = ["--case", "dcgan_generator", "--metric", "saved", "--provider", "eval"]
    done = run(app, ["run", *arguments, "--output", str(out)])
    assert done.exit_code == 0
    assert "132.1 MB saved for backward" in done.output


@pytest.mark.parametrize(
    "arguments",
    [
        "run --case nothing",
        "run --suite nothing",
        "run --metric saved --metric nothing",
        "run --case dcgan_generator --precision nothing",
        "gpu --nothing",
        "cuda-codegen --case dcgan_generator --protocol nothing",
        "readers --case nothing",
        "selective --network nothing",
        "eager-coverage --model nothing",
        "recognition --model nothing",
        "gradient-error --backend nothing",
        "gradient-error --dtype nothing",
        "forward-error --forward nothing",
        "forward-error --case nothing",
        "experiment nothing",
        "nothing",
    ],
)
def test_known_names_only(arguments):
    refused = CliRunner().invoke(app, arguments.split())
    assert refused.exit_code == 2
    assert "nothing" in refused.output


def test_commands_print_their_tables(monkeypatch):
    run = CliRunner(env={"COLUMNS": "200"}).invoke
    committed = run(app, ["eager-coverage", "--markdown"])
    assert committed.output.startswith("| network | batch norms | compiled ")
    monkeypatch.setattr(gradient_error, "LAYERS", {"tiny": (2, 4, 6, 5, 3)})
    monkeypatch.setattr(gradient_error, "RATIOS", (10.0,))
    done = run(app, ["gradient-error", "--seeds", "1", "--dtype", "bfloat16"])
    assert "bfloat16 on cpu" in done.output
    assert "tiny" in done.output
    monkeypatch.setattr(forward_error, "measure", _forward_errors)
    arguments = ["--case", "1x1", "--precision", "float32", "--seeds", "2", "--forward", "auto"]
    done = run(app, ["forward-error", "--markdown", *arguments])
    assert "| 1x1 | float32 | 1.5e-07 | 3.0e-07 | 2.00 | 2.00 to 2.00 |" in done.output
    monkeypatch.setitem(recognition.MODELS, "timm resnet18", nn.Identity)
    monkeypatch.setattr(recognition, "recognise", _recognised)
    done = run(app, ["recognition", "--model", "timm resnet18", "--markdown"])
    assert "| timm resnet18 | 9 | 9 | 8 | 1 | BatchNorm2d |" in done.output


def _forward_errors(case, precision, seeds, offset, forward):
    assert (case, precision, seeds, offset, forward) == ("1x1", "float32", 2, 0, "auto")
    return forward_error.Errors(exact=(1e-7, 2e-7), folded=(2e-7, 4e-7))


def _recognised(model, x):
    assert not model.training
    return recognition.Recognition(9, 9, 8, ("stem.0",), ("BatchNorm2d",))


def test_experiments_are_written(tmp_path, monkeypatch):
    plots = pytest.importorskip("matplotlib.figure")
    monkeypatch.setattr(transfer, "run", lambda: ({"summary": {"seen": 1}}, plots.Figure()))
    done = CliRunner().invoke(app, ["experiment", "transfer", "--output", str(tmp_path)])
    assert done.exit_code == 0
    assert json.loads((tmp_path / "transfer.json").read_text())["summary"] == {"seen": 1}
    assert (tmp_path / "transfer.png").stat().st_size > 0
