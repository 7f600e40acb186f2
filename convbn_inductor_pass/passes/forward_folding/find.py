"""Find layers that something foldable follows, and the kernel that could compute both."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import fx

from ..._torch import compat, inductor
from ...graph import affine, layers
from ...graph.affine import AffineChain
from ...graph.layers import Layer, value_of
from . import epilogue
from .epilogue import Epilogue

__all__ = ["FoldCandidate", "find_candidates"]


@dataclasses.dataclass(frozen=True)
class FoldCandidate:
    """A layer, what can be folded into it, and the kernel that would compute the result.

    ``kernel`` is "cudnn" or "onednn", whose convolution computes the ``epilogue``, too, or "aten",
    the layer's own operator with a scaled weight and a shifted bias.
    """

    chain: AffineChain
    kernel: str
    epilogue: Epilogue | None = None

    @property
    def layer(self) -> Layer:
        return self.chain.layer

    @property
    def end(self) -> fx.Node:
        """What the new call gives: after oneDNN's, Inductor adds a residual, in place if it may."""
        adds_apart = self.kernel == "onednn" and self.epilogue and self.epilogue.other
        return self.chain.last if adds_apart else self.last

    @property
    def last(self) -> fx.Node:
        """The last node that is computed in the layer's kernel."""
        return self.chain.last if self.epilogue is None else self.epilogue.last


def find_candidates(graph: fx.Graph) -> Iterator[FoldCandidate]:
    """Every layer of ``graph``, unless it is a backward, that something foldable follows."""
    if inductor.is_backward(graph):
        return
    chains = list(affine.find_chains(graph))
    # An addition of two layers' outputs goes into one of them only.
    taken = {step.node for chain in chains for step in chain.steps}
    is_channels_last = inductor.makes_channels_last(graph)
    for chain in chains:
        if is_channels_last and _is_cudnn_layer(chain.layer):
            cut, found = _cut_at_activation(chain)
            found = found or _residual(chain, taken)
            if found is not None and found.name in ("relu", "add+relu"):
                taken.update(chain.last.users)
                yield FoldCandidate(cut, "cudnn", found)
                continue
        if _is_onednn_layer(chain.layer):
            cut, activation = _cut_at_activation(chain)
            if activation is not None:
                yield FoldCandidate(cut, "onednn", activation)
                continue
            if chain.steps and not _may_add_and_raise(chain):
                yield FoldCandidate(chain, "onednn", _residual(chain, taken))
                continue
        if chain.steps:
            yield FoldCandidate(chain, "aten")


def _is_cudnn_layer(layer: Layer) -> bool:
    """Whether cuDNN may have a convolution with an epilogue for this layer."""
    nodes = (layer.node, layer.input, layer.weight)
    sizes = [size for node in nodes for size in value_of(node).shape]
    return (
        layer.is_conv
        and not layer.layout.transposed
        and layer.layout.groups == 1  # of others, it has few
        and layer.out.ndim == 4  # of others, Inductor makes nothing channels-last on GPUs
        and layer.out.dtype in (torch.float32, torch.bfloat16)
        # There may be none for another size. Nothing to compute, nothing to gain.
        and all(isinstance(size, int) and size > 0 for size in sizes)
        and inductor.has_cudnn_epilogues(layer.out.device)
        and inductor.for_python()
    )


def _is_onednn_layer(layer: Layer) -> bool:
    """Whether oneDNN has a convolution with an epilogue for this layer.

    It has to see that its input is channels-last, as Inductor made it: an input of one channel, or
    of 1x1 maps, is contiguous as well, and oneDNN's result then is, which Inductor does not expect.
    """
    _, channels, *maps = value_of(layer.input).shape
    surely = compat.surely  # makes no guard on symbolic sizes
    return (
        layer.is_conv
        and not layer.layout.transposed
        and layer.out.ndim in (4, 5)
        and layer.out.dtype in (torch.float32, torch.bfloat16)
        and layer.out.device.type == "cpu"
        and inductor.has_onednn_epilogues(layer.out.dtype)
        and surely(channels != 1)
        and any(surely(size != 1) for size in maps)
    )


def _may_add_and_raise(chain: AffineChain) -> bool:
    """Whether Inductor might let oneDNN's convolution add what comes after the chain, and raise.

    Where oneDNN does not both add and rectify (a grouped convolution; an input that counts as
    contiguous, as 1x1 maps do), PyTorch does so with a kernel that has no bfloat16 and raises
    (2.11 to 2.15).
    """
    is_narrow = chain.layer.out.dtype == torch.bfloat16
    return is_narrow and any(u.target is torch.ops.aten.add.Tensor for u in chain.last.users)


def _cut_at_activation(chain: AffineChain) -> tuple[AffineChain, Epilogue | None]:
    """The chain up to where an activation begins, and the activation.

    Some begin with a step of an affine map themselves, as hardsigmoid does with ``x + 3``: of the
    possible cuts, the one that leaves the least behind.
    """
    best: tuple[AffineChain, Epilogue | None] = chain, None
    for end in range(len(chain.steps), -1, -1):
        cut = dataclasses.replace(chain, steps=chain.steps[:end])
        out = chain.layer.out
        if layers.same_sizes(value_of(cut.last).shape, out.shape):
            found = epilogue.activation_after(cut.last, out.dtype)
            if found is not None and (best[1] is None or best[1].last < found.last):
                best = cut, found
        if end and chain.steps[end - 1].reads_a_tensor:
            break
    return best


def _residual(chain: AffineChain, taken: set[fx.Node]) -> Epilogue | None:
    """The residual added to a chain, where it can as well be added to the layer's own elements."""
    is_moved = any(s.kind == "move" for s in chain.steps)
    if is_moved or value_of(chain.last).dtype != chain.layer.out.dtype:
        return None
    if not taken.isdisjoint(chain.last.users):
        return None
    return epilogue.residual_after(chain.last)
