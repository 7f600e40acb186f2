"""Cases whose networks are defined here, in ``bench.models``; they need no other library."""

from __future__ import annotations

from ..models import other_ranks, parameter_free, repvgg, resnet, transposed
from .base import Case

__all__ = ["CASES"]

_FIRST_STAGES = ("stem", "stages.0")
_ICLR2022 = "parameter-free layers, arXiv 2202.02777"

CASES = [
    Case(
        "r50_max",
        "parameter-free",
        parameter_free.resnet50_max,
        first_stages=_FIRST_STAGES,
        note=_ICLR2022,
    ),
    Case(
        "r50_hybrid",
        "parameter-free",
        parameter_free.resnet50_hybrid,
        first_stages=_FIRST_STAGES,
        note=_ICLR2022,
    ),
    Case(
        "vit_s_max",
        "parameter-free",
        parameter_free.vit_s_max,
        small_shape=(3, 224, 224),
        small_batch=2,
        note="no batch norm: a control",
    ),
    Case(
        "pit_s_max",
        "parameter-free",
        parameter_free.pit_s_max,
        small_shape=(3, 224, 224),
        small_batch=2,
        note="no batch norm: a control",
    ),
    Case(
        "resnet18_narrow",
        "classification",
        resnet.narrow_resnet18,
        shape=(3, 32, 32),
        batch=4,
        small_shape=(3, 32, 32),
        small_batch=4,
        note="8 channels wide: Python's share of a step",
    ),
    Case("repvgg_a0", "classification", repvgg.repvgg_a0, first_stages=_FIRST_STAGES),
    Case("repvgg_b0", "classification", repvgg.repvgg_b0, first_stages=_FIRST_STAGES),
    Case(
        "unet",
        "segmentation",
        transposed.UNet,
        shape=(3, 512, 512),
        batch=8,
        small_shape=(3, 64, 64),
        small_batch=1,
        first_stages=("down.0",),
        note="transposed convolutions with batch norms",
    ),
    Case(
        "dcgan_generator",
        "generation",
        transposed.dcgan_generator,
        shape=(100, 1, 1),
        batch=128,
        small_shape=(100, 1, 1),
        small_batch=16,
        note="transposed convolutions with batch norms",
    ),
    Case(
        "dcgan_discriminator",
        "generation",
        transposed.dcgan_discriminator,
        shape=(3, 64, 64),
        batch=128,
        small_shape=(3, 64, 64),
        small_batch=16,
        discriminates=True,
        note="leaky ReLU",
    ),
    Case(
        "timeseries_fcn",
        "other ranks",
        other_ranks.TimeSeriesFCN,
        shape=(12, 1000),
        batch=64,
        small_shape=(12, 256),
        small_batch=8,
        note="1-D",
    ),
    Case(
        "convnet3d",
        "other ranks",
        other_ranks.ConvNet3d,
        shape=(3, 16, 112, 112),
        batch=16,
        small_shape=(3, 8, 48, 48),
        small_batch=2,
        note="3-D",
    ),
]
