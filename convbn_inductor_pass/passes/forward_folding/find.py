"""Find layers that something foldable follows, and the kernel that could compute both.

cuDNN's convolution is given its ReLU and its residual. Into oneDNN's, Inductor itself puts what
follows, in place where it may: here that is found only to be counted.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import fx

from ..._torch import compat, inductor
from ...graph import affine
from ...graph.affine import AffineChain
from ...graph.layers import Layer, same_shape, value_of
from ...graph.uses import backward_of

aten = torch.ops.aten

# Activations that Inductor has oneDNN's convolution compute: one call each, and several.
_CALLS = {aten.relu.default: "relu", aten.sigmoid.default: "sigmoid", aten.tanh.default: "tanh"}
_DECOMPOSED = (
    *(aten.silu, aten.gelu, aten.leaky_relu),
    *(aten.hardswish, aten.hardsigmoid, aten.hardtanh),
)


class Epilogue(NamedTuple):
    """What the layer's kernel computes after the affine map.

    An activation; or the addition of ``other``, a residual: "add", or "add+relu" with a ReLU.
    ``last`` is the last call of it; but the input of an activation that is several calls.
    """

    name: str
    last: fx.Node
    other: fx.Node | None = None


class FoldCandidate(NamedTuple):
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
        """What the new call gives."""
        return self.last if self.kernel == "cudnn" else self.chain.last

    @property
    def last(self) -> fx.Node:
        """The last node that is computed in the layer's kernel."""
        return self.chain.last if self.epilogue is None else self.epilogue.last


def find_candidates(graph: fx.Graph) -> Iterator[FoldCandidate]:
    """Every layer of ``graph``, unless it is a backward, that something foldable follows."""
    if backward_of(graph):
        return
    # Some activations begin like an affine map, as hardsigmoid does with ``x + 3``.
    chains = list(affine.find_chains(graph, ends_before=_activation_of))
    # An addition of two layers' outputs goes into one of them only.
    taken = {step.node for chain in chains for step in chain.steps}
    is_channels_last = inductor.makes_channels_last(graph)
    for chain in chains:
        layer, epilogue = chain.layer, _epilogue(chain, taken)
        rectifies = epilogue is not None and epilogue.name in ("relu", "add+relu")
        is_conv = layer.is_conv and not layer.layout.transposed
        is_conv = is_conv and layer.out.dtype in (torch.float32, torch.bfloat16)
        if is_conv and is_channels_last and rectifies and _has_cudnn(layer):
            taken.update(chain.last.users)
            yield FoldCandidate(chain, "cudnn", epilogue)
        elif is_conv and _has_onednn(layer) and not _may_add_and_raise(chain):
            if chain.steps or (epilogue is not None and epilogue.other is None):
                yield FoldCandidate(chain, "onednn", epilogue)
        elif chain.steps:
            yield FoldCandidate(chain, "aten")


def _has_cudnn(layer: Layer) -> bool:
    """Whether cuDNN may have this convolution with an epilogue."""
    nodes = (layer.node, layer.input, layer.weight)
    sizes = [size for node in nodes for size in value_of(node).shape]
    return (
        layer.layout.groups == 1  # of others, it has few
        and layer.out.ndim == 4  # of others, Inductor makes nothing channels-last on GPUs
        # There may be none for another size. Nothing to compute, nothing to gain.
        and all(isinstance(size, int) and size > 0 for size in sizes)
        and inductor.has_cudnn_epilogues(layer.out.device)
        and inductor.for_python()
    )


def _has_onednn(layer: Layer) -> bool:
    """Whether oneDNN has this convolution with an epilogue.

    It has to see that its input is channels-last, as Inductor made it: an input of one channel, or
    of 1x1 maps, is contiguous as well, and oneDNN's result then is, which Inductor does not expect.
    """
    _, channels, *maps = value_of(layer.input).shape
    surely = compat.surely  # makes no guard on symbolic sizes
    return (
        layer.out.ndim in (4, 5)
        and layer.out.device.type == "cpu"
        and inductor.has_onednn_epilogues(layer.out.dtype)
        and surely(channels != 1)
        and any(surely(size != 1) for size in maps)
    )


def _may_add_and_raise(chain: AffineChain) -> bool:
    """Whether Inductor might let oneDNN's convolution add what comes after the chain, and raise.

    Where oneDNN does not both add and rectify (grouped; an input that counts as contiguous, as 1x1
    maps do), PyTorch does so with a kernel that has no bfloat16 and raises (2.11 to 2.15).
    """
    is_narrow = chain.layer.out.dtype == torch.bfloat16
    return is_narrow and any(u.target is torch.ops.aten.add.Tensor for u in chain.last.users)


def _epilogue(chain: AffineChain, taken: set[fx.Node]) -> Epilogue | None:
    """What follows a chain, where it can as well be computed of the layer's own elements."""
    node = chain.last
    if any(s.kind == "move" for s in chain.steps):
        return None
    names = {_activation_of(u) for u in node.users}
    if len(names) == 1 and "" not in names:
        return Epilogue(names.pop(), node)
    user = _only_user(node)
    if user is None or value_of(node).dtype != chain.layer.out.dtype:
        return None
    if user.target in _CALLS:
        return Epilogue(_CALLS[user.target], user)
    if user.target is not aten.add.Tensor or user.kwargs.get("alpha", 1) != 1 or user in taken:
        return None
    other = next((a for a in user.all_input_nodes if a is not node), None)
    if not same_shape(node, other) or value_of(node).dtype != value_of(other).dtype:
        return None
    relu = _only_user(user)
    if relu is None or relu.target is not aten.relu.default:
        return Epilogue("add", user, other)
    return Epilogue("add+relu", relu, other)


def _activation_of(node: fx.Node) -> str:
    """The activation of several calls that ``node`` is one of; "" if it is of none."""
    packet = getattr(node.meta.get("original_aten"), "overloadpacket", None)
    return packet.__name__ if packet in _DECOMPOSED else ""


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
