"""Models in tune mode that are copied, wrapped, nested, compiled or exported."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from common import Residual, spread_statistics
from eager_helpers import Fn, codes, run
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from convbn_inductor_pass import Code, decisions, turn_off, turn_on


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
@pytest.mark.parametrize("where", ["around", "before", "inside", "in_place", "function"])
def test_under_compile(where, backend):
    """The interception steps aside: what is compiled is eval mode, for the pass to see."""
    model, x = nn.Sequential(Residual().stem, nn.BatchNorm2d(8), Residual()), None
    model[2].stem = nn.Conv2d(8, 8, 3)
    x = torch.randn(2, 3, 8, 8)
    spread_statistics(model).eval()
    expected, gradients = run(model, x)
    parameters = dict(model.named_parameters())
    call = torch.compile(model, backend=backend) if where == "before" else model
    turn_on(call)
    if where == "around":
        call = torch.compile(model, backend=backend)
    elif where == "inside":
        model[2] = torch.compile(model[2], backend=backend)
        turn_on(model)
    elif where == "in_place":
        model[2].compile(backend=backend)
    elif where == "function":
        model[2].forward = torch.compile(model[2].forward, backend=backend)
    for _ in range(2):
        got, tune_gradients = run(call, x, parameters=parameters)
        torch.testing.assert_close(got, expected)
        for n, g in gradients.items():
            torch.testing.assert_close(tune_gradients[n], g, rtol=1e-4, atol=1e-5)
    assert torch.overrides._get_current_function_mode() is None


def test_the_pass_sees_a_model_in_tune_mode_as_any_other():
    from convbn_inductor_pass import explain

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


@pytest.mark.parametrize("part", ["model", "submodule", "inside_another"])
def test_torchscript_says_what_to_do(part):
    model = turn_on(nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.ReLU()))
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    scripted = {"model": model, "submodule": model[0], "inside_another": nn.Sequential(model)}[part]
    with pytest.raises(AttributeError, match=r"call convbn_inductor_pass.turn_off\(model\) first"):
        torch.jit.script(scripted)
    turn_off(model)
    output = torch.jit.script(scripted)(x)
    assert output.shape == (expected if part != "submodule" else output).shape


def test_symbolic_trace():
    """Functions may get proxies in place of tensors."""

    def forward(m, x):
        c = F.conv2d(x, m.conv.weight)
        bn = m.bn
        return F.max_pool2d(F.batch_norm(c, bn.running_mean, bn.running_var, bn.weight), 2)

    model, x = nn.Sequential(Fn(forward)), torch.randn(2, 4, 8, 8)
    expected = model(x)
    assert torch.equal(torch.fx.symbolic_trace(turn_on(model))(x), expected)


def test_traced_by_torchscript():
    model, x = Residual(), torch.randn(2, 3, 8, 8)
    expected = model(x)
    traced = torch.jit.trace(turn_on(model), x)
    torch.testing.assert_close(traced(x), expected)
    assert "PythonOp" not in str(traced.inlined_graph)


def test_compiled_autograd_says_what_to_do():
    from torch._dynamo import compiled_autograd

    model, x = turn_on(Residual()), torch.randn(2, 3, 8, 8)
    loss = model(x).sum()
    with (
        compiled_autograd._enable(lambda graph: graph),
        pytest.raises(RuntimeError, match=r"turn_off\(model\)"),
    ):
        loss.backward()
    model(x).sum().backward()
