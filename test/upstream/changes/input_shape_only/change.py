"""The input of a convolution whose weight is frozen is not saved for backward."""

from test.upstream.edits import Change, Edit

FILE = "torch/_inductor/decomposition.py"

# The piece of a line before which the helper goes
DECORATOR = "@register_decomposition([aten.convolution_"

HELPER = '''\
def _conv_input_grad(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    groups: int,
) -> torch.Tensor | None:
    """
    The gradient of a convolution's input, as the convolution that it is: a transposed
    one of grad_output, or a plain one if the forward is transposed. It reads the sizes
    of the input but not its elements, so that nothing saves the input for it.

    None if it is not known at compile time to have the size of the input, and for
    depthwise convs on a GPU, which have kernels of their own in backward only.
    """
    sizes = (t.shape[2:] for t in (input, grad_output, weight))
    num_dims = weight.dim() - 2
    params = (pad_listlike(p, num_dims) for p in (stride, padding, dilation))
    output_padding = []
    for n, m, k, s, p, d in zip(*sizes, *params):
        if transposed:
            missing, num_choices = n - ((m + 2 * p - d * (k - 1) - 1) // s + 1), 1
        else:
            missing, num_choices = n - ((m - 1) * s - 2 * p + d * (k - 1) + 1), s
        known = [i for i in range(num_choices) if statically_known_true(missing == i)]
        if not known:
            return None
        output_padding += known
    is_depthwise = groups > 1 and weight.size(1) == 1 and not transposed
    if is_depthwise and is_gpu(grad_output.device.type):
        return None
    return aten.convolution(
        grad_output,
        weight,
        None,
        stride,
        padding,
        dilation,
        not transposed,
        output_padding,
        groups,
    )


'''

FROZEN = """
if not output_mask[1] and not statically_known_true(input.size(1) == 0):
    # The weight is frozen. Neither of the other gradients reads the input's elements.
    grad_inp = None
    if output_mask[0]:
        grad_inp = _conv_input_grad(
            grad_output, input, weight, stride, padding, dilation, transposed, groups
        )
    if grad_inp is not None or not output_mask[0]:
        grad_bias = None
        if output_mask[2]:
            grad_bias = aten.sum(grad_output, [0, *range(2, grad_output.dim())])
        return (grad_inp, None, grad_bias)
"""

CHANGE = Change(
    name="input_shape_only",
    title="[inductor] Don't save the input of a convolution whose weight is frozen",
    new_files={},
    removed=(),
    edits=(
        Edit(FILE, "", DECORATOR, "swap", HELPER + DECORATOR),
        Edit(FILE, "convolution_backward", "if not output_mask[2]", "before", FROZEN),
    ),
    tests=("test_frozen_conv_backward.py",),
)
