"""The benchmarks measure what they say: networks, protocols, merged modules, files, report."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

from bench import (
    analysis,
    cases,
    eager_coverage,
    module_pairs,
    protocols,
    reasons,
    results,
    runner,
    suites,
    tables,
)
from bench.capacity import largest_batch
from bench.measure import Budget
from bench.models import other_ranks, parameter_free, repvgg, transposed
from bench.providers import PROVIDERS
from bench.results import Row
from bench.saved import saved_bytes
from bench.workload import Settings, setup

TINY = Settings("timeseries_fcn", batch=2, shape=(12, 16))


@pytest.mark.parametrize(
    ("build", "millions"),
    [
        (parameter_free.resnet50, 25.6),
        (parameter_free.resnet50_max, 14.2),
        (parameter_free.resnet50_hybrid, 17.3),
        (repvgg.repvgg_a0, 9.1),
        (transposed.dcgan_generator, 3.6),
    ],
)
def test_networks_have_the_published_number_of_parameters(build, millions):
    with torch.device("meta"):
        count = sum(p.numel() for p in build().parameters())
    assert round(count / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("network", "shape", "expected"),
    [
        (parameter_free.resnet50_hybrid, (2, 3, 64, 64), (2, 1000)),
        (parameter_free.vit_s_max, (2, 3, 224, 224), (2, 1000)),
        (parameter_free.pit_s_max, (2, 3, 224, 224), (2, 1000)),
        (repvgg.repvgg_b0, (2, 3, 64, 64), (2, 1000)),
        (transposed.UNet, (2, 3, 32, 32), (2, 21, 32, 32)),
        (transposed.dcgan_generator, (2, 100, 1, 1), (2, 3, 64, 64)),
        (other_ranks.TimeSeriesFCN, (2, 12, 16), (2, 10)),
        (other_ranks.ConvNet3d, (2, 3, 8, 32, 32), (2, 400)),
    ],
)
def test_output_shapes(network, shape, expected):
    with torch.device("meta"):
        assert network().eval()(torch.empty(shape)).shape == expected


class Net(nn.Module):
    """Pairs of all kinds, a layer with two batch norms, and a batch norm after no layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.up = nn.ConvTranspose2d(4, 8, 2, stride=2, groups=2)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8, affine=False)])
        self.shared = nn.Conv2d(8, 8, 1)
        self.first, self.second = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)
        self.last = nn.BatchNorm1d(5)

    def forward(self, x):
        x = self.norms[0](self.up(self.stem(x)))
        c = self.shared(x)
        x = self.first(c) + self.second(c)
        return self.last(self.head(x.mean((2, 3))))


def _network():
    torch.manual_seed(0)
    net = Net()
    for module in net.modules():
        if protocols.is_batch_norm(module):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 2)
                nn.init.normal_(module.bias)
    return net.eval()


def test_pairs_are_found_by_running():
    assert module_pairs.find_pairs(_network(), (torch.randn(2, 3, 8, 8),)) == {
        "stem.1": "stem.0",
        "norms.0": "up",
        "last": "head",
    }


@pytest.mark.parametrize("transform", [module_pairs.merge, module_pairs.tune_eagerly])
def test_merged_and_tuned_networks_compute_the_same(transform):
    net, x = _network().double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    other = transform(net, (x,))
    torch.testing.assert_close(other(x), net(x))
    assert not any(a is b for a in other.parameters() for b in net.parameters())
    if transform is module_pairs.tune_eagerly:
        (net(x) ** 2).sum().backward()
        (other(x) ** 2).sum().backward()
        expected = sorted(p.grad.norm().item() for p in net.parameters())
        assert sorted(p.grad.norm().item() for p in other.parameters()) == pytest.approx(expected)


def _trainable(protocol):
    case = cases.Case("net", "test", _network, first_stages=("stem",), head="head.")
    net = case.build().requires_grad_(True)
    protocols.PROTOCOLS[protocol].freeze(net, case)
    return {name for name, p in net.named_parameters() if p.requires_grad}


def test_protocols_freeze_what_they_say():
    every = {name for name, _ in _network().named_parameters()}
    norms = {n for n in every if n.split(".")[0] in ("first", "second", "last")}
    norms |= {"stem.1.weight", "stem.1.bias"}
    stem = {n for n in every if n.startswith("stem.")}
    assert _trainable("all") == every
    assert _trainable("frozen-stages") == every - stem
    assert _trainable("frozen-bn") == every - norms
    assert _trainable("bn-tuning") == norms | {"head.weight", "head.bias"}
    assert _trainable("adversarial") == _trainable("inference") == set()


def test_frozen_stages_need_stages():
    with pytest.raises(protocols.NotApplicable, match="no first stages"):
        setup(dataclasses.replace(TINY, protocol="frozen-stages"))


def test_setup_repeats_and_settles_batch_norms():
    first, again = setup(TINY), setup(TINY)
    assert torch.equal(first.inputs[0], again.inputs[0])
    states = [workload.model.state_dict().values() for workload in (first, again)]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    norm = next(m for m in first.model.modules() if protocols.is_batch_norm(m))
    assert not norm.training
    assert norm.momentum == 0.1
    assert norm.running_mean.abs().max() > 0
    adversarial = setup(dataclasses.replace(TINY, protocol="adversarial"))
    assert adversarial.inputs[0].requires_grad


def test_settings_are_checked():
    with pytest.raises(ValueError, match="precision must be one of float32, bf16"):
        dataclasses.replace(TINY, precision="int8")


def test_saved_bytes_are_ordered_and_repeat():
    providers = [PROVIDERS[name] for name in ("eval", "ours", "deploy")]
    kept = saved_bytes(TINY, providers)
    assert kept["ours"]["bytes"] == kept["deploy"]["bytes"] < kept["eval"]["bytes"]
    assert saved_bytes(TINY, providers) == kept


def test_only_an_input_gradient_keeps_no_more_than_eval():
    kept = saved_bytes(
        dataclasses.replace(TINY, protocol="adversarial"),
        [PROVIDERS[name] for name in ("eval", "ours")],
    )
    assert kept["ours"]["bytes"] <= kept["eval"]["bytes"]


def test_every_job_of_every_suite_is_valid():
    for name, suite in suites.SUITES.items():
        for device in ("cpu", "cuda"):
            jobs = suite(device)
            assert jobs, name
            assert len({(j.metric, j.settings, j.providers) for j in jobs}) == len(jobs)
            for job in jobs:
                assert job.metric in runner.METRICS
                assert set(job.providers) <= set(PROVIDERS)


def test_cases_are_selected_by_pattern():
    assert [c.name for c in cases.select(["r50_*"])] == ["r50_max", "r50_hybrid"]
    with pytest.raises(ValueError, match="no case is called 'nothing'"):
        cases.select(["nothing"])


def _run(jobs, path):
    rows = []
    file = results.ResultFile(path, arguments={})
    budget = Budget(rounds=2, seconds=1)
    runner.run(jobs, file, budget, on_start=lambda job: None, on_row=rows.append)
    return rows


def test_runs_resume(tmp_path):
    path = tmp_path / "out.jsonl"
    saved = runner.Job("saved", TINY, ("eval", "ours"))
    timed = runner.Job("measure", TINY, ("eager-eval", "eager-tune", "freezing"))
    assert {r.provider for r in _run([saved], path)} == {"eval", "ours"}
    second = _run([saved, timed], path)
    assert {r.metric for r in second} == {"measure"}
    assert {r.provider for r in second} == {"eager-eval", "eager-tune"}
    assert second[-1].values["output_error"] < 1e-5
    assert len(second[-1].values["step_ms"]) == 2
    assert _run([saved, timed], path) == []
    with path.open("a") as file:
        file.write('{"kind": "result", "cut')
    headers, rows = results.read(path)
    assert [h["run"] for h in headers] == ["1", "2", "3"]
    assert {r.provider for r in rows} == {"eval", "ours", "eager-eval", "eager-tune"}


def test_what_fails_is_written_and_tried_again(tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"

    def missing(*_):
        raise runner.MissingLibrary("needs timm: pip install timm")

    monkeypatch.setattr(runner, "saved_bytes", missing)
    job = runner.Job("saved", TINY, ("eval",))
    assert [r.problem for r in _run([job], path)] == ["needs timm: pip install timm"]
    monkeypatch.undo()
    assert _run([job], path)[0].values["bytes"] > 0
    assert not results.read(path)[1][0].problem


def _measured(provider, factor):
    values = {
        "step_ms": [10 * factor, 12 * factor, 11 * factor],
        "forward_ms": [4.0, 4.0, 4.0],
        "backward_ms": [7.0, 7.0, 7.0],
        "first_step_s": 5.0,
        "resident_bytes": 1000,
        "peak_bytes": int(9000 * factor),
        "generated_kernels": 3,
        "extern_kernels": 4,
        "bytes_moved": 10**6,
        "pass_seconds": 0.001,
        "output_error": 0.0,
    }
    return Row("measure", TINY, provider, values)


def test_report_renders(tmp_path):
    pytest.importorskip("matplotlib")
    from bench import report

    file = results.ResultFile(tmp_path / "tiny.jsonl", arguments={})
    for provider, kept in (("eval", 200), ("builtin", 150), ("ours", 100), ("deploy", 100)):
        values = {"bytes": kept, "activation_bytes": kept, "weight_bytes": 0, "mask_bytes": 0}
        file.add(Row("saved", TINY, provider, values))
    file.add(Row("saved", TINY, "eval-budget-0.5", {"bytes": 120}))
    for provider, factor in (("eval", 1.0), ("ours", 0.5), ("eval-budget-0.5", 1.2)):
        file.add(_measured(provider, factor))
    file.add(Row("measure", TINY, "deploy", problem="RuntimeError: out of luck"))
    file.add(Row("capacity", TINY, "ours", {"cap_bytes": 10**6, "largest_batch": 7}))
    written = report.write_report([file.path], tmp_path / "out")
    page = written[0].read_text()
    assert "timeseries_fcn 2x12x16 | 0.0 | 0.0 | 0.0 | 0.0 | -50.0%" in page
    assert "| convbn_inductor_pass | 5.5 (5.2-5.8) | 4.0 | 7.0 | 0.500 | not measured |" in page
    assert "RuntimeError: out of luck" in page
    assert "## GPU\n\nnot measured" in page
    assert all(path.stat().st_size > 1000 for path in written)
    assert len(written) == 6


def test_command_line(tmp_path):
    pytest.importorskip("matplotlib")
    testing = pytest.importorskip("typer.testing")
    from bench.__main__ import app

    run = testing.CliRunner().invoke
    assert "r50_hybrid" in run(app, ["list"]).output
    refused = run(app, ["run", "--case", "nothing"])
    assert refused.exit_code == 2
    out = tmp_path / "out.jsonl"
    arguments = ["--case", "dcgan_generator", "--metric", "saved", "--provider", "eval"]
    done = run(app, ["run", *arguments, "--output", str(out)])
    assert done.exit_code == 0
    assert "132.1 MB kept for backward" in done.output


def test_ratios_are_taken_round_by_round():
    group = analysis.groups([_measured("eval", 1.0), _measured("ours", 0.5)], "measure")[0]
    assert analysis.ratio(group, "ours", "eval") == 0.5
    assert analysis.ratio(group, "ours", "deploy") is None
    other = dataclasses.replace(_measured("ours", 0.5), run="another")
    group = analysis.groups([_measured("eval", 1.0), other], "measure")[0]
    assert analysis.ratio(group, "ours", "eval") is None
    assert analysis.geometric_mean([0.5, 2.0]) == pytest.approx(1)
    assert analysis.geometric_mean([]) is None


def test_largest_batch_is_on_the_line():
    assert largest_batch((8, 1800), (16, 2600), 5000) == 40
    assert largest_batch((8, 1800), (16, 2600), 100) == 0
    with pytest.raises(ValueError, match="does not grow"):
        largest_batch((8, 1800), (16, 1800), 5000)


def test_result_lines_are_plain_json(tmp_path):
    file = results.ResultFile(tmp_path / "a.jsonl", arguments={"suite": "quick"})
    row = Row("saved", TINY, "eval", {"bytes": 1})
    file.add(row)
    header, line = (json.loads(text) for text in file.path.read_text().splitlines())
    assert header["versions"]["torch"] == torch.__version__
    read = Row.from_line(line, "a.jsonl")
    assert read == row
    assert read.run == "a.jsonl, run 1"


def test_coverage_of_eager_mode():
    """The README's table is the result file's, and what the text says of it holds."""
    found = json.loads(eager_coverage.RESULTS.read_text())
    readme = eager_coverage.RESULTS.parent.parent / "README.md"
    assert eager_coverage.markdown(found) in readme.read_text()
    networks = found["networks"]
    assert list(networks) == list(eager_coverage.MODELS)
    for name, r in networks.items():
        assert r["eager"] == r["compiled"]
        assert r["kept"]["tune"] <= r["kept"]["deploy"]
        assert r["kept"]["tune"] == r["kept"]["deploy"] or name == "the same, norms per level"
        assert r["error_tune"] <= 1.75 * r["error_eval"]
        assert r["error_tune_float64"] <= 1.25e-14


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
    model = eager_coverage.prepare(eager_coverage.M())
    result = eager_coverage.largest_errors(model, [torch.randn(1, 3, 12, 12)])
    assert result["flipped"] == {"eval": 0, "tune": 0, "tune_float64": 0}
    assert 0 < result["error_tune"] < 1e-5
    assert 0 < result["error_tune_float64"] < 1e-13


def test_committed_results_are_reported():
    """report.md and the README's table are the result files', and every exception has a reason."""
    folder = eager_coverage.RESULTS.parent
    found = {row.key: row for p in sorted(folder.glob("*.jsonl")) for row in results.read(p)[1]}
    rows = list(found.values())
    page = (folder / "report.md").read_text()
    parts = [tables.published, tables.saved, tables.exceptions, tables.small_gains]
    assert all(part(rows) in page for part in parts)
    assert reasons.UNEXPLAINED not in page
    assert tables.published(rows) in (folder.parent.parent / "README.md").read_text()
