"""Metrics, suites, result files and the report, on a tiny network."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from bench import cases, results, runner, suites
from bench.eager_coverage import saved_bytes as saved_bytes_of_a_forward
from bench.metrics import codegen
from bench.metrics.capacity import largest_batch
from bench.metrics.measure import Budget
from bench.metrics.profile import kernels
from bench.metrics.saved import saved_bytes
from bench.providers import PROVIDERS
from bench.reporting import analysis
from bench.results import Row
from bench.workload import Settings, setup
from convbn_inductor_pass import explain, testing

TINY = Settings("timeseries_fcn", batch=2, shape=(12, 16))


def test_saved_bytes_are_ordered_and_repeat():
    providers = [PROVIDERS[name] for name in ("eval", "ours", "deploy")]
    saved = saved_bytes(TINY, providers)
    assert saved["ours"]["activation_bytes"] == saved["deploy"]["activation_bytes"]
    assert saved["ours"]["bytes"] < saved["deploy"]["bytes"] < saved["eval"]["bytes"]  # by bits
    assert saved_bytes(TINY, providers) == saved


def test_only_an_input_gradient_saves_no_more_than_eval():
    saved = saved_bytes(
        dataclasses.replace(TINY, protocol="adversarial"),
        [PROVIDERS[name] for name in ("eval", "ours")],
    )
    assert saved["ours"]["bytes"] <= saved["eval"]["bytes"]


def test_every_job_of_every_suite_is_valid():
    for name, suite in suites.SUITES.items():
        for device in ("cpu", "cuda"):
            jobs = suite(device)
            assert jobs, name
            assert len({(j.metric, j.settings, j.providers) for j in jobs}) == len(jobs)
            for job in jobs:
                assert job.metric in runner.METRICS
                assert set(job.providers) <= set(PROVIDERS)


def test_a_dry_run_compiles_what_would_be_measured():
    timed = runner.Job("measure", TINY, ("eval", "eager-eval"))
    eager = runner.Job("measure", TINY, ("eager-tune",))
    assert suites.dry_run([timed, eager]) == [runner.Job("cuda-codegen", TINY, ("eval",))]


def test_code_for_cuda_needs_a_cuda_build(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    job = runner.Job("cuda-codegen", TINY, ("eval",))
    (row,) = _run([job], tmp_path / "out.jsonl")
    assert row.problem.startswith("needs a CUDA build of PyTorch")


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


def test_kernels_and_passes_are_seen_while_compiling():
    workload = setup(TINY)
    _, function = PROVIDERS["ours"].prepare(workload)
    with PROVIDERS["ours"].active(), codegen.recording() as code:
        workload.backward(workload.forward(function))
    assert code.graphs == 2  # forward and backward
    assert code.generated_kernels > 0
    assert code.extern_kernels > 0
    assert code.bytes_moved > 0
    assert code.pass_seconds > 0


def test_given_to_save_is_what_explain_says():
    workload = setup(TINY)
    with testing.fresh_compile():
        given = saved_bytes_of_a_forward(torch.compile(workload.model), *workload.inputs)
    assert given == explain(workload.model, *workload.inputs).saved_bytes["tune"] > 0


def test_a_profile_names_the_slowest_kernels():
    model, x = torch.nn.Linear(256, 256), torch.randn(64, 256)
    found = kernels(lambda: model(x).relu(), "cpu")
    assert "aten::addmm" in [name for name, _, _ in found]
    milliseconds = [ms for _, _, ms in found]
    assert milliseconds == sorted(milliseconds, reverse=True)
    assert all(calls > 0 for _, calls, _ in found)


def _measured(provider, factor, **more):
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
        **more,
    }
    return Row("measure", TINY, provider, values)


def test_report_renders(tmp_path):
    pytest.importorskip("matplotlib")
    from bench.reporting import report

    file = results.ResultFile(tmp_path / "tiny.jsonl", arguments={})
    for provider, size in (("eval", 200), ("builtin", 150), ("ours", 100), ("deploy", 100)):
        values = {"bytes": size, "activation_bytes": size, "weight_bytes": 0, "mask_bytes": 0}
        file.add(Row("saved", TINY, provider, values))
    file.add(Row("saved", TINY, "eval-budget-0.5", {"bytes": 120}))
    for provider, factor in (("eval", 1.0), ("ours", 0.5), ("eval-budget-0.5", 1.2)):
        file.add(_measured(provider, factor))
    file.add(_measured("ours-fold", 0.5, kernels=[["triton_poi_fused_relu_0", 3, 1.5]]))
    file.add(Row("measure", TINY, "deploy", problem="RuntimeError: out of luck"))
    generated = {
        "forward_kernels": 3,
        "forward_library_calls": 4,
        "forward_kernel_bytes": 5 * 10**9,
    }
    memory = {"saved_bytes": 0, "resident_bytes": 10**6, "peak_bytes": 2 * 10**6}
    inference = dataclasses.replace(TINY, protocol="inference")
    file.add(Row("cuda-codegen", inference, "ours", generated | memory))
    file.add(Row("capacity", TINY, "ours", {"cap_bytes": 10**6, "largest_batch": 7}))
    written = report.write_report([file.path], tmp_path / "out")
    page = written[0].read_text()
    assert "timeseries_fcn 2x12x16 | 0.0 | 0.0 | 0.0 | 0.0 | -50.0%" in page
    assert "| convbn_inductor_pass | 5.5 (5.2-5.8) | 4.0 | 7.0 | 0.500 | not measured |" in page
    assert "| ours, forward=fold | `triton_poi_fused_relu_0` | 3 | 1.500 |" in page
    assert "RuntimeError: out of luck" in page
    assert "## GPU\n\nnot measured" in page
    assert "| convbn_inductor_pass | 3 + 4 | 5.00 |  |  | 0.0 | 3.0 |" in page
    assert all(path.stat().st_size > 1000 for path in written)
    assert len(written) == 6


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
