"""What must run as written: outputs used elsewhere, writes, regions; and the reason given."""

import pytest
import torch
import torch.nn.functional as F
from eager_helpers import Fn, codes, run

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


def other_autocast(m, x):
    c = m.conv(x)
    with torch.autocast("cpu", torch.bfloat16):
        return m.bn(c)


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
        write_then_norm: Code.INPUT_MUTATED,
        write_weight_then_norm: Code.INPUT_MUTATED,
        write_through_numpy: Code.INPUT_MUTATED,
        used_after: Code.LAYER_OUTPUT_USED,
        used_after_write: Code.INPUT_MUTATED,
        used_before: Code.LAYER_OUTPUT_USED,
        changed_in_place: Code.NOT_AFTER_LAYER,
        changed_through_view: Code.LAYER_OUTPUT_USED,
        two_norms: Code.LAYER_OUTPUT_USED,
        returned: Code.LAYER_OUTPUT_USED,
        other_autocast: Code.REGION,
        other_grad_mode: Code.REGION,
        unbatched: Code.NOT_AFTER_LAYER,
        relu_then_norm: Code.NOT_AFTER_LAYER,
        norm_of_input: Code.NOT_AFTER_LAYER,
    }.items()
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", AS_WRITTEN)
def test_runs_as_written(name, grad):
    """Twice: the first forward finds out, the second leaves the convolution alone."""
    torch.manual_seed(0)
    forward, code = AS_WRITTEN[name]
    model, x = Fn(forward), torch.randn(2, 4, 6, 6)
    model.requires_grad_(grad)
    if grad and forward in (write_then_norm, write_weight_then_norm, used_after_write):
        # The convolution's gradient needs what was written over, and backward says so.
        for _ in range(3):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                model(x).sum().backward()
            turn_on(model)
        return
    expected, gradients = run(model, x)
    turn_on(model)
    for repeat in range(2):
        got, tune_gradients = run(model, x)
        for a, b in zip(got, expected, strict=True):
            assert type(a) is torch.Tensor
            # A forward that was fused before the second use was seen is right, but rounded.
            exact = repeat == 1 or forward not in (
                used_after,
                used_after_write,
                two_norms,
                returned,
            )
            torch.testing.assert_close(a, b, **({"rtol": 0, "atol": 0} if exact else {}))
        for n in gradients:
            torch.testing.assert_close(tune_gradients[n], gradients[n], rtol=1e-4, atol=1e-5)
        assert Code.FUSED not in codes(model) or repeat == 0
    # The detour over, the reason is that the layer ran at once.
    assert code in codes(model) or Code.NOT_AFTER_LAYER in codes(model)


@pytest.mark.parametrize("name", AS_WRITTEN)
def test_reason_is_given(name):
    forward, code = AS_WRITTEN[name]
    model = turn_on(Fn(forward).requires_grad_(False))
    model(torch.randn(2, 4, 6, 6))
    assert code in codes(model)
    assert Code.FUSED not in codes(model)


def test_errors_are_evals():
    """Where eval mode's backward complains about a write, tune mode's does."""
    model, x = turn_on(Fn(write_then_norm)), torch.randn(2, 4, 6, 6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(x).sum().backward()
    model = turn_on(Fn(lambda m, x: m.bn(m.conv(x))))
    out = model(x)
    with torch.no_grad():
        model.conv.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    with pytest.raises(RuntimeError, match="expected input"):
        model(torch.randn(2, 3, 6, 6))
