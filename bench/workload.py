"""One set-up for every metric: network, inputs, precision and protocol of a case."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from .cases import CASES
from .protocols import PROTOCOLS, NotApplicable, Protocol, is_batch_norm

__all__ = ["PRECISIONS", "Settings", "Workload", "setup"]

# By name: the dtype of parameters and inputs, and that of autocast.
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "bf16-autocast": (torch.float32, torch.bfloat16),
    "fp16-autocast": (torch.float32, torch.float16),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run, apart from the provider. Names are those of the command line.

    ``shape`` is one example without the batch dimension, as in :class:`bench.cases.Case`.
    """

    case: str
    batch: int
    shape: tuple[int, ...]
    protocol: str = "all"
    precision: str = "float32"
    memory_format: str = "contiguous"
    dynamic: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        for field, known in (
            ("case", CASES),
            ("protocol", PROTOCOLS),
            ("precision", PRECISIONS),
            ("memory_format", ("contiguous", "channels_last")),
        ):
            value = getattr(self, field)
            if value not in known:
                raise ValueError(f"{field} must be one of {', '.join(known)}, got {value!r}")


class _TensorOutputs(nn.Module):
    """A network that returns its floating-point outputs as a tuple, however they are nested.

    With ``features``, the outputs of the modules of these names instead.
    """

    def __init__(self, network: nn.Module, features: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.network = network
        self.features: list[Tensor] = []
        for name in features:
            network.get_submodule(name).register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.features.append(output)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = self.network(*inputs)
        features = tuple(self.features)
        self.features.clear()  # copies of the module must not hold results
        return features or tuple(_tensors(outputs))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


@dataclasses.dataclass
class Workload:
    """A network in eval mode with its inputs; providers run it, metrics look at it."""

    settings: Settings
    protocol: Protocol
    model: nn.Module
    inputs: tuple[Tensor, ...]

    @contextlib.contextmanager
    def region(self) -> Iterator[None]:
        """The autocast and grad mode that the network runs in."""
        _, autocast = PRECISIONS[self.settings.precision]
        with contextlib.ExitStack() as stack:
            if autocast is not None:
                stack.enter_context(torch.autocast(self.settings.device, dtype=autocast))
            if not self.protocol.trains:
                stack.enter_context(torch.no_grad())
            yield

    def forward(self, function: Callable[..., Any]) -> tuple[Tensor, ...]:
        with self.region():
            return function(*self.inputs)

    def backward(self, outputs: tuple[Tensor, ...]) -> None:
        """Backward from a gradient of ones: there is no loss, which is the same for everyone."""
        differentiable = [o for o in outputs if o.requires_grad]
        torch.autograd.backward(differentiable, [torch.ones_like(o) for o in differentiable])

    def clear_gradients(self, model: nn.Module) -> None:
        for tensor in (*model.parameters(), *self.inputs):
            tensor.grad = None


def setup(settings: Settings, *, fake: bool = False, seed: int = 0) -> Workload:
    """Build the network of a case and its inputs.

    Batch norms get statistics and affine parameters as after training: statistics of a small
    random batch, gammas around one, betas around zero.

    Args:
        settings: what to build.
        fake: make the inputs under FakeTensorMode, so that they need no memory, and leave the
            batch norms' values as they are. Parameters are real in any case.
        seed: of everything random.

    Raises:
        MissingLibrary: the case's library is not installed.
        NotApplicable: the case has no such protocol or memory format.
    """
    case, protocol = CASES[settings.case], PROTOCOLS[settings.protocol]
    dtype, _ = PRECISIONS[settings.precision]
    channels_last = settings.memory_format == "channels_last"
    if channels_last and len(settings.shape) not in (3, 4):
        raise NotApplicable(f"{case.name} has {len(settings.shape)}-d examples: no channels_last")
    torch.manual_seed(seed)
    network = case.build().to(settings.device).eval().requires_grad_(True)
    if not fake:
        _settle_batch_norms(network, settings)
    network.to(dtype)
    protocol.freeze(network, case)
    kwargs: dict[str, Any] = {}
    if channels_last:
        rank = len(settings.shape)
        kwargs["memory_format"] = torch.channels_last if rank == 3 else torch.channels_last_3d
        network.to(**kwargs)
    with FakeTensorMode() if fake else contextlib.nullcontext():
        x = torch.randn(settings.batch, *settings.shape, device=settings.device, dtype=dtype)
        x = x.contiguous(**kwargs).requires_grad_(protocol.input_gradient)
    features = case.features if protocol.features else ()
    return Workload(settings, protocol, _TensorOutputs(network, features), (x,))


def _settle_batch_norms(network: nn.Module, settings: Settings) -> None:
    norms = [m for m in network.modules() if is_batch_norm(m)]
    trained = [m for m in norms if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not trained:
        return
    with torch.no_grad():
        for norm in trained:
            if norm.affine:
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.normal_(0, 0.1)
    momenta = [norm.momentum for norm in trained]
    for norm in trained:
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        network(torch.randn(2, *settings.shape, device=settings.device))
    for norm, momentum in zip(trained, momenta, strict=True):
        norm.eval()
        norm.momentum = momentum
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.zero_()
