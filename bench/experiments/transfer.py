"""Transfer learning in Eval, Tune and Deploy mode: accuracy, loss curves, memory, time.

Claim: tune's loss curve coincides with eval's, for deploy's memory and nearly its time.

    python -m bench experiment transfer
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F

from . import lab

MODES = ("eval", "tune", "deploy")
SEEDS = (0, 1, 2)


def run() -> lab.Found:
    train, test = lab.digits(5, 9)
    runs: dict[str, list[dict]] = {m: [] for m in MODES}
    for seed in SEEDS:
        pretrained = lab.pretrain(seed)
        for mode in MODES:
            model = lab.in_mode(pretrained, mode, seed)
            x, y = train[0][:32], train[1][:32]
            saved = lab.saved_bytes(model, x, partial(F.cross_entropy, target=y))
            run = lab.fine_tune(model, train, lr=0.01, epochs=8)
            runs[mode].append({**run, "saved_bytes": saved, "accuracy": lab.accuracy(model, test)})
    difference = max(
        abs(a - b)
        for e, t in zip(runs["eval"], runs["tune"], strict=True)
        for a, b in zip(e["losses"], t["losses"], strict=True)
    )
    summary = {
        m: {
            "accuracy": [round(r["accuracy"], 4) for r in rs],
            "final_loss": [round(sum(r["losses"][-5:]) / 5, 4) for r in rs],
            "saved_bytes": rs[0]["saved_bytes"],
            "step_ms": round(1e3 * sorted(r["step_seconds"] for r in rs)[1], 2),
        }
        for m, rs in runs.items()
    }
    result = {
        "summary": {**summary, "largest_loss_difference_eval_tune": difference},
        "runs": runs,
    }
    fig, axes = lab.figure(2, "Transfer 0-4 to 5-9, learning rate 0.01")
    for mode, style in zip(MODES, ("-", "--", ":"), strict=True):
        axes[0].plot(runs[mode][0]["losses"], style, label=mode)
    axes[0].set(xlabel="step", ylabel="loss", yscale="log")
    axes[0].legend()
    axes[1].bar(MODES, [summary[m]["saved_bytes"] / 1e6 for m in MODES])
    axes[1].set(ylabel="MB saved for backward, batch 32")
    return result, fig
