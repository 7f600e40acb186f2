"""What a case is: a network, its real input and how detectors and fine-tuners freeze it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import nn

__all__ = ["Case"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One network to benchmark.

    Attributes:
        name: as given on the command line.
        family: group in the report, for example "classification" or "detection".
        build: makes the network with random weights, in any mode; may raise
            :class:`bench.libraries.MissingLibrary`.
        shape: one example without the batch dimension, at its real size.
        batch: batch size at which it is usually trained; exact metrics are taken there.
        small_shape, small_batch: what a laptop's CPU can run in about a second.
        precision: the precision that it is usually trained in (see ``bench.workload``).
        first_stages: prefixes of the parameters that detectors freeze, stem and first stage.
            Without them the case has no "frozen stages" protocol.
        features: names of the modules whose outputs a perceptual loss compares. Without them the
            case has no "perceptual-loss" protocol.
        discriminates: whether it is a GAN's discriminator. Others have no "gan-discriminator"
            protocol.
        head: prefix of the new layers that fine-tuning always trains. Empty: the last layer.
        note: what a reader of the table needs to know.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (3, 224, 224)
    batch: int = 64
    small_shape: tuple[int, ...] = (3, 96, 96)
    small_batch: int = 8
    precision: str = "float32"
    first_stages: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    discriminates: bool = False
    head: str = ""
    note: str = ""
