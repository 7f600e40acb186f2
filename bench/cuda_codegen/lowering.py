"""What Inductor generates for a workload on CUDA, and what a step of it launches and allocates.

The workload's tensors are fake and on the pretended GPU. In the place of the generated kernels are
stand-ins that note their launch; the generated wrapper around them runs as it is, so that its
allocations and its calls of libraries are seen as they happen.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from ..cases import CASES
from ..providers import Provider
from ..workload import Settings, Workload, setup
from .recording import Lowered, recording

__all__ = ["lower"]


def lower(settings: Settings, provider: Provider) -> Lowered:
    """Compile the workload for CUDA as ``provider`` would, and run one step on fake tensors.

    Raises:
        NotApplicable, MissingLibrary: as :func:`bench.workload.setup`.
    """
    # A pretended GPU has no graphs to record. What is launched is the same with and without.
    inductor = {k: v for k, v in provider.inductor.items() if k != "triton.cudagraphs"}
    provider = dataclasses.replace(provider, inductor=inductor)
    workload = _small_on_cpu(settings)
    model, function = provider.prepare(workload)
    result = Lowered(copy.deepcopy(model))
    torch._dynamo.reset()
    with FakeTensorMode(), recording(result) as recorder, provider.active():
        _move_to_pretended_gpu(model)
        x = _pretended_input(settings, workload.inputs[0])
        on_cuda = dataclasses.replace(settings, device="cuda")
        step = Workload(on_cuda, workload.protocol, model, (x,))
        if settings.dynamic:
            torch._dynamo.mark_dynamic(x, 0)
        recorder.compile(step, function)
        recorder.run(step, function)
    return result


def _small_on_cpu(settings: Settings) -> Workload:
    """The workload with two small examples: providers run it to find the pairs that they merge."""
    shape = CASES[settings.case].small_shape
    return setup(dataclasses.replace(settings, device="cpu", batch=2, shape=shape))


def _pretended_input(settings: Settings, example: Tensor) -> Tensor:
    x = torch.empty((settings.batch, *settings.shape), dtype=example.dtype, device="cuda")
    if settings.memory_format == "channels_last":
        x = x.contiguous(memory_format=_CHANNELS_LAST[len(settings.shape)])
    return x.requires_grad_(example.requires_grad)


_CHANNELS_LAST = {3: torch.channels_last, 4: torch.channels_last_3d}


def _move_to_pretended_gpu(model: nn.Module) -> None:
    moved: dict[int, Tensor] = {}  # tied ones stay tied

    def move(tensor: Tensor) -> Tensor:
        if id(tensor) not in moved:
            fake = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda"
            )
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, tensor.requires_grad)
            moved[id(tensor)] = fake
        return moved[id(tensor)]

    kept = [*model.parameters(), *model.buffers()]  # else an id may come twice
    for module in model.modules():
        owned: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in owned:
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = move(tensor)
    del kept
