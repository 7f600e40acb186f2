"""Inductor's caches, in one process and across: hits, and no other configuration's artifact."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from common import ConvBN
from torch import nn

import convbn_inductor_pass as cbn

SCRIPT = """
import json, sys
import torch
import convbn_inductor_pass as cbn
from common import ConvBN
from torch._dynamo.utils import counters

flag, wrapped, changes = json.loads(sys.argv[1])
torch._inductor.config.efficient_conv_bn_eval_fx_passes = flag
cbn.set_options(**changes)
torch.manual_seed(0)
model = ConvBN(torch.nn.Conv2d(3, 4, 3))
x = torch.randn(2, 3, 8, 8)
y = torch.compile(torch.nn.Sequential(model) if wrapped else model)(x)
y.square().sum().backward()
print(json.dumps({
    "hits": counters["aot_autograd"]["autograd_cache_hit"],
    "misses": counters["aot_autograd"]["autograd_cache_miss"],
    "bypasses": counters["aot_autograd"]["autograd_cache_bypass"],
    "fused": [r.code.name for r in cbn.records()],
    "norms": [r.batch_norm for r in cbn.records()],
    "y": y.double().sum().item(),
    "gamma": model.bn.weight.grad.double().sum().item(),
}))
"""


@pytest.fixture(scope="module", name="run")
def _run(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    here = os.path.dirname(os.path.abspath(__file__))

    def run(flag=True, wrapped=False, **changes):
        env = dict(os.environ, TORCHINDUCTOR_CACHE_DIR=str(cache), OMP_NUM_THREADS="1")
        env["PYTHONPATH"] = os.pathsep.join([os.path.dirname(here), here])
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(SCRIPT), json.dumps([flag, wrapped, changes])],
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        said = [line for line in done.stderr.splitlines() if line.startswith("convbn_")]
        return {**json.loads(done.stdout.splitlines()[-1]), "said": said}

    return run


def test_warm_cache_and_other_configurations(run):
    cold = run()
    assert (cold["hits"], cold["misses"], cold["bypasses"]) == (0, 1, 0)
    assert cold["fused"] == ["FUSED"]
    warm = run()
    assert (warm["hits"], warm["misses"], warm["bypasses"]) == (1, 0, 0)
    assert warm["fused"] == ["FUSED"]  # decisions are kept beside the code
    said = "1 of 1 batch norms in tune mode, about 1.2 kB less saved for backward"
    line = f"convbn_inductor_pass: {said}"
    assert cold["said"] == warm["said"] == [line]
    silent = run(announce=False)
    assert (silent["hits"], silent["fused"], silent["said"]) == (1, ["FUSED"], [])
    assert (warm["y"], warm["gamma"]) == (cold["y"], cold["gamma"])
    # Not in AOTAutograd's cache, since modules have other names; but in Inductor's.
    wrapped = run(wrapped=True)
    assert (wrapped["hits"], wrapped["misses"], wrapped["said"]) == (0, 1, [line])
    assert (cold["norms"], wrapped["norms"]) == (["bn"], ["0.bn"])
    off = run(flag=False)
    assert (off["hits"], off["misses"], off["fused"]) == (0, 1, [])
    assert off["y"] == cold["y"]
    denied = run(deny=["layer"])
    assert denied["hits"] == 0
    assert denied["fused"] == ["DENIED"]
    assert "0 of 1 batch norms in tune mode: the options" in denied["said"][0]


@pytest.mark.parametrize("clear", ["nothing", "all", "Inductor's"])
def test_cleared_counters_hide_no_hit(clear, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    counters = torch._dynamo.utils.counters

    def codes():
        torch._dynamo.reset()
        cbn.clear_records()
        model = ConvBN(nn.Conv2d(3, 4, 3)).eval()
        torch.compile(model)(torch.randn(2, 3, 8, 8)).sum().backward()
        return [r.code for r in cbn.records()], counters["aot_autograd"]["autograd_cache_hit"]

    with torch._inductor.config.patch(efficient_conv_bn_eval_fx_passes=True):
        before = counters["aot_autograd"]["autograd_cache_hit"]
        assert codes() == ([cbn.Code.FUSED], before)
        if clear != "nothing":
            (counters if clear == "all" else counters["inductor"]).clear()
        assert codes() == ([cbn.Code.FUSED], (0 if clear == "all" else before) + 1)
