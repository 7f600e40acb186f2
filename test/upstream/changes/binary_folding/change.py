"""Folding of constants into layers under freezing: by the channels that a layer gives."""

from test.upstream.edits import Change, Edit

FILE = "torch/_inductor/fx_passes/binary_folding.py"
INIT = "binary_folding_init"
CHECK_CONV = f"{INIT}._check_conv_and_broadcast_op"
CHECK_LINEAR = f"{INIT}._check_linear_and_broadcast_op"
FOLDABLE = f"{INIT}._is_foldable_pattern"
NEW_CONV = f"{INIT}._create_new_conv_node"
NEW_LINEAR = f"{INIT}._create_new_linear_node"

IMPORT = "from torch.fx.experimental.symbolic_shapes import statically_known_true"

NUM_CHANNELS = """
def _num_output_channels(conv_node):
    # A weight is [out, in / groups, *], that of a transposed conv [in, out / groups, *]
    weight = conv_node.args[1].meta["val"]
    transposed, groups = conv_node.args[6], conv_node.args[8]
    return weight.size(1) * groups if transposed else weight.size(0)
"""

PER_CHANNEL = """
def _is_per_channel(other, output, dim, num_channels):
    # One value, or one per channel of the output, which must not be broadcast
    if other.dim() > output.dim():
        return False
    if other.numel() == 1:
        return True
    expected = [1] * output.dim()
    expected[dim] = num_channels
    missing = [1] * (output.dim() - other.dim())
    return [*missing, *other.shape] == expected and statically_known_true(
        output.size(dim) == num_channels
    )
"""

CONV_CHECK = """
if not _is_per_channel(
    other_meta_value, conv_node.meta["val"], 1, _num_output_channels(conv_node)
):
    return False
"""

LINEAR_CHECK = """
if not _is_per_channel(
    other_meta_value, output, output.dim() - 1, weight_meta_value.size(1)
):
    return False
"""

LINEAR_OUTPUT = """
return config.enable_linear_binary_folding and _check_linear_and_broadcast_op(
    computation_node, other, binary_node.args[0].meta["val"]
)
"""

RESIZE = """
def resize_scalar_or_tensor_to_shape(graph, other, shape):
    if not isinstance(other, torch.fx.Node):
        # As it is: a tensor would be rounded to the weight's dtype
        return other
    steps = [(aten.reshape.default, shape)]
    if other.meta["val"].numel() == 1:
        # expand cannot lower the number of dims
        steps = [(aten.reshape.default, (1,)), (aten.expand.default, shape)]
    for op, size in steps:
        other = graph.create_node("call_function", op, (other, size))
    return other

def bias_or_zeros(graph, bias, weight, shape):
    if bias is not None:
        return bias
    return graph.create_node("call_function", aten.new_zeros.default, (weight, shape))

def scale_of_weight(graph, conv_node, other):
    weight = conv_node.args[1].meta["val"]
    transposed, groups = conv_node.args[6], conv_node.args[8]
    ones = [1] * (weight.dim() - 2)
    if not transposed or not isinstance(other, torch.fx.Node):
        return resize_scalar_or_tensor_to_shape(
            graph, other, (weight.size(0), 1, *ones)
        )
    # Within a group, every input has the scales of the group's outputs
    num_inputs, num_outputs = weight.size(0) // groups, weight.size(1)
    res = resize_scalar_or_tensor_to_shape(
        graph, other, (groups, 1, num_outputs, *ones)
    )
    for op, size in (
        (aten.expand.default, (groups, num_inputs, num_outputs, *ones)),
        (aten.reshape.default, (weight.size(0), num_outputs, *ones)),
    ):
        res = graph.create_node("call_function", op, (res, size))
    return res
"""

CONV_SHAPE = "shape = (_num_output_channels(conv_node),)"

LINEAR_SHAPE = 'shape = (weight_node.meta["val"].size(1),)'

RESIZED = "other_reshape = resize_scalar_or_tensor_to_shape(graph, other, shape)"

SCALED_CONV = "other_reshape1 = scale_of_weight(graph, conv_node, other)"

SCALED_LINEAR = """
other_reshape1 = resize_scalar_or_tensor_to_shape(
    graph, other, (1, *shape)
)
"""

CONV_BIAS = "bias_or_zeros(graph, bias, conv_args[1], shape)"

LINEAR_BIAS = "bias_or_zeros(graph, bias_node, weight_node, shape)"

# add and sub have one keyword, which is alpha.
WITH_ALPHA = """shape), other_reshape),
                binary_node.kwargs,"""


def edit(inside: str, at: str, put: str, text: str, count: int = 1) -> Edit:
    return Edit(FILE, inside, at, put, text, count)  # type: ignore[arg-type]


CHANGE = Change(
    name="binary_folding",
    title="[inductor] Binary folding: channels of transposed convs, alpha, scalars",
    new_files={},
    removed=(),
    edits=(
        edit("", "import torch", "after", IMPORT),
        # What may be folded.
        edit(INIT, "def _op_not_broadcasting_with_conv", "instead", NUM_CHANNELS),
        edit(INIT, "def _op_not_broadcasting_with_linear", "instead", PER_CHANNEL),
        edit(CHECK_CONV, "if not _op_not_broadcasting", "instead", CONV_CHECK),
        edit(CHECK_LINEAR, "if not _op_not_broadcasting", "instead", LINEAR_CHECK),
        edit(INIT, "linear_node, other, has_reshape", "swap", "linear_node, other, output"),
        edit(FOLDABLE, "has_reshape = ", "instead", "", 3),
        edit(FOLDABLE, "return (", "instead", LINEAR_OUTPUT),
        # How it is folded.
        edit(INIT, "def resize_scalar_or_tensor", "instead", RESIZE),
        edit(NEW_CONV, "weight_meta_value = ", "instead", CONV_SHAPE),
        edit(NEW_CONV, "other_reshape = ", "instead", RESIZED, 2),
        edit(NEW_CONV, "0 if bias is None else bias", "swap", CONV_BIAS),
        edit(NEW_CONV, "shape), other_reshape),", "swap", WITH_ALPHA),
        edit(NEW_CONV, "weight_broadcast_shape = ", "instead", ""),
        edit(NEW_CONV, "weight_broadcast_shape[0] = ", "instead", ""),
        edit(NEW_CONV, "other_reshape1 = ", "instead", SCALED_CONV),
        edit(NEW_LINEAR, "weight_meta_value = ", "instead", LINEAR_SHAPE),
        edit(NEW_LINEAR, "other_reshape = ", "instead", RESIZED, 2),
        edit(NEW_LINEAR, "0 if bias_node is None else bias_node", "swap", LINEAR_BIAS),
        edit(NEW_LINEAR, "shape), other_reshape),", "swap", WITH_ALPHA),
        edit(NEW_LINEAR, "weight_broadcast_shape = ", "instead", ""),
        edit(NEW_LINEAR, "other_reshape1 = ", "instead", SCALED_LINEAR),
    ),
    tests=("test_binary_folding_channels.py",),
)
