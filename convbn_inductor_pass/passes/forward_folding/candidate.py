"""What the kernel half decides about a layer, and what it decides from."""

from __future__ import annotations

import dataclasses

from GONE.branches import Branches
from torch import fx

from ..._torch import compat, inductor
from ...codes import ForwardCode
from ...config import Options
from ...graph.affine import AffineChain
from . import kernels
from .epilogue import Activation, Residual

__all__ = ["ForwardDecision", "Surroundings"]


@dataclasses.dataclass(frozen=True)
class ForwardDecision:
    """What was decided about a layer and the affine map or activation after it.

    ``kernel`` computes the layer if it is rewritten, see :mod:`kernels`. ``bytes_exact`` and
    ``bytes_folded`` are what each way reads and writes besides the layer's own input, weight and
    output: hints where sizes are symbolic.
    ``seconds_exact`` and ``seconds_folded`` were measured, for the layer and all of that; None
    if they were not. ``branches``, whose widest this layer is, are one convolution in the place of
    their sum.
    """

    chain: AffineChain
    code: ForwardCode
    kernel: str
    activation: Activation | None = None
    residual: Residual | None = None
    detail: str = ""
    bytes_exact: int = 0
    bytes_folded: int = 0
    seconds_exact: float | None = None
    seconds_folded: float | None = None
    branches: Branches | None = None

    @property
    def place(self) -> fx.Node:
        """The node before which the layer is rewritten."""
        if self.branches is not None:
            return self.branches.last
        if self.code is ForwardCode.AS_LINEAR:
            return self.chain.layer.node
        if self.kernel == kernels.CUDNN and self.residual is not None:
            return self.residual.last
        return self.chain.last

    @property
    def seconds(self) -> float | None:
        """What was measured for the fastest way; None if nothing was."""
        known = [s for s in (self.seconds_exact, self.seconds_folded) if s is not None]
        return min(known, default=None)

    @property
    def epilogue(self) -> str:
        """What the layer's kernel computes besides, "" if nothing."""
        if self.residual is not None:
            return "add+relu" if self.residual.relu else "add"
        return "" if self.activation is None else self.activation.name


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What a decision depends on besides its chain.

    Attributes:
        order: position of each node.
        writes: positions of the nodes that write to memory.
        is_inference: whether the graph is no forward of a training step.
        is_channels_last: whether Inductor makes what goes through convolutions channels-last.
        parts: what is returned to make tensor subclasses of it.
        taken: additions of a residual that a layer's kernel computes already. There may be a
            layer on both sides.
    """

    order: dict[fx.Node, int]
    writes: list[int]
    is_inference: bool
    is_channels_last: bool
    parts: set[fx.Node]
    taken: set[fx.Node]

    @classmethod
    def of(cls, graph: fx.Graph) -> Surroundings:
        order = {node: i for i, node in enumerate(graph.nodes)}
        writes = [order[n] for n in graph.nodes if compat.is_mutable(n.target)]
        inputs = graph.find_nodes(op="placeholder")
        is_inference = not any(n.name.startswith("primals_") for n in inputs)
        is_channels_last = inductor.makes_channels_last(graph, is_inference=is_inference)
        parts = inductor.parts_of_subclasses(graph)
        return cls(order, writes, is_inference, is_channels_last, parts, set())

    def may_keep(self, options: Options) -> bool:
        """Whether weights may be kept between calls."""
        wanted = options.forward == "auto" and options.keep_packed_weights
        return wanted and self.is_inference and not self.writes
