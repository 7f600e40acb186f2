"""The one line that says what was done: when, how often, in which words, and how silenced."""

import subprocess
import sys

import pytest
import torch
from common import ConvBN, Residual
from torch import nn
from torch._inductor.compile_fx import compile_fx

import convbn_inductor_pass as cbn
from convbn_inductor_pass import announce, testing

LOGGER = "convbn_inductor_pass"
PREFIX = f"{LOGGER}: "


@pytest.fixture(autouse=True)
def _nothing_said_yet(monkeypatch):
    cbn.clear_records()
    monkeypatch.setattr(announce, "_said", set())
    yield
    cbn.clear_records()


@pytest.fixture(name="x")
def _x():
    return torch.randn(2, 3, 8, 8)


@pytest.fixture(name="lines")
def _lines(caplog):
    """What was logged since the last call, with the level, after the name that each begins with."""

    def lines():
        found = [(r.levelname, r.getMessage()) for r in caplog.records if r.name == LOGGER]
        caplog.clear()
        assert all(message.startswith(PREFIX) for _, message in found)
        return [(level, message.removeprefix(PREFIX)) for level, message in found]

    return lines


def inductor_up_to_codegen(gm, inputs):
    return compile_fx(gm, inputs, inner_compile=lambda gm, inputs, **kwargs: gm)


def compiled(model, *inputs, **kwargs):
    with testing.fresh_compile():
        torch.compile(model, backend=inductor_up_to_codegen, **kwargs)(*inputs)


ALL = f"{Residual.pairs} of {Residual.pairs} batch norms in tune mode, "
TRAINING = (
    "the batch norm is in training mode, or has no running statistics; call model.eval() after "
    "each model.train(), or convbn_inductor_pass.freeze_batch_norms(model)"
)


def test_all_in_tune_mode(x, lines):
    compiled(Residual(), x)
    saved = sum(r.bytes_saved for r in cbn.records())
    assert saved == 5 * 2 * 8 * 8 * 8 * 4 + 2 * 16 * 4 * 4 * 4
    assert lines() == [("INFO", ALL + "about 22.5 kB less saved for backward")]


def test_none_in_tune_mode(x, lines):
    compiled(Residual().train(), x)
    assert lines() == [("WARNING", f"0 of 6 batch norms in tune mode: {TRAINING}")]


def test_some_in_tune_mode(x, lines):
    model = Residual()
    model.bns.train()
    compiled(model, x)
    text = "2 of 6 batch norms in tune mode, about 6.1 kB less saved for backward; 4 are not: "
    assert lines() == [("WARNING", text + TRAINING)]
    model = Residual()
    model.down.requires_grad_(False)
    compiled(model, x)
    # The frozen layer's input, less its mask, is not saved either.
    text = "5 of 6 batch norms in tune mode, about 23.6 kB less saved for backward; 1 is not: "
    assert lines() == [("INFO", text + cbn.Code.LAYER_FROZEN.value)]


def test_nothing_to_gain_is_no_warning(x, lines):
    """Adversarial examples: no batch norm trains, and yet less is saved."""
    compiled(Residual().requires_grad_(False), x.requires_grad_())
    [(level, line)] = lines()
    assert level == "INFO"
    less, _, norms = line.partition(" less saved for backward; ")
    assert less.endswith("kB")
    assert norms.startswith("0 of 6 batch norms in tune mode: the batch norm's weight needs no ")


def test_the_most_frequent_reason_without_a_remedy(x, lines):
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3).train())
    model[1].eval()
    compiled(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), model).eval(), x)
    why = "the batch norm does not follow a convolution or linear layer"
    assert lines() == [("WARNING", f"0 of 3 batch norms in tune mode: {why}")]


def test_once_per_model_and_result(x, lines):
    model = Residual()
    compiled(model, x)
    compiled(Residual(), x)
    compiled(model, x[:1])  # fewer bytes: no other result
    assert [line[:6] for _, line in lines()] == ["6 of 6"]
    compiled(model.train(), x)
    compiled(model.eval(), x)
    compiled(ConvBN(nn.Conv2d(3, 4, 3)), x)
    assert [line[:6] for _, line in lines()] == ["0 of 6", "1 of 1"]
    compiled(Residual(width=16), x)  # with the same names
    assert [line[:6] for _, line in lines()] == ["6 of 6"]


@pytest.mark.parametrize("dynamic", [False, True])
def test_counts_once(x, lines, dynamic):
    compiled(Residual(), x, dynamic=dynamic)
    assert [line[:6] for _, line in lines()] == ["6 of 6"]


@pytest.mark.parametrize("training", [False, True])
def test_nothing_of_inference(x, lines, training):
    model = Residual().train(training)
    with torch.no_grad():
        compiled(model, x)
    compiled(model.requires_grad_(False), x)
    assert [r.code for r in cbn.records()] == [cbn.Code.NO_GRAD] * 12
    assert lines() == []


def test_without_batch_norms(x, lines):
    """If it saves memory, as for an adversarial example."""
    compiled(nn.Conv2d(3, 4, 3), x)
    assert lines() == []
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)]
    model = nn.Sequential(*layers).requires_grad_(False)
    for _ in range(2):
        compiled(model, x.clone().requires_grad_())
    assert lines() == [("INFO", "about 864 bytes less saved for backward")]


def test_eager_mode_says_that_all_are_in_training_mode(x, lines):
    """As after a trainer's ``model.train()``."""
    model = cbn.turn_on(Residual())
    model(x)
    assert lines() == []
    model.train()
    with torch.no_grad():
        model(x)
    assert lines() == []
    model(x)
    model(x)
    assert lines() == [("WARNING", f"0 of 6 batch norms in tune mode: {TRAINING}")]
    model.eval()
    model(x)
    assert lines() == []


def test_nothing_with_the_flag_off(x, lines):
    with testing.fresh_compile(flag=False):
        torch.compile(Residual(), backend=inductor_up_to_codegen)(x)
    assert lines() == []


def test_a_line_for_each_part_of_a_broken_model(x, lines):
    """But the same line only once, if nothing was done."""

    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Residual(), ConvBN(nn.Conv2d(3, 4, 3))
            self.bn1, self.bn2 = nn.BatchNorm2d(3).eval(), nn.BatchNorm2d(3).eval()

        def forward(self, x):
            first = self.first(x)
            torch._dynamo.graph_break()
            second = self.second(x)
            torch._dynamo.graph_break()
            third = self.bn1(x)
            torch._dynamo.graph_break()
            return first.sum() + second.sum() + third.sum() + self.bn2(x).sum()

    compiled(Broken(), x)
    assert [line[:6] for _, line in lines()] == ["6 of 6", "1 of 1", "0 of 1"]


def test_options_and_levels_silence_it(x, lines, caplog):
    with cbn.options(announce=False):
        compiled(Residual(), x)
    with caplog.at_level("WARNING", logger=LOGGER):
        compiled(Residual(), x)
    with caplog.at_level("ERROR", logger=LOGGER):
        compiled(Residual().train(), x)
    assert lines() == []


def test_a_compilation_does_not_fail_because_of_it(x, lines, monkeypatch):
    def fails():
        raise OSError("no cache folder")

    monkeypatch.setattr(announce, "take_new", fails)
    compiled(Residual(), x)
    assert lines() == [("WARNING", "cannot report what was done")]


def test_explain_and_counting_bytes_say_nothing(x, lines):
    assert f"BATCH_STATISTICS: {cbn.Code.BATCH_STATISTICS.remedy}" in str(
        cbn.explain(Residual().train(), x)
    )
    assert lines() == []


@pytest.mark.parametrize("code", cbn.Code)
def test_remedies_are_one_short_clause(code):
    assert not (code.rewritten and code.remedy)
    assert code.fused == code.rewritten  # the name in 0.1.0
    assert len(code.remedy) < 120
    assert not code.remedy.endswith(".")


SCRIPT = """
import logging, sys
import convbn_inductor_pass as cbn
from convbn_inductor_pass import announce

logger = logging.getLogger("convbn_inductor_pass")
exec(sys.argv[1])
for code in (cbn.Code.FUSED, cbn.Code.NOT_AFTER_LAYER):
    announce.say([cbn.Record("scale_gradient", "batch norm", code, batch_norm="bn", bytes_saved=7)])
"""
FUSED = f"{PREFIX}1 of 1 batch norms in tune mode, about 7 bytes less saved for backward\n"
LEFT = f"{PREFIX}0 of 1 batch norms in tune mode: {cbn.Code.NOT_AFTER_LAYER.value}\n"
INFO, WARNING = f"INFO:{LOGGER}:", f"WARNING:{LOGGER}:"


@pytest.mark.parametrize(
    ("setup", "stderr"),
    [
        ("", FUSED + LEFT),
        ("logging.basicConfig(level='WARNING')", INFO + FUSED + WARNING + LEFT),
        ("logger.addHandler(logging.StreamHandler())", FUSED + LEFT),
        ("logger.setLevel('WARNING')", LEFT),
        ("logger.setLevel('ERROR')", ""),
        ("cbn.set_options(announce=False)", ""),
    ],
)
def test_each_line_once_whether_logging_is_set_up_or_not(setup, stderr):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, setup], capture_output=True, text=True, check=False
    )
    assert done.stderr == stderr
