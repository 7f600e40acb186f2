"""Which way to compute a layer and what follows it pays: as written, or folded, with which kernel.

Measured by :mod:`timing` where that is possible, and estimated otherwise: from what each way has
to read and write besides the layer itself. As written, a kernel reads the layer's output and
writes the result of the affine map and of what follows it. Folded with an epilogue, that kernel is
gone; instead the weight is read and written once more. Where something follows that Inductor
computes in the same kernel as the affine map anyway (a reduction, a pooling, another pointwise
function), nothing is gained.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from torch import fx

from . import _compat, _inductor, kernels, timing
from .affine import AffineChain
from .aten_ir import tensor_of, without_casts
from .branches import Branches
from .epilogue import Activation, Residual
from .workload import workload_of

__all__ = ["Costs", "bytes_moved", "choose", "seconds_merged"]

# Layers at which both ways move as many bytes came out slower when folded: the scale and the
# shift are small kernels of their own, and a weight is read with less locality.
_MARGIN = 2
# A measured lead of less is left alone: it may be noise, and as written the bits are eval mode's.
_LEAD = 0.99
# Nor does another way's lead over packed weights of less count. What scales a weight in each call
# is a kernel of its own, whose call is not timed, while a network's packed layers share the call
# that reads their weights; and inside of MobileNetV2, ways that take 10% less alone took no less.
_LEAD_OVER_PACKED = 0.85


@dataclasses.dataclass(frozen=True)
class Costs:
    """What each way costs.

    Attributes:
        kernel: the fastest way, one of :mod:`kernels`; None where the layer should stay as
            written.
        seconds_exact, seconds_folded: measured, the latter in the fastest other way; None where
            nothing was measured.
    """

    kernel: str | None
    seconds_exact: float | None = None
    seconds_folded: float | None = None


def choose(
    chain: AffineChain,
    activation: Activation | None,
    residual: Residual | None,
    folding: Sequence[str],
    *,
    is_channels_last: bool,
    measure: bool,
) -> Costs:
    """The fastest way, by measurement if there is one and by an estimate if there is none.

    ``folding`` are the kernels that can compute the folded layer, the first one the default.
    ``is_channels_last`` says whether Inductor makes what goes through convolutions so.
    With ``measure``, what has not been measured before on this machine is measured now.
    """
    ways = [*folding, kernels.UNFOLDED_LINEAR] if kernels.LINEAR in folding else folding
    end = _last(chain.last, activation, residual)
    times = _seconds(
        chain, activation, residual, end, ways, is_channels_last=is_channels_last, measure=measure
    )
    ways = [way for way in ways if way in times]  # where nothing is measured, some may be on file
    if not ways or timing.AS_WRITTEN not in times:
        faster = _is_faster(*bytes_moved(chain, activation, residual, folding[0]))
        return Costs(folding[0] if faster else None)
    exact = times[timing.AS_WRITTEN]
    kernel = min(ways, key=times.__getitem__)
    if times[kernel] > _LEAD_OVER_PACKED * times.get(kernels.PACKED, math.inf):
        kernel = kernels.PACKED
    faster = times[kernel] < _LEAD * exact
    return Costs(kernel if faster else None, exact, times[kernel])


def seconds_merged(
    branches: Branches,
    separately: float,
    activation: Activation | None,
    residual: Residual | None,
    *,
    is_channels_last: bool,
    measure: bool,
) -> float | None:
    """Seconds of the convolution that all branches can be merged into, its weight kept.

    None if it is not faster than the branches one by one, which take ``separately`` seconds, or was
    not measured. (In these, an addition may count for the branches on both sides of it.)
    """
    end = _last(branches.last, activation, residual)
    times = _seconds(
        *(branches.chains[0], activation, residual, end, [kernels.PACKED]),
        is_channels_last=is_channels_last,
        measure=measure,
    )
    merged = times.get(kernels.PACKED, math.inf)
    return merged if merged < _LEAD * separately else None


def _seconds(
    chain: AffineChain,
    activation: Activation | None,
    residual: Residual | None,
    end: fx.Node,
    ways: Sequence[str],
    *,
    is_channels_last: bool,
    measure: bool,
) -> dict[str, float]:
    """Measured seconds of each way to compute a layer and what follows it, up to ``end``."""
    ends = _ends_a_kernel(end)
    work = workload_of(chain, activation, residual, ends, is_channels_last=is_channels_last)
    measure = measure and _inductor.may_measure() and not _is_guess(chain)
    return timing.seconds(work, ways, measure=measure)


def _is_guess(chain: AffineChain) -> bool:
    """Whether a size depends on data, so that there is nothing to time."""
    tensors = (tensor_of(chain.layer.input), tensor_of(chain.layer.weight), chain.layer.out)
    return any(t is not None and _compat.depends_on_data(t) for t in tensors)


def _last(last: fx.Node, activation: Activation | None, residual: Residual | None) -> fx.Node:
    if residual is not None:
        return residual.last
    return last if activation is None else activation.last


def bytes_moved(
    chain: AffineChain, activation: Activation | None, residual: Residual | None, kernel: str
) -> tuple[int, int]:
    """Bytes moved as written and folded, besides reading the layer's inputs and writing its output.

    ``kernel`` is to compute the folded layer. Hints where sizes are symbolic.
    """
    out = chain.layer.out
    has_epilogue = activation is not None or residual is not None
    fused = has_epilogue and kernel in kernels.ADDING
    kernel_goes = fused or (_ends_a_kernel(chain.last) and not _adds_bias_apart(chain))
    exact = 2 * _compat.size_hint(out.numel()) * out.element_size() if kernel_goes else 0
    return exact, _weight_bytes(chain) if chain.scales else 0


def _weight_bytes(chain: AffineChain) -> int:
    wide, narrow = tensor_of(without_casts(chain.layer.weight)), tensor_of(chain.layer.weight)
    if wide is None or narrow is None:
        raise AssertionError(f"{chain.layer.node} has no metadata")
    count = _compat.size_hint(narrow.numel())
    # A weight that autocast narrows is read and written anyway, in the same kernel.
    return 0 if wide is not narrow else count * (wide.element_size() + narrow.element_size())


def _adds_bias_apart(chain: AffineChain) -> bool:
    """Whether Inductor takes the bias off the layer and into a kernel of its own."""
    on_cpu = chain.layer.out.device.type == "cpu"
    has_bias = chain.shifts or chain.layer.bias is not None
    return chain.layer.is_conv and has_bias and not on_cpu


def _ends_a_kernel(node: fx.Node) -> bool:
    """Whether the result must be written to memory because no generated kernel takes it over."""
    return any(u.op == "output" or not _inductor.is_generated(u.target) for u in node.users)


def _is_faster(bytes_exact: int, bytes_folded: int) -> bool:
    """Whether folding is estimated to be faster, with a margin for what is not counted."""
    return _MARGIN * bytes_folded < bytes_exact
