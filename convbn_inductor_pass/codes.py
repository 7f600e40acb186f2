"""The decisions that can be made about a batch norm, each with a code.

The same code stands in logs, in ``explain``, in the trace artifact and in tests. The value is
the sentence that a user reads; a decision adds a detail that names the nodes.
"""

from __future__ import annotations

import enum

__all__ = ["Code", "ForwardCode", "ScaleCode"]


class Code(enum.Enum):
    """Why a batch norm was fused with the layer before it, or left alone."""

    FUSED = "fused: the layer's output is no longer kept for backward"

    # The call cannot be read.
    UNBOUND_ARGUMENTS = "the arguments do not fit the operator's signature"
    NON_CONSTANT = "an argument that must be a constant is computed in the graph"
    MODULE_NOT_PLAIN = "the module is a subclass, or has hooks, parametrizations or a padding mode"
    NO_METADATA = "the graph does not record shapes and dtypes"

    # There is nothing to fuse.
    NOT_AFTER_LAYER = "the batch norm does not follow a convolution or linear layer"
    BATCH_STATISTICS = "the batch norm normalises with batch statistics (training mode)"
    NO_RUNNING_STATISTICS = "the batch norm has no running statistics"
    OUTPUT_UNUSED = "the batch norm's result is not used"

    # Fusing would be wrong, or cannot be shown to be right.
    LAYER_OUTPUT_USED = "the layer's output is used elsewhere too, so it must be kept anyway"
    STATISTICS_USED = "the batch norm's saved statistics are used"
    UNBATCHED = "dimension 1, which the batch norm normalises, is not the layer's channels"
    UNSUPPORTED_TENSOR = "a tensor is a subclass, or not a dense CPU/GPU tensor"
    UNSUPPORTED_DTYPE = "this mix of dtypes is not supported"
    UNSUPPORTED_SHAPE = "a batch norm tensor is not one number per output channel"
    REGION = "autocast, grad mode, a stream or an annotation changes between layer and batch norm"
    FUNCTORCH = "inside a torch.func transform"
    INPUT_MUTATED = "the layer's input or parameters may be modified before the batch norm"
    MUTATED_LATER = "a tensor that the gradient is computed from may be modified later"
    STATISTICS_REQUIRE_GRAD = "the running statistics require a gradient"

    # Fusing would be right, but not pay, or is not wanted.
    NO_GRAD = "nothing here requires a gradient, so nothing is kept for backward"
    AFFINE_FROZEN = (
        "the batch norm's weight needs no gradient: eval mode does not keep the layer's output"
    )
    LAYER_FROZEN = "the layer's weight needs no gradient: fusing would have to compute it"
    LARGE_WEIGHT = "objective 'speed': the weight is large next to the layer's output"
    DENIED = "the options 'allow' and 'deny' leave this module out"

    @property
    def fused(self) -> bool:
        return self is Code.FUSED


class ForwardCode(enum.Enum):
    """Why a layer was folded with the affine map after it, or left as written (kernel half)."""

    FOLDED = "folded: the scale is in the weight and the shift in the bias, in each call anew"
    MERGED = "merged: a parallel convolution's weight, which is kept, contains this layer's"
    AS_LINEAR = "not folded, but computed as a linear layer, which is faster"
    SLOWER = "as written is as fast or faster, as measured or estimated"
    DENIED = "the options 'allow' and 'deny' leave this module out"
    FLOAT16_RANGE = "a scaled weight might not fit float16, and is not known when compiling"
    UNSUPPORTED_DTYPE = "this mix of dtypes is not supported"
    QUANTISED = "the weight is made of integers or 8-bit numbers, which Inductor has kernels for"
    NUMBER_RANGE = "the constants of the affine map, multiplied, do not fit float32"
    VIEW_RETURNED = (
        "a view of the result, or a subclass made of it, is returned, whose strides would change"
    )
    STRIDES_USED = "something reads the result's memory by its strides, which would change"
    SUBGRAPH = "inside cond, scan and the like, whose results must have the strides they had"
    WRITE_BETWEEN = "something may be written to between the layer and the end of the affine map"

    @property
    def folded(self) -> bool:
        return self in (ForwardCode.FOLDED, ForwardCode.MERGED)

    @property
    def rewritten(self) -> bool:
        """Whether the layer is computed in another way than written."""
        return self.folded or self is ForwardCode.AS_LINEAR

    @property
    def sound(self) -> bool:
        """Whether to rewrite the layer would be right, however it was decided."""
        return self.rewritten or self is ForwardCode.SLOWER


class ScaleCode(enum.Enum):
    """Why the gradients of scales after a layer were taken from its weight gradient, or not."""

    REWRITTEN = "rewritten: the layer's output is no longer kept for the gradients of its scales"
    DENIED = "the options 'allow' and 'deny' leave this module out"
    LAYER_FROZEN = "the layer's weight needs no gradient: rewriting would have to compute it"
    OTHER_GRADIENT = (
        "the layer's gradient is not the scale's times one number per channel, as where the "
        "layer's output is used elsewhere, too"
    )
    NEEDED_ANYWAY = "the layer's output, or what is computed from it, is needed in backward anyway"
    WEIGHT_COMPUTED = "the weight is computed in the graph, and would have to be kept instead"
    FLOAT16_RANGE = "the gradient by a scaled weight might not fit float16"
    UNSUPPORTED_DTYPE = "this mix of dtypes is not supported"
    NUMBER_RANGE = "the constants between layer and sum, multiplied, do not fit float32"
    WRITTEN = "the weight, the bias or a scale is computed from an input that is written to"
    LARGE_WEIGHT = "objective 'speed': the weight is large next to the layer's output"

    @property
    def rewritten(self) -> bool:
        return self is ScaleCode.REWRITTEN
