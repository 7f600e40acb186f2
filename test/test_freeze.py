"""``freeze_batch_norms``: eval mode that outlasts ``model.train()``, in copies and wrappers too."""

import copy
import io
import pickle

import pytest
import torch
from common import Residual, spread_statistics
from joint_graphs import recording_backend
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

from bench.libraries import MissingLibrary, require
from convbn_inductor_pass import freeze_batch_norms, unfreeze_batch_norms


def small():
    """Batch norms on two levels, dropout, and a module that tells its mode."""
    block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
    return spread_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), block))


def in_training_mode(model):
    """Paths of the batch norms that normalize with the batch's statistics."""
    return [n for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.training]


@pytest.fixture(name="process_group")
def _process_group():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_train_leaves_batch_norms_in_eval_mode_and_nothing_else():
    model = small()
    assert freeze_batch_norms(model) is model
    assert in_training_mode(model) == []
    assert model.train() is model
    others = [m for m in model.modules() if not isinstance(m, _BatchNorm)]
    assert in_training_mode(model) == []
    assert all(m.training for m in others)
    model.eval()
    assert not any(m.training for m in model.modules())


def test_statistics_stay_and_parameters_train():
    model = freeze_batch_norms(small()).train()
    before = {n: b.clone() for n, b in model.named_buffers()}
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    torch.testing.assert_close(dict(model.named_buffers()), before, rtol=0, atol=0)
    assert all(p.grad is not None for p in model.parameters())


def test_unfreeze():
    model = freeze_batch_norms(small()).train()
    state = {n: sorted(m.__dict__) for n, m in small().named_modules()}
    assert unfreeze_batch_norms(model) is model
    assert in_training_mode(model) == ["1", "3.1"]  # as the model is
    assert {n: sorted(m.__dict__) for n, m in model.named_modules()} == state
    assert in_training_mode(unfreeze_batch_norms(freeze_batch_norms(model.eval()))) == []
    assert in_training_mode(model.train()) == ["1", "3.1"]


@pytest.mark.parametrize(
    ("modules", "left"),
    [
        (lambda m: ["1"], ["3.1"]),
        (lambda m: ["3"], ["1"]),
        (lambda m: ["3.*"], ["1"]),
        (lambda m: ["*"], []),
        (lambda m: [m[1]], ["3.1"]),
        (lambda m: (m[3], "1"), []),
        (lambda m: (module for module in [m[3]]), ["1"]),
    ],
)
def test_modules(modules, left):
    model = small()
    freeze_batch_norms(model, modules(model))
    assert in_training_mode(model.train()) == left
    freeze_batch_norms(model)
    assert in_training_mode(model.train()) == []


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ("3", "modules must be a list such as ['backbone'], got '3'"),
        (7, "modules must be a list such as ['backbone'], got 7"),
        ([], "modules is empty: leave it out for all batch norms"),
        (["1", "4"], "no batch norm in '4'; the model has: 1, 3.1, ..."),
        (["0"], "no batch norm in '0'; the model has: 1, 3.1, ..."),
        ([nn.BatchNorm2d(4)], "no batch norm in a BatchNorm2d; the model has: 1, 3.1, ..."),
    ],
)
def test_bad_modules_are_told_and_change_nothing(modules, message):
    model = small()
    with pytest.raises(ValueError) as error:  # noqa: PT011
        freeze_batch_norms(model, modules)
    assert str(error.value) == message
    assert in_training_mode(model) == ["1", "3.1"]
    assert not any("train" in m.__dict__ for m in model.modules())


def test_bad_models_are_told():
    with pytest.raises(TypeError, match=r"^model must be an nn.Module, got <class '.*Conv2d'>$"):
        freeze_batch_norms(nn.Conv2d)
    with pytest.raises(TypeError, match=r"^model must be an nn.Module, got None$"):
        unfreeze_batch_norms(None)
    with pytest.raises(ValueError, match=r"^there is no batch norm in this Conv2d$"):
        freeze_batch_norms(nn.Conv2d(3, 4, 3))


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_all_kinds(kind):
    assert in_training_mode(freeze_batch_norms(nn.Sequential(kind(4))).train()) == []


def test_a_batch_norm_with_modules_inside():
    class WithDropout(nn.BatchNorm2d):
        def __init__(self):
            super().__init__(4)
            self.drop = nn.Dropout()

    norm = freeze_batch_norms(WithDropout()).train()
    assert (norm.training, norm.drop.training) == (False, True)


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copier",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        through_torch_save,
        lambda m: AveragedModel(m).module,
    ],
    ids=["deepcopy", "pickle", "torch.save", "AveragedModel"],
)
def test_copies_are_frozen_on_their_own(copier):
    model = freeze_batch_norms(small(), ["3"])
    other = copier(model)
    assert in_training_mode(other.train()) == ["1"]
    assert other[3][1].train() is other[3][1]
    unfreeze_batch_norms(model)
    assert in_training_mode(model.train()) == ["1", "3.1"]
    assert in_training_mode(other.train()) == ["1"]
    unfreeze_batch_norms(other)
    assert in_training_mode(other.train()) == ["1", "3.1"]


def test_state_dict_is_as_before():
    plain, frozen = small(), freeze_batch_norms(small())
    assert list(frozen.state_dict()) == list(plain.state_dict())
    frozen.load_state_dict(plain.state_dict())
    plain.load_state_dict(frozen.state_dict())
    assert in_training_mode(frozen.train()) == []


def test_distributed_data_parallel(process_group):
    model = nn.parallel.DistributedDataParallel(freeze_batch_norms(small(), ["1"])).train()
    assert in_training_mode(model) == ["module.3.1"]
    freeze_batch_norms(model)
    assert in_training_mode(model.train()) == []
    model(torch.randn(2, 3, 8, 8)).sum().backward()


@pytest.mark.parametrize("frozen_first", [True, False])
def test_fully_shard(process_group, frozen_first):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, model = init_device_mesh("cpu", (1,)), small()
    if frozen_first:
        freeze_batch_norms(model)
    for module in (model[1], model[3], model):  # a batch norm of its own, too
        fully_shard(module, mesh=mesh)
    if not frozen_first:
        freeze_batch_norms(model)
    assert isinstance(model[1], nn.BatchNorm2d)
    assert in_training_mode(model.train()) == []
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert in_training_mode(unfreeze_batch_norms(model)) == ["1", "3.1"]


@pytest.mark.parametrize("compiled_first", [True, False])
def test_compile_without_graph_breaks_or_recompiles(compiled_first):
    """One compilation for many calls of ``train()``, and all batch norms in tune mode."""
    model, results = Residual().train(), []
    backend = recording_backend(results.append)
    if compiled_first:
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        freeze_batch_norms(compiled, ["stem_bn"])
        freeze_batch_norms(compiled)
    else:
        compiled = torch.compile(freeze_batch_norms(model), backend=backend, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            compiled.train()
            model.train()
            compiled(torch.randn(2, 3, 8, 8)).sum().backward()
    (result,) = results
    assert [c.name for c in result.codes] == ["FUSED"] * Residual.pairs


def test_timm_batch_norms_with_activation():
    try:
        timm = require("timm")
    except MissingLibrary as missing:
        pytest.skip(str(missing))
    model = freeze_batch_norms(timm.create_model("mobilenetv3_small_050")).train()
    assert in_training_mode(model) == []
    assert model.classifier.training
