"""Adapters in the real trainers: all pairs are fused, and the losses are eval mode's."""

import importlib

import pytest
import torch
from common import Residual
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import convbn_inductor_pass as cbn
from bench.libraries import MissingLibrary, require
from convbn_inductor_pass import testing
from convbn_inductor_pass._torch import registry

# Theirs, of classes that pytest's other process would have to import to show them.
pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = 3
FLAG = "efficient_conv_bn_eval_fx_passes"


def library(name):
    try:
        if importlib.util.find_spec("torchvision"):
            require("torchvision")  # which these import, and cannot where its operators do not load
        return require(name)
    except MissingLibrary as missing:
        pytest.skip(str(missing))


@pytest.fixture(autouse=True)
def _flag_and_records():
    cbn.clear_records()
    before, default = getattr(registry.config, FLAG), registry.config._config[FLAG].default
    with testing.fresh_compile(flag=False):
        registry.set_everywhere(FLAG, False)
        yield
    registry.set_everywhere(FLAG, default)
    setattr(registry.config, FLAG, before)
    cbn.clear_records()


@pytest.fixture(name="batches")
def _batches():
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(4, 3, 16, 16, generator=generator), torch.tensor([0, 1, 2, 3]))
        for _ in range(STEPS)
    ]


def assert_trained_in_tune_mode(model, losses, expected):
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    assert len(losses) == STEPS
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    records = [r for r in cbn.records() if r.kind == "batch norm"]
    assert {r.code for r in records} == {cbn.Code.FUSED}
    # By path: MMEngine's train_step counts iterations, for which Dynamo compiles it twice.
    assert len({r.batch_norm for r in records}) == len(norms)
    assert not any(m.training for m in norms)


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.parametrize("whole", [True, False], ids=["torch.compile(module)", "module.net"])
def test_lightning(name, whole, batches, tmp_path):
    lightning = library(name)
    callback = library("convbn_inductor_pass.integrations.lightning").TuneModeCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net, self.losses, self.modes = Residual(), [], []
            self.train()

        def training_step(self, batch, index):
            x, target = batch
            return nn.functional.cross_entropy(self.net(x), target)

        def validation_step(self, batch, index):
            self.net(batch[0])

        def on_train_batch_end(self, outputs, batch, index):
            self.losses.append(outputs["loss"].item())
            self.modes.append(self.net.training)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def fit(module, fitted, *callbacks):
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=1,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        loader = torch.utils.data.DataLoader(batches, batch_size=None)
        trainer.fit(fitted, loader, loader)
        return module.losses

    plain = cbn.freeze_batch_norms(Module())
    expected = fit(plain, plain)
    module, backend = Module(), testing.post_grad_backend()
    if whole:
        fitted = torch.compile(module, backend=backend)
    else:
        fitted, module.net = module, torch.compile(module.net, backend=backend)
    losses = fit(module, fitted, callback(["net"]))
    norms = (r for r in cbn.records() if r.kind == "batch norm")
    training = [r for r in norms if r.code is not cbn.Code.NO_GRAD]  # no validation
    assert [r.code for r in training] == [cbn.Code.FUSED] * Residual.pairs
    assert len(losses) == STEPS
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    assert module.modes == plain.modes == [True] * STEPS


def test_transformers(batches, tmp_path):
    """Through Inductor, as ``torch_compile=True`` is."""
    transformers = library("transformers")
    library("accelerate")
    callback = library("convbn_inductor_pass.integrations.transformers").TuneModeCallback

    class Losses(transformers.TrainerCallback):
        def __init__(self):
            self.losses = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                self.losses.append(logs["loss"])

    def train(compiled, *callbacks):
        torch.manual_seed(0)
        config = transformers.ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            layer_type="basic",
            num_labels=4,
            problem_type="single_label_classification",  # set in the first forward: a recompilation
        )
        model = transformers.ResNetForImageClassification(config)
        if not callbacks:
            cbn.freeze_batch_norms(model)
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            learning_rate=0.1,
            optim="sgd",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            torch_compile=compiled,
        )
        data = [
            {"pixel_values": x, "labels": target}
            for images, targets in batches
            for x, target in zip(images, targets, strict=True)
        ]
        told = Losses()
        transformers.Trainer(model, args, train_dataset=data, callbacks=[told, *callbacks]).train()
        return model, told.losses

    _, expected = train(False)
    model, losses = train(True, callback())
    assert_trained_in_tune_mode(model, losses, expected)


def test_mmengine(batches, tmp_path):
    """By its name in a config."""
    mmengine = library("mmengine")
    library("convbn_inductor_pass.integrations.mmengine")
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    class Model(BaseModel):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.backbone = Residual()

        def forward(self, x, target, mode="tensor"):
            output = self.backbone(x)
            return {"loss": nn.functional.cross_entropy(output, target)}

    def train(name, model, hooks=(), **config):
        losses = []

        class Losses(mmengine.hooks.Hook):
            def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
                losses.append(outputs["loss"].item())
                assert runner.model.backbone.relu.training

        Runner(
            model=model,
            work_dir=str(tmp_path / name),
            train_dataloader=torch.utils.data.DataLoader(samples, batch_size=4),
            train_cfg={"by_epoch": False, "max_iters": STEPS},
            optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}},
            custom_hooks=[Losses(), *hooks],
            default_hooks={"checkpoint": None},
            experiment_name=name,
            cfg=config,
        ).train()
        return losses

    samples = [sample for batch in batches for sample in zip(*batch, strict=True)]
    expected = train("plain", cbn.freeze_batch_norms(Model()))
    model = Model()
    hook = {"type": "TuneModeHook", "modules": ["backbone"]}
    # Configs are text, in which a backend is a name.
    torch._dynamo.register_backend(testing.post_grad_backend(), name="test_mmengine")
    losses = train("tune", model, [hook], compile={"backend": "test_mmengine"})
    assert_trained_in_tune_mode(model, losses, expected)
