"""The command ``demo``."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from .. import demo
from .options import console

__all__ = ["demonstrate"]


def _device(text: str) -> str:
    try:
        torch.empty(0, device=text)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise typer.BadParameter(
            f"{text!r} cannot be used ({reason}); expected cpu, cuda or cuda:N"
        ) from None
    return text


def demonstrate(
    steps: Annotated[int, typer.Option(min=1)] = 40,
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    device: Annotated[str, typer.Option(callback=_device)] = "cpu",
    seed: int = 0,
) -> None:
    """Fine-tune a small ResNet on digits in eval mode and in tune mode, and compare."""
    try:
        result = demo.run(steps=steps, batch_size=batch_size, device=device, seed=seed)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "sklearn":
            raise
        raise typer.BadParameter(
            "the demonstration's data comes with scikit-learn, which is not installed; "
            "pip install scikit-learn"
        ) from None
    console.print(result.table())
