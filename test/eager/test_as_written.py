"""What must run as written: outputs used elsewhere, writes, regions; and the reason given."""

import contextlib
import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from eager_helpers import Fn, codes, run
from torch import nn

from convbn_inductor_pass import Code, turn_on


def write_then_norm(m, x):
    x = x * 1
    c = m.conv(x)
    x.mul_(3)
    return m.bn(c)


def write_weight_then_norm(m, x):
    c = m.conv(x)
    with torch.no_grad():
        m.conv.weight.mul_(2)
    y = m.bn(c)
    with torch.no_grad():
        m.conv.weight.div_(2)
    return y


def write_through_numpy(m, x):
    x = x * 1
    c = m.conv(x)
    x.numpy()[...] = 0
    return m.bn(c)


def used_after(m, x):
    c = m.conv(x)
    return m.bn(c) + c


def used_after_write(m, x):
    x = x * 1
    c = m.conv(x)
    y = m.bn(c)
    x.zero_()
    return y + c


def used_before(m, x):
    c = m.conv(x)
    return c.sigmoid() * m.bn(c)


def changed_in_place(m, x):
    c = m.conv(x)
    c += 1
    return m.bn(c)


def changed_through_view(m, x):
    c = m.conv(x)
    c[:, 0].zero_()
    return m.bn(c)


def two_norms(m, x):
    c = m.conv(x)
    return m.bn(c) - m.bn(c * 2) + m.bn(c)


def returned(m, x):
    c = m.conv(x)
    return {"features": c, "out": m.bn(c)}


def other_grad_mode(m, x):
    with torch.no_grad():
        c = m.conv(x)
    return m.bn(c)


def unbatched(m, x):
    return m.bn(m.conv(x[0])[None])


def relu_then_norm(m, x):
    return m.bn(F.relu(m.conv(x)))


def norm_of_input(m, x):
    return m.bn(x) + m.conv(x)


AS_WRITTEN = {
    f.__name__: (f, code)
    for f, code in {
        write_through_numpy: Code.INPUT_MUTATED,
        used_after: Code.LAYER_OUTPUT_USED,
        used_before: Code.LAYER_OUTPUT_USED,
        changed_in_place: Code.LAYER_OUTPUT_USED,
        changed_through_view: Code.LAYER_OUTPUT_USED,
        two_norms: Code.LAYER_OUTPUT_USED,
        returned: Code.LAYER_OUTPUT_USED,
        other_grad_mode: Code.REGION,
        unbatched: Code.NOT_AFTER_LAYER,
        relu_then_norm: Code.NOT_AFTER_LAYER,
        norm_of_input: Code.NOT_AFTER_LAYER,
    }.items()
}


# In backward the layer's gradient needs what was written over, and PyTorch says so.
WRITTEN_OVER = (write_then_norm, write_weight_then_norm, used_after_write)


@pytest.mark.parametrize("name", AS_WRITTEN)
def test_runs_as_written(name):
    """Twice: in the first forward some uses come too late; the second knows of them."""
    forward, code = AS_WRITTEN[name]
    model, x = Fn(forward), torch.randn(2, 4, 6, 6)
    expected, gradients = run(model, x)
    turn_on(model)
    for _ in range(2):
        got, tune_gradients = run(model, x)
        assert code in codes(model)
        assert Code.FUSED not in codes(model)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)
        for n in gradients:
            torch.testing.assert_close(tune_gradients[n], gradients[n], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("forward", [*(f for f, _ in AS_WRITTEN.values()), *WRITTEN_OVER])
def test_without_gradient(forward):
    """Nothing would be saved anyway; every bit is eval mode's, whoever writes where."""
    model, x = Fn(forward).requires_grad_(False), torch.randn(2, 4, 6, 6)
    expected, _ = run(model, x)
    got, _ = run(turn_on(model), x)
    assert set(codes(model)) == {Code.NO_GRAD}
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("forward", WRITTEN_OVER)
def test_writes_are_errors_where_eval_has_them(forward):
    model, x = Fn(forward), torch.randn(2, 4, 6, 6)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            model(x).sum().backward()
        turn_on(model)


def unbatched_write(m, x):
    c = m.conv(x[0])
    with torch.no_grad():
        m.conv.weight.mul_(2)
    return c


@pytest.mark.parametrize("written", ["conv.weight", "bn.weight", "bn.running_var", "unbatched"])
def test_writes_to_what_gradients_need_though_all_is_frozen(written):
    """Saved-tensor hooks, which leave the input out, must not leave out autograd's check."""
    model = Fn(unbatched_write if written == "unbatched" else lambda m, x: m.bn(m.conv(x)))
    model.requires_grad_(written == "unbatched")
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    for _ in range(3):
        y = model(x)
        if written != "unbatched":
            model.state_dict()[written].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
        turn_on(model)


def bias_written(m, x):
    c = m.conv(x)
    with torch.no_grad():
        m.conv.bias.add_(1)
    return m.bn(c)


def weight_written(m, x):
    c = m.conv(x)
    with torch.no_grad():
        m.conv.weight.mul_(2)
    return m.bn(c)


def bias_frozen(m, x):
    c = m.conv(x)
    m.conv.bias.requires_grad_(False)
    return m.bn(c)


def input_frozen(m, x):
    c = m.conv(x)
    x.requires_grad_(False)
    return m.bn(c)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize(
    ("change", "linear"),
    [
        *itertools.product([bias_written, bias_frozen, input_frozen], [False, True]),
        (weight_written, True),  # after a convolution eval mode raises, too
    ],
)
def test_operands_changed_before_the_batch_norm(change, linear, hooked):
    conv, bn = (nn.Linear(4, 4), nn.BatchNorm1d(4)) if linear else (None, None)
    model = Fn(change, conv=conv, bn=bn)
    x = torch.randn(*((6, 4) if linear else (2, 4, 6, 6)))
    initial = copy.deepcopy(model.state_dict())
    hooks = torch.autograd.graph.save_on_cpu if hooked else contextlib.nullcontext

    def step():
        model.load_state_dict(initial)
        model.requires_grad_()
        for t in (x, *model.parameters()):
            t.grad = None
        x.requires_grad_(change is not weight_written)
        with hooks():
            y = model(x)
        x.requires_grad_(change is not weight_written)
        y.square().sum().backward()
        return [y.detach(), x.grad, *(p.grad for p in model.parameters())]

    expected = step()
    turn_on(model)
    for _ in range(2):
        torch.testing.assert_close(step(), expected, rtol=1e-4, atol=1e-4)
        # What hooks unpack requires a gradient as it did when it was packed.
        harmless = hooked and change is input_frozen
        assert codes(model) == [Code.FUSED if harmless else Code.INPUT_MUTATED]


@pytest.mark.parametrize("frozen", [False, True])
def test_where_hooks_are_not_allowed(frozen):
    model = Fn(lambda m, x: F.max_pool2d(F.relu(m.bn(m.conv(x))), 2)).requires_grad_(not frozen)
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    expected = run(model, x)
    turn_on(model)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        torch.testing.assert_close(run(model, x), expected)


def test_errors_are_evals():
    model, x = turn_on(Fn(lambda m, x: m.bn(m.conv(x)))), torch.randn(2, 4, 6, 6)
    out = model(x)
    with torch.no_grad():
        model.conv.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    with pytest.raises(RuntimeError, match="expected input"):
        model(torch.randn(2, 3, 6, 6))


def test_a_look_is_forgotten():
    """A use of the layer's output counts for the forward that it is in, and for the next."""
    looks = []

    def forward(m, x):
        c = m.conv(x)
        y = m.bn(c)
        if looks:
            looks.append(c.mean())
        return y

    model, x = turn_on(Fn(forward)), torch.randn(2, 4, 6, 6)
    seen = []
    for step in range(5):
        looks = [step] if step == 1 else []
        model(x)
        seen += codes(model)
    used = Code.LAYER_OUTPUT_USED
    assert seen == [Code.FUSED, used, used, Code.FUSED, Code.FUSED]


@pytest.mark.parametrize("source", ["from_numpy", "numpy", "frombuffer"])
def test_memory_that_others_may_write_to(source):
    """Their writes raise no version: after one, dgamma would not be eval mode's."""

    def forward(m, x):
        if source == "numpy":
            x = x * 1
        c = m.conv(x)
        array = array_of[0] if source != "numpy" else x.numpy()
        array[:] = 0
        return m.bn(c)

    model, array_of = Fn(forward), []

    def step():
        torch.manual_seed(0)
        x = torch.randn(2, 4, 6, 6)
        array = x.numpy().copy()
        array_of[:] = [array.reshape(-1) if source == "frombuffer" else array]
        if source == "from_numpy":
            x = torch.from_numpy(array)
        elif source == "frombuffer":
            x = torch.frombuffer(array, dtype=torch.float32).view(2, 4, 6, 6)
        return run(model, x)

    expected, gradients = step()
    turn_on(model)
    got, tune_gradients = step()
    assert codes(model) == [Code.INPUT_MUTATED]
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    torch.testing.assert_close(tune_gradients, gradients)


def test_statistics_that_require_a_gradient():
    """PyTorch has no such gradient, and says so."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
    model[1].running_mean.requires_grad_()
    turn_on(model)
    with pytest.raises(RuntimeError, match="not differentiable with respect to argument"):
        model(torch.randn(2, 3, 5, 5))


def test_validation_forgets_nothing():
    """A forward without gradients: of a layer's output that is stored, of a ReLU's that is not."""

    def forward(m, x):
        m.c = m.conv(x)
        return m.bn(m.c).relu() + 1

    def node_of_relu():
        return model(x).grad_fn.next_functions[0][0]

    model, x = turn_on(Fn(forward)), torch.randn(2, 4, 6, 6)
    assert "_BatchNorm" in str(node_of_relu().next_functions[0][0])
    with torch.no_grad():
        model(x)
    assert codes(model) == [Code.NO_GRAD]
    relu = node_of_relu()
    assert relu._saved_result.dtype == torch.uint8
    assert "_BatchNorm" not in str(relu.next_functions[0][0])
    assert codes(model) == [Code.LAYER_OUTPUT_USED]


def test_rows_of_half_of_a_linear_layers_channels():
    linear, norm = nn.Linear(4, 4), nn.BatchNorm1d(2)
    model, x = Fn(lambda m, x: m.bn(m.conv(x).view(-1, 2)), linear, norm), torch.randn(6, 4)
    expected = run(model, x)
    torch.testing.assert_close(run(turn_on(model), x), expected, rtol=0, atol=0)
    assert codes(model) == [Code.NOT_AFTER_LAYER]


def test_weight_of_a_subclass():
    class Weight(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))

    def forward(m, x):
        return m.bn(F.conv2d(x, m.conv.weight.as_subclass(Weight)))

    model, x = Fn(forward), torch.randn(2, 4, 6, 6)
    expected = run(model, x)
    torch.testing.assert_close(run(turn_on(model), x), expected, rtol=0, atol=0)
    assert codes(model) == [Code.UNSUPPORTED_TENSOR]
