"""FSDP2: units that keep a layer's weight until backward, and units that free it."""

import copy

import pytest
import torch
import torch.distributed as dist
from common import spread_statistics
from eager_helpers import codes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from convbn_inductor_pass import Code, turn_on


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


# Paths of units, whether they are freed after their forward, and what becomes of the two pairs.
UNITS = {
    "each_its_own": (["0.0", "0.1", "1.0", "1.1"], True, Code.WEIGHT_FREED),
    "layers_only": (["0.0", "1.0"], True, Code.WEIGHT_FREED),
    "not_freed": (["0.0", "0.1", "1.0", "1.1"], False, Code.LAYER_OUTPUT_USED),
    "blocks": (["0", "1"], True, Code.FUSED),
    "whole_model": ([], True, Code.FUSED),
}


@pytest.mark.parametrize("name", UNITS)
def test_units(mesh, name):
    units, freed, code = UNITS[name]

    def block(c_in, c_out):
        return nn.Sequential(nn.Conv2d(c_in, c_out, 3), nn.BatchNorm2d(c_out), nn.ReLU())

    model = spread_statistics(nn.Sequential(block(3, 4), block(4, 5))).eval()
    x = torch.randn(2, 3, 8, 8)
    reference = copy.deepcopy(model)
    turn_on(model)
    for unit in units:
        fully_shard(model.get_submodule(unit), mesh=mesh, reshard_after_forward=freed)
    fully_shard(model, mesh=mesh)
    for _ in range(2):
        reference(x).square().sum().backward()
        model(x).square().sum().backward()
        assert codes(model) == [code] * 2
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-4, atol=1e-4)
