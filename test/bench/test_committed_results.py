"""The committed results, and what the READMEs say of them."""

from __future__ import annotations

import json

from bench import eager_coverage, results
from bench.models import covered
from bench.reporting import generated, reasons, tables


def test_coverage_of_eager_mode():
    """The README's table is the result file's, and what the text says of it holds."""
    found = json.loads(eager_coverage.RESULTS.read_text())
    readme = eager_coverage.RESULTS.parent.parent / "README.md"
    assert eager_coverage.markdown(found) in readme.read_text()
    networks = found["networks"]
    assert list(networks) == list(covered.NETWORKS)
    for name, r in networks.items():
        assert r["eager"] == r["compiled_or_saved_anyway"] >= r["compiled"]
        assert r["saved"]["tune"] <= r["saved"]["deploy"]
        assert r["saved"]["tune"] == r["saved"]["deploy"] or name == "the same, norms per level"
        assert r["error_tune"] <= 1.75 * r["error_eval"]
        assert r["error_tune_float64"] <= 1.25e-14


def test_committed_results_are_reported():
    """report.md is made of the results, and every exception has a reason."""
    folder = eager_coverage.RESULTS.parent
    found = {row.key: row for p in sorted(folder.glob("*.jsonl")) for row in results.read(p)[1]}
    rows = list(found.values())
    page = (folder / "report.md").read_text()
    parts = [tables.published, tables.saved, tables.exceptions, tables.small_gains]
    parts += [generated.cuda_code]
    assert all(part(rows) in page for part in parts)
    assert reasons.UNEXPLAINED not in page
    readme = (folder.parent.parent / "README.md").read_text()
    assert tables.overview_table(rows) in readme
    assert tables.overview_table(rows).count("\n") == 9
