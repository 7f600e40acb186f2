"""The decisions that a pass can make, each with a code and the sentence that users see."""

import enum


class Code(enum.Enum):
    """Why something was rewritten, or left as written."""

    # Rewritten.
    FUSED = "tune mode: the layer's output is not saved for backward"
    WEIGHT_COPY = (
        "tune mode, only to avoid saving the weight's half-precision copy for backward; the "
        "layer's output is saved anyway"
    )
    SHAPE_ONLY = "wanted gradients: backward reads only the tensor's shape; it is not saved"
    MASK_FROM_OUTPUT = "wanted gradients: the mask is computed from the activation's output"
    MASK_AFTER_POOLING = "wanted gradients: the mask is computed from max-pooling's output"
    MASK_AS_BITS = "wanted gradients: the mask is saved with eight elements per byte"
    MERGED = "deploy mode: merged into the layer's weight and bias, once"
    FOLDED = "folded: the scale is in the weight and the shift in the bias, recomputed each call"

    # There is nothing to rewrite.
    NOT_AFTER_LAYER = "the batch norm does not follow a convolution or linear layer"
    LAYER_IN_ANOTHER_GRAPH = (
        "the batch norm's input is a graph input: the layer before it, if there is one, is in "
        "another graph (graph break, DDP bucket, module compiled separately)"
    )
    NOT_COMPILED = (
        "in no graph that torch.compile sees: it is not called, or in a part that is not compiled"
    )
    INSIDE_HIGHER_ORDER_OP = (
        "inside a higher-order operator (cond, scan, nested_compile_region), whose graph PyTorch "
        "partitions separately"
    )
    BATCH_STATISTICS = "the batch norm is in training mode, or has no running statistics"
    NO_GRAD = "nothing here requires a gradient, so nothing is saved for backward"
    AFFINE_FROZEN = (
        "the batch norm's weight needs no gradient: eval mode does not save the layer's output"
    )

    # Rewriting is not legal, or cannot be shown to be.
    LAYER_OUTPUT_USED = "the layer's output is used elsewhere too, so it must be saved anyway"
    OTHER_GRADIENT = (
        "the layer's gradient is not the batch norm's times a value per channel, for example "
        "because the layer's output is used elsewhere, too"
    )
    UNSUPPORTED_DTYPE = "this mix of dtypes is not supported"
    UNSUPPORTED_TENSOR = "a tensor is a subclass, or not a dense CPU/GPU tensor"
    UNBATCHED = "dimension 1, which the batch norm normalizes, is not the layer's channel dimension"
    CONSTANT_RANGE = "the product of the constants after the layer may not fit in float32"
    INPUT_MUTATED = "a tensor that the rewrite would read is, or may be, modified in place"
    STATISTICS_REQUIRE_GRAD = "the running statistics require a gradient"
    REGION = "autocast, grad mode or saved-tensor hooks change between layer and batch norm"
    WEIGHT_FREED = (
        "the layer's weight is freed before the batch norm runs (FSDP, ZeRO): shard the layer and "
        "the batch norm as one unit"
    )
    NOT_MERGED = "deploy mode leaves this batch norm in eval mode"
    FLOAT16_RANGE = "a scaled weight might not fit in float16; it is unknown at compile time"
    QUANTIZED = "the weight is quantized, and Inductor has kernels for that"
    VIEW_RETURNED = "a slice of a result of dynamic shape is returned, whose strides would change"

    # Rewriting is legal, but does not pay, or is not wanted.
    SAVED_ANYWAY = "backward needs that tensor, or what it is computed from, for something else too"
    OUTPUT_NOT_SAVED = "the activation's output is not saved for backward, so its mask has to be"
    NOT_DIVISIBLE = "no dimension of the mask is known to be a multiple of 8"
    WEIGHT_COMPUTED = "the weight is computed in the graph, and would have to be saved instead"
    LAYER_FROZEN = "the layer's weight needs no gradient, but rewriting would compute one"
    LARGE_WEIGHT = "objective 'speed': the weight is large relative to the layer's output"
    MORE_BYTES = "folding would not move less than half the bytes"
    NOT_MEASURED = "forward='auto' folds only on CPU: it was not measured on this device"
    DENIED = "the options 'allow' and 'deny' exclude this module"

    @property
    def rewritten(self) -> bool:
        return self in _REWRITTEN

    fused = rewritten  # its name in 0.1.0

    @property
    def remedy(self) -> str:
        """What to do about it, "" if there is nothing to do."""
        return _REMEDIES.get(self, "")


_REWRITTEN = {
    *(Code.FUSED, Code.WEIGHT_COPY, Code.SHAPE_ONLY, Code.MERGED, Code.FOLDED),
    *(Code.MASK_FROM_OUTPUT, Code.MASK_AFTER_POOLING, Code.MASK_AS_BITS),
}

_REMEDIES = {
    Code.LAYER_IN_ANOTHER_GRAPH: (
        "compile both in one graph: TORCH_LOGS=graph_breaks shows where it ends; for DDP, "
        "increase bucket_cap_mb"
    ),
    Code.NOT_COMPILED: "TORCH_LOGS=graph_breaks shows what is not compiled",
    Code.INSIDE_HIGHER_ORDER_OP: "move the block out of the higher-order operator",
    Code.BATCH_STATISTICS: (
        "call model.eval() after each model.train(), or "
        "convbn_inductor_pass.freeze_batch_norms(model)"
    ),
    Code.UNSUPPORTED_DTYPE: "use one floating-point dtype for layer and batch norm, or autocast",
    Code.UNBATCHED: "give the input a batch dimension",
    Code.INPUT_MUTATED: "modify a copy instead",
    Code.STATISTICS_REQUIRE_GRAD: "call requires_grad_(False) on running_mean and running_var",
    Code.REGION: "run both under the same autocast, grad mode and hooks",
    Code.FLOAT16_RANGE: "use bfloat16, or autocast",
    Code.LARGE_WEIGHT: "set the option objective='memory'",
    Code.MORE_BYTES: "set the option forward='fold' to fold it anyway",
    Code.NOT_MEASURED: "measure it with the option forward='fold'",
    Code.DENIED: "change these options",
}
