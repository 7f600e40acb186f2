"""Which tensors have a gradient: the ways in which networks with eval-mode BN are used.

Every protocol leaves the network in eval mode; they differ in ``requires_grad`` only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import nn

from .cases import Case

__all__ = ["PROTOCOLS", "NotApplicable", "Protocol", "is_batch_norm"]


class NotApplicable(ValueError):
    """The case has no such protocol; the message says why."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """``freeze(model, case)`` sets ``requires_grad`` of a model whose parameters all have it.

    ``input_gradient``: the input has a gradient. ``features``: the outputs are those of the case's
    ``features``. ``trains``: there is a backward at all.
    """

    name: str
    title: str
    freeze: Callable[[nn.Module, Case], None]
    input_gradient: bool = False
    features: bool = False
    trains: bool = True


def is_batch_norm(module: nn.Module) -> bool:
    """BatchNorm of any rank, and those that look like it (frozen, fused with an activation)."""
    buffers = dict(module.named_buffers(recurse=False))
    return "running_mean" in buffers and "running_var" in buffers


def _nothing(model: nn.Module, case: Case) -> None:
    return None


def _everything(model: nn.Module, case: Case) -> None:
    model.requires_grad_(False)


def _everything_for_features(model: nn.Module, case: Case) -> None:
    if not case.features:
        raise NotApplicable(f"{case.name} names no features to compare")
    model.requires_grad_(False)


def _everything_of_discriminator(model: nn.Module, case: Case) -> None:
    if not case.discriminates:
        raise NotApplicable(f"{case.name} is no discriminator")
    model.requires_grad_(False)


def _first_stages(model: nn.Module, case: Case) -> None:
    if not case.first_stages:
        raise NotApplicable(f"{case.name} names no first stages to freeze")
    names = {
        prefix: [n for n, _ in model.named_parameters() if n.startswith(f"{prefix}.")]
        for prefix in case.first_stages
    }
    parameters = dict(model.named_parameters())
    for prefix, found in names.items():
        if not found and not any(n.startswith(f"{prefix}.") for n, _ in model.named_buffers()):
            raise ValueError(f"{case.name} has nothing called {prefix}")
        for name in found:
            parameters[name].requires_grad_(False)


def _batch_norms(model: nn.Module, case: Case) -> None:
    for module in model.modules():
        if is_batch_norm(module):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)


def _all_but_batch_norms_and_head(model: nn.Module, case: Case) -> None:
    model.requires_grad_(False)
    head = case.head or _last_layer(model)
    for name, parameter in model.named_parameters():
        if name.startswith(head):
            parameter.requires_grad_(True)
    for module in model.modules():
        if is_batch_norm(module):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(True)


def _last_layer(model: nn.Module) -> str:
    owners = [
        name
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False)) and not is_batch_norm(module)
    ]
    return f"{owners[-1]}."


PROTOCOLS: dict[str, Protocol] = {
    p.name: p
    for p in (
        Protocol("all", "all trainable", _nothing),
        Protocol("frozen-stages", "stem and first stage frozen, as detectors do", _first_stages),
        Protocol("frozen-bn", "BN affine frozen", _batch_norms),
        Protocol("bn-tuning", "BN affine and head train", _all_but_batch_norms_and_head),
        Protocol("adversarial", "gradient of the input only", _everything, input_gradient=True),
        Protocol(
            "perceptual-loss",
            "a loss on the frozen network's features, whose input is trained",
            _everything_for_features,
            input_gradient=True,
            features=True,
        ),
        Protocol(
            "gan-discriminator",
            "the generator's step: the discriminator is frozen, its input is trained",
            _everything_of_discriminator,
            input_gradient=True,
        ),
        Protocol("inference", "no gradient", _everything, trains=False),
    )
}
