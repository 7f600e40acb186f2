"""Train one step of a model under DDP or FSDP2 in two processes.

A module of its own, because each process imports it by name.
"""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import Residual, spread_statistics
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import convbn_inductor_pass as cbn
from bench.libraries import require
from convbn_inductor_pass import Code, testing

PROCESSES = 2
Codes = collections.Counter[Code]


def wide() -> nn.Module:
    """1.7 MB of parameters, more than a bucket's least size."""
    return Residual(160)  # type: ignore[no-untyped-call]


def resnet18() -> nn.Module:
    return require("torchvision.models").resnet18()  # type: ignore[no-any-return]


def ddp_in_buckets(model: nn.Module, compiled: Callable[..., Any]) -> nn.Module:
    """Dynamo breaks the graph where a bucket of gradients is full."""
    return compiled(DistributedDataParallel(model, bucket_cap_mb=1))  # type: ignore[no-any-return]


def sharded_in_bfloat16(model: nn.Module, compiled: Callable[..., Any]) -> nn.Module:
    """Whole model: one graph, one unit."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(model, mesh=init_device_mesh("cpu", (PROCESSES,)), mp_policy=policy)
    return compiled(model)  # type: ignore[no-any-return]


def sharded_by_block(model: nn.Module, compiled: Callable[..., Any]) -> nn.Module:
    """As FSDP2 is used with torch.compile: each block is a graph and a unit of its own."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for module in [m for m in model.modules() if type(m).__name__ == "BasicBlock"]:
        module.forward = compiled(module.forward)  # type: ignore[method-assign]
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _gradients(model: nn.Module) -> list[Tensor]:
    grads = [p.grad for p in model.parameters()]
    assert all(g is not None for g in grads)
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]  # type: ignore[union-attr]


def _process(rank: int, folder: str, make: Any, wrap: Any) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=PROCESSES)
    torch.manual_seed(0)
    model = spread_statistics(make()).eval()
    batches = torch.randn(PROCESSES, 2, 3, 32, 32).unbind()
    reference = copy.deepcopy(model)
    for x in batches:
        (reference(x).square().sum() / PROCESSES).backward()

    def compiled(module: Any) -> Any:
        return torch.compile(module, backend=testing.post_grad_backend(graphs.append))

    graphs: list[Any] = []
    with testing.fresh_compile():
        wrapped = wrap(model, compiled)  # DDP has to live until the gradients are there
        wrapped(batches[rank]).square().sum().backward()
    wanted = [p.grad for p in reference.parameters()]
    errors = [
        ((a.float() - b).abs().max() / b.abs().max()).item()
        for a, b in zip(_gradients(model), wanted, strict=True)
    ]
    codes = [r.code.name for r in cbn.records() if r.kind == "batch norm"]
    torch.save((codes, max(errors), len(graphs)), f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


def in_two_processes(folder: Path, make: Any, wrap: Any) -> tuple[Codes, float, int]:
    """The codes of the batch norms, the largest relative error of a gradient, and the graphs."""
    mp.spawn(_process, (str(folder), make, wrap), nprocs=PROCESSES)
    (codes, error, graphs), (*same, other_error, _) = (
        torch.load(folder / str(rank)) for rank in range(PROCESSES)
    )
    assert [codes] == same
    return collections.Counter(Code[name] for name in codes), max(error, other_error), graphs
