"""The table of what Inductor generates for CUDA: launches, traffic and memory, by provider."""

from __future__ import annotations

from ..providers import PROVIDERS
from ..results import Row
from .analysis import groups
from .tables import markdown

__all__ = ["cuda_code"]


def cuda_code(rows: list[Row]) -> str:
    """One line per workload and provider: kernels + library calls and GB of each phase, memory."""
    body = []
    for group in groups(rows, "cuda-codegen"):
        for name in group.rows:
            v = group.values(name)
            if not v:
                continue
            cells = [group.label(size=True), PROVIDERS[name].title]
            for phase in ("forward", "backward"):
                known = f"{phase}_kernels" in v
                calls = f"{v[f'{phase}_kernels']} + {v[f'{phase}_library_calls']}" if known else ""
                moved = f"{v[f'{phase}_kernel_bytes'] / 1e9:.2f}" if known else ""
                cells += [calls, moved]
            memory = (v["saved_bytes"], v["resident_bytes"] + v["peak_bytes"])
            body.append([*cells, *(f"{nbytes / 1e6:,.1f}" for nbytes in memory)])
    phases = ["forward: kernels + library", "GB", "backward: kernels + library", "GB"]
    return markdown(["workload", "provider", *phases, "saved MB", "peak MB"], body)
