"""A layer together with all that its kernel could compute, once that is folded into it."""

from __future__ import annotations

import dataclasses

from torch import fx

from ...graph.affine import AffineChain
from ...graph.layers import Layer
from .epilogue import Activation, Residual

__all__ = ["FoldCandidate"]


@dataclasses.dataclass(frozen=True)
class FoldCandidate:
    """A layer, what can be folded into it, and the kernel that would compute the result.

    Attributes:
        chain: the layer and the affine chain after it, which may be empty.
        kernel: by its name in :mod:`kernels`; "" while none is assigned.
        activation: computed in the kernel's epilogue; None if there is none.
        residual: the same of the addition of another tensor. At most one of the two.
    """

    chain: AffineChain
    kernel: str = ""
    activation: Activation | None = None
    residual: Residual | None = None

    @property
    def layer(self) -> Layer:
        return self.chain.layer

    @property
    def end(self) -> fx.Node:
        """The end of the chain and the activation: what the kernel's result is, or is added to."""
        return self.chain.last if self.activation is None else self.activation.last

    @property
    def last(self) -> fx.Node:
        """The last node that is computed in the layer's kernel."""
        return self.end if self.residual is None else self.residual.last

    @property
    def epilogue(self) -> str:
        """What the kernel computes after the affine map, "" if nothing."""
        if self.residual is not None:
            return "add+relu" if self.residual.relu else "add"
        return "" if self.activation is None else self.activation.name
