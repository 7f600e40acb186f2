"""``turn_on``: the pairs it finds, what they compute and keep, what must run as written."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from common import LAYERS, ConvBN, Residual, channels, example_input, spread_statistics
from eager_models import MODELS, PaperM, conv_bn, make
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import convbn_inductor_pass
from bench.libraries import MissingLibrary, require
from convbn_inductor_pass import Code, decisions, explain, turn_off, turn_on
from convbn_inductor_pass.autograd import conv_bn_eval, linear_bn_eval
from convbn_inductor_pass.deferred import Deferred
from convbn_inductor_pass.folded import ConvBNFolded
from convbn_inductor_pass.testing import outputs_and_gradients


def saved_bytes(model, *inputs):
    """Bytes kept for backward, each storage once, parameters, buffers and inputs not at all."""
    alive = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    alive |= {t.untyped_storage().data_ptr() for t in inputs}
    kept = {}

    def pack(t):
        assert not isinstance(t, Deferred)
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(*inputs)
    assert out.requires_grad
    return sum(t.untyped_storage().nbytes() for p, t in kept.items() if p not in alive)


def codes(model):
    return [r.code for r in decisions(model)]


def run(model, *inputs):
    parameters = dict(model.named_parameters())
    return outputs_and_gradients(model, parameters, inputs)


def assert_like_eval(model, *inputs, fused, factor=2.0):
    """Outputs and gradients in tune mode are eval mode's within budgets from float64."""
    exact_out, exact = run(copy.deepcopy(model).double(), *[t.double() for t in inputs])
    eval_out, by_eval = run(model, *inputs)
    turn_on(model)
    tune_out, by_tune = run(model, *inputs)
    assert codes(model).count(Code.FUSED) == fused
    assert by_tune.keys() == by_eval.keys()

    def error(value, reference):
        return (value.double() - reference).abs().max() / reference.abs().max().clamp(min=1e-30)

    triples = [*zip(tune_out, eval_out, exact_out, strict=True)]
    triples += [(by_tune[n], by_eval[n], exact[n]) for n in exact]
    budget = factor * max(error(e, r) for _, e, r in triples) + 8 * torch.finfo(torch.float32).eps
    for tune, by, reference in triples:
        assert tune.dtype == by.dtype
        assert tune.stride() == by.stride()
        assert error(tune, reference) <= budget


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    model, x, pairs = make(name)
    assert explain(model, x).fused == pairs
    before = saved_bytes(model, x)
    state = {k: (v.data_ptr(), v.clone()) for k, v in model.state_dict().items()}
    assert_like_eval(model, x, fused=pairs)
    # What is saved is the convolutions' outputs, all of them and nothing but them.
    fused = [r for r in decisions(model) if r.code.fused]
    assert before - saved_bytes(model, x) == sum(r.output_bytes for r in fused)
    after = model.state_dict()
    assert list(after) == list(state)
    for key, (pointer, value) in state.items():
        assert after[key].data_ptr() == pointer
        assert torch.equal(after[key], value)


@pytest.mark.parametrize("name", [n for n in MODELS if n not in ("retina", "levit")])
def test_keeps_what_deploy_keeps(name):
    model, x, _ = make(name)
    deploy = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="unstable"):
        turn_on(deploy, "deploy", example_inputs=(x,))
    norms = [m for m in deploy.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == (1 if name == "densenet" else 0)
    assert saved_bytes(turn_on(model), x) == saved_bytes(deploy, x)


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    torch.manual_seed(0)
    model = ConvBN(LAYERS[name]())
    assert_like_eval(model, example_input(model.layer, requires_grad=True), fused=1)


@pytest.mark.parametrize("name", ["conv2d_grouped", "conv_transpose2d_grouped"])
def test_channels_last(name):
    torch.manual_seed(0)
    model = ConvBN(LAYERS[name]()).to(memory_format=torch.channels_last)
    x = example_input(model.layer).contiguous(memory_format=torch.channels_last)
    assert_like_eval(model, x, fused=1)


def test_layer_after_a_layer():
    """As in separable convolutions, in the first forward and under saved-tensor hooks."""
    x = torch.randn(2, 4, 6, 6)
    by_name = Fn(lambda m, x: m.bn(F.conv2d(weight=m.conv.weight, input=m.conv(x))))
    assert_like_eval(by_name, x, fused=1)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), *conv_bn(4, 6), *conv_bn(6, 6))
    assert_like_eval(spread_statistics(model).eval(), x, fused=2)
    assert saved_bytes(turn_off(model), x) > saved_bytes(turn_on(model), x)
    assert codes(model) == [Code.FUSED] * 2


def test_forward_is_one_convolution_and_no_batch_norm():
    model, x = turn_on(Residual()), torch.randn(2, 3, 8, 8)
    model(x)
    for _ in range(2):
        with torch.profiler.profile() as profile:
            model(x)
        names = [e.name for e in profile.events()]
        assert names.count("aten::convolution") == Residual.pairs
        assert names.count("aten::batch_norm") == 0


def fused_op(model):
    layer, bn = model.layer, model.bn

    def op(x, weight, bias, gamma, beta):
        tensors = (x, weight, bias, gamma, beta, bn.running_mean, bn.running_var, bn.eps)
        if isinstance(layer, nn.Linear):
            return linear_bn_eval(*tensors, function=ConvBNFolded)
        geometry = (layer.stride, layer.padding, layer.dilation)
        geometry += (layer.transposed, layer.output_padding, layer.groups)
        return conv_bn_eval(*tensors, *geometry, function=ConvBNFolded)

    return op


def leaves(model):
    given = (example_input(model.layer), model.layer.weight, model.layer.bias)
    given += (model.bn.weight, model.bn.bias)
    return [None if t is None else t.detach().double().requires_grad_() for t in given]


@pytest.mark.parametrize("name", LAYERS)
def test_gradcheck_and_gradgradcheck(name):
    torch.manual_seed(0)
    model = ConvBN(LAYERS[name]()).double()
    tensors = leaves(model)
    present = [t for t in tensors if t is not None]

    def call(*given):
        given = iter(given)
        return fused_op(model)(*[None if t is None else next(given) for t in tensors])

    assert torch.autograd.gradcheck(call, present, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, present, fast_mode=True)


def test_double_backward_through_a_model():
    model, x, _ = make("resnet")
    model, x = model.double(), x.double().requires_grad_()

    def penalty():
        (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), list(model.parameters()))

    expected = penalty()
    turn_on(model)
    for a, b in zip(penalty(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_op_under_functorch():
    torch.manual_seed(0)
    model = ConvBN(nn.Conv2d(4, 6, 3)).double()
    x, *rest = leaves(model)
    batch = torch.stack([x.detach(), 2 * x.detach()])
    op = fused_op(model)
    mapped = torch.vmap(lambda v: op(v, *rest))(batch)
    torch.testing.assert_close(mapped, torch.stack([op(v, *rest) for v in batch]))
    per_sample = torch.vmap(torch.func.grad(lambda v: op(v, *rest).square().sum()))(batch)
    for got, v in zip(per_sample, batch, strict=True):
        v.requires_grad_()
        torch.testing.assert_close(got, torch.autograd.grad(op(v, *rest).square().sum(), v)[0])
    with pytest.raises(RuntimeError, match=r"jvp|forward mode AD"):
        torch.func.jvp(lambda v: op(v, *rest), (x,), (x,))


def test_model_under_functorch():
    model, x, _ = make("resnet")
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def loss(p, v):
        return torch.func.functional_call(model, p, (v[None],)).square().sum()

    def everything():
        grads = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        _, tangent = torch.func.jvp(lambda v: loss(parameters, v), (x[0],), (x[1],))
        return [*grads.values(), tangent]

    expected = everything()
    turn_on(model)
    model(x)
    for a, b in zip(everything(), expected, strict=True):
        assert torch.equal(a, b)
    assert torch.func.functional_call(model, parameters, (x,)).shape == model(x).shape


def test_training_steps_equal_evals():
    eval_model = Residual().double()
    tune_model = turn_on(copy.deepcopy(eval_model))
    losses = []
    for model in (eval_model, tune_model):
        torch.manual_seed(0)
        x, target = torch.randn(8, 3, 8, 8).double(), torch.randint(5, (8,))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        losses.append([])
        for _ in range(10):
            loss = F.cross_entropy(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < 0.8 * losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    for a, b in zip(eval_model.parameters(), tune_model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def freeze(model, what):
    for name, p in model.named_parameters():
        is_norm = "bn" in name
        p.requires_grad_(not {"norms": is_norm, "layers": not is_norm, "all": True}[what])


@pytest.mark.parametrize("what", ["norms", "layers", "all"])
def test_frozen_subsets(what):
    model = Residual()
    freeze(model, what)
    x = torch.randn(2, 3, 8, 8, requires_grad=what == "all")
    # With frozen layers, the batch norm weight's gradient would cost a convolution: as written.
    assert_like_eval(model, x, fused=0 if what == "layers" else Residual.pairs)
    if what == "layers":
        assert set(codes(model)) == {Code.LAYER_FROZEN}
        with convbn_inductor_pass.options(fuse_frozen_layers=True):
            assert_like_eval(turn_off(model), x, fused=Residual.pairs)


def test_unfrozen_later():
    """As schedules of fine-tuning do; what was seen before does not count."""
    model, x = turn_on(Residual()), torch.randn(2, 3, 8, 8)
    freeze(model, "layers")
    for _ in range(2):
        model(x)
        assert set(codes(model)) == {Code.LAYER_FROZEN}
    model.requires_grad_(True)
    model(x)
    assert codes(model) == [Code.FUSED] * Residual.pairs
    for norm in model.bns:
        norm.train()
    for _ in range(2):
        model(x)
        assert codes(model).count(Code.BATCH_STATISTICS) == len(model.bns)
    model.eval()
    model(x)
    assert codes(model) == [Code.FUSED] * Residual.pairs


def test_stem_frozen():
    model = Residual()
    for p in [*model.stem.parameters(), *model.stem_bn.parameters()]:
        p.requires_grad_(False)
    assert_like_eval(model, torch.randn(2, 3, 8, 8), fused=Residual.pairs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model, x = Residual(), torch.randn(2, 3, 8, 8)
    _, exact = run(copy.deepcopy(model).double(), x.double())
    with torch.autocast("cpu", dtype):
        (eval_out,), by_eval = run(model, x)
        turn_on(model)
        (tune_out,), by_tune = run(model, x)
    assert codes(model) == [Code.FUSED] * Residual.pairs
    assert tune_out.dtype == eval_out.dtype

    def worst(gradients):
        return max((g - exact[n]).abs().max() / exact[n].abs().max() for n, g in gradients.items())

    assert worst(by_tune) <= 2 * worst(by_eval) + torch.finfo(dtype).eps
    assert all(g.dtype == torch.float32 for g in by_tune.values())


def test_half_precision_layer_before_single_precision_norm():
    model = ConvBN(nn.Conv2d(4, 6, 3))
    model.layer.bfloat16()
    x = example_input(model.layer).bfloat16()
    expected, by_eval = run(model, x)
    got, by_tune = run(turn_on(model), x)
    assert codes(model) == [Code.FUSED]
    assert got[0].dtype == expected[0].dtype == torch.bfloat16
    torch.testing.assert_close(got[0], expected[0], rtol=2e-2, atol=2e-2)
    assert {n: g.dtype for n, g in by_tune.items()} == {n: g.dtype for n, g in by_eval.items()}


# --- What must run as written ---------------------------------------------------------------


class Fn(nn.Module):
    """A conv, a batch norm, and a forward given as a function of them and the input."""

    def __init__(self, forward, conv=None, bn=None):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1) if conv is None else conv
        self.bn = nn.BatchNorm2d(4) if bn is None else bn
        self.function = forward
        spread_statistics(self).eval()

    def forward(self, x):
        return self.function(self, x)


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


def test_norm_back_in_training_mode():
    model, x = Fn(lambda m, x: m.bn(m.conv(x))), torch.randn(2, 4, 6, 6)
    turn_on(model)
    model(x)
    expected = copy.deepcopy(turn_off(copy.deepcopy(model))).train()(x)
    model.train()
    mean = model.bn.running_mean.clone()
    assert torch.equal(model(x), expected)
    assert codes(model) == [Code.BATCH_STATISTICS]
    assert not torch.equal(model.bn.running_mean, mean)
    turn_on(model)
    model(x)
    assert codes(model) == [Code.FUSED]


def test_norm_without_running_statistics():
    model = turn_on(
        Fn(lambda m, x: m.bn(m.conv(x)), bn=nn.BatchNorm2d(4, track_running_stats=False))
    )
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(model(x), model.bn(model.conv(x)))
    assert codes(model)[0] in (Code.BATCH_STATISTICS, Code.NO_RUNNING_STATISTICS)


def test_norm_told_later_not_to_track_statistics():
    """It still has some, and uses them in eval mode."""
    model, x = Fn(lambda m, x: m.bn(m.conv(x))), torch.randn(2, 4, 6, 6)
    model.bn.track_running_stats = False
    assert_like_eval(model, x, fused=1)


# --- What must not get in the way -----------------------------------------------------------


class WritesInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x.mul_(2)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy


class Doubles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return 2 * x * dy


@pytest.mark.parametrize("function", [WritesInPlace, Doubles])
@pytest.mark.parametrize("where", ["before_norm", "after_layer", "after_itself"])
def test_custom_autograd_function(function, where):
    """They take tensors without telling __torch_function__; no gradient may be lost."""

    def forward(m, x):
        c = m.conv(x)
        if where == "before_norm":
            return m.bn(function.apply(c))
        c = m.conv(c if where == "after_layer" else m.bn(c).relu())  # its input needs its weight
        return function.apply(c) * m.bn(m.conv(x))

    def twice(m, x):
        leaves = list(m.parameters())
        first = torch.autograd.grad(m(x).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    model, x = Fn(forward).double(), torch.randn(2, 4, 6, 6).double()
    expected, gradients = run(model, x)
    second = twice(model, x)
    turn_on(model)
    # Twice first: in a second forward the layer would run at once.
    torch.testing.assert_close(twice(model, x), second, rtol=1e-9, atol=1e-9)
    got, tune_gradients = run(turn_on(model), x)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert tune_gradients.keys() == gradients.keys()
    for n, g in gradients.items():
        torch.testing.assert_close(tune_gradients[n], g, rtol=1e-9, atol=1e-9)


def test_write_in_an_autograd_function():
    def forward(m, x):
        x = x * 1
        c = m.conv(x)
        WritesInPlace.apply(x)
        return m.bn(c)

    model, x = Fn(forward).requires_grad_(False), torch.randn(2, 4, 6, 6)
    expected = model(x)
    assert torch.equal(turn_on(model)(x), expected)


def test_write_that_torch_does_not_show():
    """What an extension writes cannot be foreseen; it must not go unnoticed."""

    def forward(m, x):
        x = x * 1
        c = m.conv(x)
        with torch._C.DisableTorchFunction():
            x.mul_(2)
        return m.bn(c)

    model = turn_on(Fn(forward))
    with torch.no_grad(), pytest.raises(RuntimeError, match="modified in place"):
        model(torch.randn(2, 4, 6, 6))
    assert torch.conv2d(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1)).sum() == 4


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("how", ["module", "closure", "part", "norm_only"])
def test_checkpoint(reentrant, how):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = conv_bn(4, 4, 3)
            self.conv, self.tail = nn.Conv2d(4, 4, 3), conv_bn(4, 4)
            self.norm = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())

        def forward(self, x):
            def closure(y):
                return F.relu(self.block[1](self.block[0](y)))

            if how == "part":
                x = self.block[2](
                    self.block[1](checkpoint(self.block[0], x, use_reentrant=reentrant))
                )
            else:
                block = self.block if how == "module" else closure
                x = checkpoint(block, x, use_reentrant=reentrant)
            x = self.conv(x)
            if how == "norm_only":
                x = checkpoint(self.norm, x, use_reentrant=reentrant)
            else:
                x = self.norm(x)
            return self.tail(x)

    model = spread_statistics(Model()).eval()
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    expected, gradients = run(model, x)
    turn_on(model)
    for _ in range(2):
        got, tune_gradients = run(model, x)
        torch.testing.assert_close(got, expected)
        for n, g in gradients.items():
            torch.testing.assert_close(tune_gradients[n], g, rtol=1e-4, atol=1e-4)
    assert codes(model).count(Code.FUSED) >= (1 if how == "norm_only" else 2)


def test_hooks_see_tensors_and_gradients():
    model, x = Residual(), torch.randn(2, 3, 8, 8)
    kept = {}

    def keep(module, args, output):
        output.retain_grad()
        kept["conv"] = output
        output.register_hook(lambda g: kept.update(grad=g))

    def observe():
        kept.clear()
        model(x).sum().backward()
        return kept["conv"].detach().clone(), kept["conv"].grad, kept["grad"]

    model.convs[1].register_forward_hook(keep)
    model.bns[0].register_forward_hook(lambda m, a, out: out * 2)
    expected = observe()
    turn_on(model)
    for _ in range(2):
        for a, b in zip(observe(), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert codes(model).count(Code.FUSED) == Residual.pairs - 1


@pytest.mark.parametrize("kind", ["pre", "forward", "reads", "backward_pre", "backward"])
def test_hooks_of_a_batch_norm(kind):
    """What they change counts, and what they are shown is what eval mode shows them."""
    model, x = Fn(lambda m, x: m.bn(m.conv(x)).relu()), torch.randn(2, 4, 6, 6)
    bn, seen = model.bn, []

    def reads(module, args, output):
        seen.extend((args[0].mean(), output.mean()))

    def backward(module, into, outof):
        seen.append(outof[0].sum())
        return tuple(None if g is None else 3 * g for g in into)

    register = {
        "pre": lambda: bn.register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
        "forward": lambda: bn.register_forward_hook(lambda m, args, output: output + 1),
        "reads": lambda: bn.register_forward_hook(reads),
        "backward_pre": lambda: bn.register_full_backward_pre_hook(lambda m, g: (g[0] * 2,)),
        "backward": lambda: bn.register_full_backward_hook(backward),
    }
    register[kind]()
    expected, gradients = run(model, x)
    shown = len(seen)
    turn_on(model)
    for _ in range(2):
        got, tune_gradients = run(model, x)
        torch.testing.assert_close(got, expected)
        for n, g in gradients.items():
            torch.testing.assert_close(tune_gradients[n], g, rtol=1e-4, atol=1e-4)
    assert len(seen) == 3 * shown
    for i, value in enumerate(seen):
        torch.testing.assert_close(value + 0, seen[i % shown])
    assert codes(model).count(Code.FUSED) == (1 if kind == "forward" else 0)


def test_feature_extractor_that_keeps_a_convolution_output():
    model, x = Residual(), torch.randn(2, 3, 8, 8)
    kept = []
    model.stem.register_forward_hook(lambda m, a, out: kept.append(out))
    model(x)
    turn_on(model)
    for _ in range(2):
        model(x)
    with torch.no_grad():
        model.stem.weight.zero_()  # too late for what was computed before
    for c in kept[1:]:
        assert torch.equal(c + 0, kept[0])
    torch.save(kept, io.BytesIO())


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "subclass"])
def test_computed_weights(kind):
    class Standardised(nn.Conv2d):
        def forward(self, x):
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return F.conv2d(x, weight, self.bias, self.stride, self.padding)

    conv = {
        "weight_norm": lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
        "spectral_norm": lambda: parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)),
        "subclass": lambda: Standardised(4, 4, 3),
    }[kind]()
    model = Fn(lambda m, x: m.bn(m.conv(x)).relu(), conv=conv)
    assert_like_eval(model, torch.randn(2, 4, 6, 6), fused=1)


def test_functional_calls_and_control_flow():
    def forward(m, x):
        for _ in range(int(x.abs().max() > 100) + 2):
            x = torch.conv2d(x, m.conv.weight, stride=(1, 1), padding="same")
            x = F.batch_norm(x, m.bn.running_mean, m.bn.running_var, eps=1e-3, bias=m.bn.bias)
        return x

    model = Fn(forward)
    assert_like_eval(model, torch.randn(2, 4, 6, 6), fused=2)
    assert_like_eval(turn_off(model), 1000 * torch.randn(2, 4, 6, 6), fused=3)


def test_interrupt_leaves_nothing_behind():
    stop = [KeyboardInterrupt]

    def forward(m, x):
        c = m.conv(x)
        if stop:
            raise stop.pop()
        return m.bn(c)

    model, x = Fn(forward), torch.randn(2, 4, 6, 6)
    turn_on(model)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    assert type(F.conv2d(x, model.conv.weight)) is torch.Tensor
    model(x)
    assert codes(model) == [Code.FUSED]
    stop.append(ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        model(x)
    assert torch.overrides._get_current_function_mode() is None
    assert type(model.conv(x)) is torch.Tensor


def test_modules_called_on_their_own():
    model, x = turn_on(Residual()), torch.randn(2, 3, 8, 8)
    c = model.stem(x)
    assert type(c) is torch.Tensor
    assert torch.equal(model.stem_bn(c), turn_off(copy.deepcopy(model)).stem_bn(c))


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "save"])
def test_copies_keep_the_mode_and_not_the_original(copier):
    model, x = turn_on(Residual()), torch.randn(2, 3, 8, 8)
    expected = model(x)
    if copier == "deepcopy":
        other = copy.deepcopy(model)
    elif copier == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    del model
    assert decisions(other) == ()
    assert torch.equal(other(x), expected)
    assert codes(other) == [Code.FUSED] * Residual.pairs
    other(x).sum().backward()
    turn_off(other)(x)
    assert decisions(other) == ()


def test_two_models_one_after_the_other_inside_the_other():
    teacher, student = Residual(), Residual()
    outer = nn.Module()
    outer.teacher, outer.student = turn_on(teacher), student
    outer.forward = lambda x: student(x) - teacher(x)
    turn_on(outer)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(outer(x), turn_off(copy.deepcopy(student))(x) - teacher(x))
    turn_off(outer)
    turn_off(teacher)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in outer.modules())


def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model, x = Residual(), torch.randn(2, 3, 8, 8)
        _, gradients = run(model, x)
        ddp = nn.parallel.DistributedDataParallel(turn_on(model))
        _, tune_gradients = run(ddp, x)
        assert codes(model) == [Code.FUSED] * Residual.pairs
        for n, g in gradients.items():
            torch.testing.assert_close(tune_gradients[f"module.{n}"], g, rtol=1e-4, atol=1e-5)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("where", ["around", "inside", "in_place", "function"])
def test_under_compile(where, backend):
    """The interception steps aside: what is compiled is eval mode, for the pass to see."""
    model, x = nn.Sequential(Residual().stem, nn.BatchNorm2d(8), Residual()), None
    model[2].stem = nn.Conv2d(8, 8, 3)
    x = torch.randn(2, 3, 8, 8)
    spread_statistics(model).eval()
    expected, gradients = run(model, x)
    parameters = dict(model.named_parameters())
    turn_on(model)
    call = model
    if where == "around":
        call = torch.compile(model, backend=backend)
    elif where == "inside":
        model[2] = torch.compile(model[2], backend=backend)
        turn_on(model)
    elif where == "in_place":
        model[2].compile(backend=backend)
    else:
        model[2].forward = torch.compile(model[2].forward, backend=backend)
    for _ in range(2):
        got, tune_gradients = outputs_and_gradients(call, parameters, (x,))
        torch.testing.assert_close(got, expected)
        for n, g in gradients.items():
            torch.testing.assert_close(tune_gradients[n], g, rtol=1e-4, atol=1e-5)
    assert torch.overrides._get_current_function_mode() is None


def test_the_pass_sees_a_model_in_tune_mode_as_any_other():
    model, x = Residual(), torch.randn(2, 3, 8, 8)
    plain = explain(model, x)
    tuned = explain(turn_on(model), x)
    assert [r.to_dict() for r in tuned.records] == [r.to_dict() for r in plain.records]
    assert tuned.saved_bytes == plain.saved_bytes
    assert tuned.graphs == 1


def test_export_and_flop_counter():
    model, x = Residual(), torch.randn(2, 3, 8, 8)
    expected = model(x)
    turn_on(model)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), expected)
    with FlopCounterMode(display=False) as tuned:
        model(x)
    with FlopCounterMode(display=False) as plain:
        turn_off(model)(x)
    assert tuned.get_total_flops() == plain.get_total_flops()


# --- The interface ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval", "tune", "deploy"])
def test_turn_off_restores_everything(mode):
    model, x = Residual(), torch.randn(2, 3, 8, 8)
    model.bns[0].train()
    flags = {n: m.training for n, m in model.named_modules()}
    tensors = dict(model.named_parameters())
    names = list(model.state_dict())
    expected = copy.deepcopy(model)(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        turn_on(model, mode)
    if mode != "train":
        model(x)
    assert turn_off(model) is model
    assert {n: m.training for n, m in model.named_modules()} == flags
    assert list(model.state_dict()) == names
    assert all(p is tensors[n] for n, p in model.named_parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert "_convbn_mode" not in vars(model)
    assert torch.equal(model(x), expected)


def test_modes_set_the_batch_norms_only():
    model = Residual()
    turn_on(model, "train")
    assert all(m.training for m in model.bns)
    assert not model.training
    turn_off(model).train()
    turn_on(model, "eval")
    assert not any(m.training for m in model.bns)
    assert model.training
    turn_off(model)
    assert all(m.training for m in model.bns)


def test_restricted_to_modules():
    model = nn.ModuleDict({"backbone": Residual(), "neck": conv_bn(5, 4)}).eval()
    model.forward = lambda x: model["neck"](model["backbone"](x)[:, :, None, None])
    model.train()
    turn_on(model, modules=["backbone"])
    assert not model["backbone"].stem_bn.training
    assert model["neck"][1].training
    model(torch.randn(4, 3, 8, 8))
    assert codes(model) == [Code.FUSED] * Residual.pairs
    assert not model["neck"]._forward_hooks


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mode": "tuned"}, "must be one of 'train', 'eval', 'tune', 'deploy', got 'tuned'"),
        ({"modules": ["backbon"]}, "no module at 'backbon'.*the first parts here are: 'stem'"),
        ({"modules": "stem"}, r"such as \['stem'\]"),
        ({"modules": []}, "no module at"),
        ({"modules": ["relu"]}, "nothing to pair in 'relu'"),
        ({"example_inputs": ()}, "example_inputs are for mode 'deploy'"),
    ],
)
@pytest.mark.parametrize("before", [None, "tune"])
def test_wrong_arguments_change_nothing(kwargs, message, before):
    model = Residual().train()
    if before:
        turn_on(model, before)
    flags = [m.training for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        turn_on(model, **kwargs)
    assert [m.training for m in model.modules()] == flags
    assert bool(model._forward_hooks) == (before is not None)


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Linear(2, 2), nn.BatchNorm2d(3)])
def test_nothing_to_pair(model):
    with pytest.raises(ValueError, match="nothing to pair in the model"):
        turn_on(model)
    assert turn_off(model) is model


def test_deploy():
    model, x, _ = make("unet")
    expected = model(x)
    before = dict(model.named_parameters())
    with pytest.warns(UserWarning, match="mode='tune' to train"):
        turn_on(model, "deploy")
    first = model(x)  # finds the pairs
    torch.testing.assert_close(first, expected)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    merged = dict(model.named_parameters())
    assert merged.keys() == {n for n in before if ".1." not in n and "up_bn" not in n} | {
        n.replace("weight", "bias") for n in before if ".0." in n
    }
    torch.testing.assert_close(model(x), expected)
    model(x).sum().backward()
    assert all(p.grad is not None for p in merged.values())
    other = pickle.loads(pickle.dumps(model))
    for m in (model, other):
        turn_off(m)
        assert torch.equal(m(x), expected)
    assert all(p is before[n] for n, p in model.named_parameters())


def test_deploy_leaves_what_it_cannot_merge():
    model, x, _ = make("retina")  # one convolution, several batch norms
    expected = model(x)
    with pytest.warns(UserWarning, match="unstable"):
        turn_on(model, "deploy", example_inputs=(x,))
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 6
    assert torch.equal(model(x), expected)


def deployed(model, x):
    with pytest.warns(UserWarning, match="unstable"):
        return turn_on(model, "deploy", example_inputs=(x,))


@pytest.mark.parametrize("other", ["norm", "layer"])
def test_deploy_leaves_modules_whose_tensors_are_used(other):
    """A functional call would not see that its module was replaced."""

    def forward(m, x):
        if other == "norm":
            bn = m.bn
            return F.batch_norm(m.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias)
        return m.bn(F.conv2d(x, m.conv.weight, m.conv.bias))

    model, x = Fn(forward), torch.randn(2, 4, 6, 6)
    expected = model(x)
    assert torch.equal(deployed(model, x)(x), expected)


def test_deploy_merges_a_pair_that_is_used_often():
    """A head with its batch norms on several levels, and one use too many."""

    def forward(m, x):
        return m.bn(m.conv(x)) + m.bn(m.conv(x[:, :, ::2, ::2])).mean((2, 3), keepdim=True)

    x = torch.randn(2, 4, 6, 6)
    model, other = Fn(forward), Fn(lambda m, x: forward(m, x) + m.conv(x))
    for m in (model, other):
        expected = m(x)
        torch.testing.assert_close(deployed(m, x)(x), expected)
    tune = turn_on(turn_off(copy.deepcopy(model)))
    assert saved_bytes(tune, x) == saved_bytes(model, x)
    assert not isinstance(model.bn, nn.BatchNorm2d)
    assert isinstance(other.bn, nn.BatchNorm2d)


def test_deploy_leaves_no_trace_of_its_example():
    model = PaperM().train()
    x = torch.randn(2, 3, 12, 12)
    statistics = model.bn1.running_mean.clone()
    norm = model.bn1
    with pytest.warns(UserWarning, match="unstable"):
        turn_on(model, "deploy", example_inputs=(x,))
    assert torch.equal(norm.running_mean, statistics)
    assert model.training
    assert not isinstance(model.bn1, nn.BatchNorm2d)


OTHERS = {
    "torchvision.models": ("resnet18", "regnet_y_400mf", "mobilenet_v3_small"),
    "timm": ("resnet18", "efficientnet_b0"),
}


@pytest.mark.parametrize(
    ("library", "name"), [(k, n) for k, names in OTHERS.items() for n in names]
)
def test_models_of_other_packages(library, name):
    try:
        build = getattr(require(library), "get_model" if "vision" in library else "create_model")
    except MissingLibrary as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    model, x = spread_statistics(build(name)).eval(), torch.randn(1, 3, 64, 64)
    wanted = explain(model, x).fused
    before, deploy = saved_bytes(model, x), copy.deepcopy(model)
    turn_on(model)
    after = saved_bytes(model, x)
    fused = [r for r in decisions(model) if r.code.fused]
    assert len(fused) == wanted
    assert before - after == sum(r.output_bytes for r in fused)
    with pytest.warns(UserWarning, match="unstable"):
        turn_on(deploy, "deploy", example_inputs=(x,))
    assert after == saved_bytes(deploy, x)
    torch.testing.assert_close(deploy(x), model(x))


def test_linear_layer_of_more_rows():
    model = Fn(
        lambda m, x: m.bn(m.conv(x)), conv=nn.Linear(4, 5), bn=nn.BatchNorm1d(3)
    )  # dimension 1 is not the layer's channels
    x = torch.randn(2, 3, 4)
    expected = model(x)
    assert torch.equal(turn_on(model)(x), expected)
    assert codes(model) == [Code.UNBATCHED]


def test_empty_batch():
    model = turn_on(Residual())
    y = model(torch.randn(0, 3, 8, 8))
    y.sum().backward()
    assert y.shape == (0, 5)
    assert not model.stem.weight.grad.any()


def test_channels_of_a_deferred_output():
    """Asking for the shape is no use of the output."""

    def forward(m, x):
        c = m.conv(x)
        assert c.shape == (2, 4, 6, 6)
        assert (c.dim(), c.size(1), c.ndim, c.dtype) == (4, 4, 4, torch.float32)
        assert isinstance(c, torch.Tensor)
        assert c.requires_grad
        return m.bn(c)

    model = turn_on(Fn(forward))
    model(torch.randn(2, 4, 6, 6))
    assert codes(model) == [Code.FUSED]
    assert channels(model.conv) == 4


def test_meta_device():
    """It knows no autocast, and raises when asked for it."""
    model = turn_on(Residual().to("meta"))
    assert model(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 5)
    assert codes(model) == [Code.FUSED] * Residual.pairs
