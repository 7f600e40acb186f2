"""The interface: modes, arguments, errors, and that ``turn_off`` restores everything."""

import copy
import warnings

import pytest
import torch
from common import Residual
from eager_helpers import codes
from eager_models import conv_bn
from torch import nn

from convbn_inductor_pass import Code, decisions, freeze_batch_norms, turn_off, turn_on


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval", "tune", "deploy"])
def test_turn_off_restores_everything(mode, wrapped):
    model, x = Residual(), torch.randn(2, 3, 8, 8)
    model.bns[0].train()
    flags = {n: m.training for n, m in model.named_modules()}
    tensors = dict(model.named_parameters())
    names = list(model.state_dict())
    expected = copy.deepcopy(model)(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Its wrapper and the model are turned on and off alike.
        given = torch.compile(model, backend="eager") if wrapped else model
        assert turn_on(given, mode) is given
    if mode != "train":
        model(x)
    assert turn_off(model) is model
    assert turn_off(turn_on(given, "tune")) is given
    assert {n: m.training for n, m in model.named_modules()} == flags
    assert list(model.state_dict()) == names
    assert all(p is tensors[n] for n, p in model.named_parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert "_convbn_mode" not in vars(model)
    assert torch.equal(model(x), expected)


def test_names_of_a_compiled_model_are_the_models():
    model = Residual()
    compiled = torch.compile(model, backend="eager")
    turn_on(compiled)
    model(torch.randn(2, 3, 8, 8))
    found = decisions(compiled)
    assert found == decisions(model)
    assert {r.batch_norm for r in found} <= {n for n, _ in model.named_modules()}
    # They have no source line, and do not print one.
    assert not any(str(r).endswith(("()", " ")) for r in found)


@pytest.mark.parametrize("mode", ["tune", "deploy"])
def test_a_module_whose_parameters_takes_no_arguments(mode):
    class Own(nn.Sequential):
        def parameters(self):
            return super().parameters()

    model, x = (
        nn.Sequential(Own(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).eval(),
        torch.randn(2, 3, 4, 4),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        turn_on(model, mode, example_inputs=(x,) if mode == "deploy" else None)
    model(x)
    expected = Code.FUSED if mode == "tune" else Code.MERGED
    assert [(r.batch_norm, r.code) for r in decisions(model)] == [("0.1", expected)]


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
        ({"modules": ["backbon"]}, "no module at 'backbon'.*the top-level ones here are: 'stem'"),
        ({"modules": "stem"}, r"such as \['stem'\]"),
        ({"modules": []}, "no module at"),
        ({"modules": ["relu"]}, "nothing to pair in 'relu'"),
        ({"modules": [nn.ReLU()]}, "no module at a ReLU; they are given by path"),
        ({"example_inputs": ()}, "example_inputs are for mode 'deploy'"),
        ({"mode": "deploy", "example_inputs": torch.ones(2)}, "such as .batch,., got a Tensor"),
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


@pytest.mark.parametrize("before", [None, "tune"])
def test_inputs_that_do_not_fit_change_nothing(before):
    model = Residual().train()
    if before:
        turn_on(model, before)
    flags = [m.training for m in model.modules()]
    with pytest.raises(RuntimeError, match="to have 3 channels"):
        turn_on(model, "deploy", example_inputs=(torch.ones(2, 2, 8, 8),))
    assert [m.training for m in model.modules()] == flags
    assert bool(model._forward_hooks) == (before is not None)


def test_what_cannot_be_turned_on():
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got 3"):
        turn_on(3)
    model = freeze_batch_norms(Residual().train())
    with pytest.raises(ValueError, match="frozen: call unfreeze_batch_norms"):
        turn_on(model, "train")
    assert not turn_on(model).stem_bn.training


def test_modules_that_nothing_calls():
    """A ModuleList is not called; what uses it is outside of ``modules``."""
    pair = [nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)]
    model = nn.Sequential(nn.ModuleList(pair), nn.ModuleList([nn.Sequential(*pair)])).train()
    with pytest.raises(ValueError, match="no module in '0' calls a batch norm, as a ModuleList"):
        turn_on(model, modules=["0", "1"])
    assert pair[1].training
    turn_on(model, modules=["1"])
    turn_on(model, "eval", modules=["0"])
    assert not pair[1].training


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Linear(2, 2), nn.BatchNorm2d(3)])
def test_nothing_to_pair(model):
    with pytest.raises(ValueError, match="nothing to pair in the model"):
        turn_on(model)
    assert turn_off(model) is model
