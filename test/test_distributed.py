"""DDP and FSDP2 in two real processes: pairs that share a graph are fused, others say why."""

from __future__ import annotations

import pytest
import two_processes
from common import Residual
from two_processes import in_two_processes

from bench.libraries import MissingLibrary
from convbn_inductor_pass import Code

FUSED = Code.FUSED


def test_ddp_in_buckets(tmp_path):
    """Where a bucket of gradients is full a graph ends; layer and batch norm stay together."""
    codes, error, graphs = in_two_processes(
        tmp_path, two_processes.wide, two_processes.ddp_in_buckets
    )
    assert (codes, graphs) == ({FUSED: 6}, 4)  # two forwards, two backwards
    assert error < 1e-4


def test_sharded_model_in_mixed_precision(tmp_path):
    codes, error, _ = in_two_processes(tmp_path, Residual, two_processes.sharded_in_bfloat16)
    assert codes == {FUSED: 6}
    assert error < 0.1


def test_resnet18_by_block(tmp_path):
    """The stem's is in none."""
    try:
        two_processes.resnet18()
    except MissingLibrary as error:
        pytest.skip(str(error))
    codes, error, _ = in_two_processes(
        tmp_path, two_processes.resnet18, two_processes.sharded_by_block
    )
    assert codes == {FUSED: 19}
    assert error < 1e-4
