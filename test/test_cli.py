"""The command line: explain for people and programs, its error messages."""

import json
import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion

from bench import demo
from convbn_inductor_pass import __main__ as cli
from convbn_inductor_pass import __version__, explain

DEMO = "bench.demo:small_resnet"
SMALL = f"{__name__}:two_stages"
PAIRS = 6  # the stem, in two blocks two each, and a shortcut

# Models for the command line to import.
instance = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
not_a_model = 3


class Nested:
    model = instance


def two_stages():
    return demo.SmallResNet(stages=2)


def needs_arguments(width):
    return nn.Conv2d(width, width, 3)


def returns_a_tensor():
    return torch.zeros(3)


def raises():
    raise ValueError("no weights here\nnor anywhere")


def compiled():
    return torch.compile(two_stages())


class Reading(nn.Module):
    def forward(self, x):
        return instance(x) * x.sum().item()


def train_mode_and_frozen():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    model[1].weight.requires_grad_(False)
    return model


def run(capsys, *arguments):
    cli.main(arguments)
    return capsys.readouterr().out


def fails(capsys, *arguments):
    """The line on standard error; the exit code must be 2 and nothing else printed."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    *logged, line = err.splitlines()
    if TorchVersion(torch.__version__) < "2.14":  # which warns of .item()
        assert not logged
    assert all("torch/_dynamo" in entry for entry in logged)
    assert line.startswith("convbn_inductor_pass: ")
    return line.removeprefix("convbn_inductor_pass: ")


def test_explain_as_a_process():
    done = subprocess.run(
        [sys.executable, "-m", "convbn_inductor_pass", "explain", DEMO, "--input", "8x1x8x8"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "9 of 9 batch norms in tune mode" in done.stdout
    assert "blocks.1.shortcut.0" in done.stdout
    assert "saved for backward, deploy mode" in done.stdout


def test_explain_json(capsys):
    told = json.loads(run(capsys, "explain", SMALL, "--input", "8x1x8x8", "--json"))
    assert (told["fused"], told["batch_norms"], told["graphs"]) == (PAIRS, PAIRS, 1)
    assert told["saved_bytes"]["tune"] <= told["saved_bytes"]["deploy"]
    assert told["saved_bytes"]["tune"] < told["saved_bytes"]["eval"]
    expected = explain(two_stages().eval(), torch.randn(8, 1, 8, 8))
    assert told == json.loads(json.dumps(expected.to_dict()))


def test_explain_allocates_nothing(capsys):
    told = json.loads(run(capsys, "explain", SMALL, "--input", "1024x1x4096x4096", "--json"))
    assert told["fused"] == PAIRS
    assert told["saved_bytes"]["tune"] > 2**40


def test_explain_dtype(capsys):
    arguments = ("explain", SMALL, "--input", "8x1x8x8", "--json", "--dtype")
    wide, narrow = (json.loads(run(capsys, *arguments, d)) for d in ("float64", "bfloat16"))
    assert wide["saved_bytes"]["eval"] == 4 * narrow["saved_bytes"]["eval"]


def test_explain_dynamic(capsys):
    told = json.loads(run(capsys, "explain", SMALL, "--input", "8x1x6x7", "--json", "--dynamic"))
    assert (told["fused"], told["batch_norms"]) == (PAIRS, PAIRS)
    batch, channels, height, width = told["records"][0]["output_shape"]
    assert channels == 16
    assert all(isinstance(size, str) for size in (batch, height, width))


@pytest.mark.parametrize("name", ["instance", "Nested.model"])
def test_explain_takes_modules_and_dotted_names(capsys, name):
    out = run(capsys, "explain", f"{__name__}:{name}", "--input", "2x3x8x8")
    assert "1 of 1 batch norms in tune mode" in out


def test_explain_of_a_compiled_model(capsys):
    """It is not run as compiled, which on fake tensors reads memory that is not there."""
    out = run(capsys, "explain", f"{__name__}:compiled", "--input", "2x1x8x8", "--json")
    records = json.loads(out)["records"]
    assert {r["code"] for r in records if r["kind"] == "batch norm"} == {"FUSED"}
    assert not any("_orig_mod" in r["layer"] + r["batch_norm"] for r in records)


def test_explain_says_that_values_are_asked_for(capsys):
    message = fails(capsys, "explain", f"{__name__}:Reading", "--input", "2x3x8x8")
    assert message.startswith("the model reads values of tensors (")
    assert ".item()" in message


def test_explain_uses_eval_mode_and_keeps_requires_grad(capsys):
    out = run(
        capsys, "explain", f"{__name__}:train_mode_and_frozen", "--input", "2x3x8x8", "--json"
    )
    assert [r["code"] for r in json.loads(out)["records"]] == ["AFFINE_FROZEN"]


SHAPE = ("--input", "2x3x8x8")
FORM = "expected package.module:factory, such as torchvision.models:resnet50"
A_MODEL = "expected a torch.nn.Module, or something that returns one when called without arguments"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("resnet50", *SHAPE),
            f"cannot load 'resnet50' (ModuleNotFoundError: No module named 'resnet50'); {FORM}",
        ),
        (
            (":resnet50", *SHAPE),
            f"cannot load ':resnet50' (ValueError: invalid format: ':resnet50'); {FORM}",
        ),
        (
            ("no_such_package.models:net", *SHAPE),
            "cannot load 'no_such_package.models:net' "
            f"(ModuleNotFoundError: No module named 'no_such_package'); {FORM}",
        ),
        (
            ("bench.demo:smal_resnet", *SHAPE),
            "cannot load 'bench.demo:smal_resnet' "
            f"(AttributeError: module 'bench.demo' has no attribute 'smal_resnet'); {FORM}",
        ),
        (("math", *SHAPE), f"math has type module; {A_MODEL}"),
        ((f"{__name__}:not_a_model", *SHAPE), f"{__name__}:not_a_model has type int; {A_MODEL}"),
        (
            (f"{__name__}:returns_a_tensor", *SHAPE),
            f"what {__name__}:returns_a_tensor returns has type Tensor; {A_MODEL}",
        ),
        (
            (f"{__name__}:needs_arguments", *SHAPE),
            f"calling {__name__}:needs_arguments without arguments failed (TypeError: "
            f"needs_arguments() missing 1 required positional argument: 'width'); {FORM}, where "
            "the factory needs no arguments",
        ),
        (
            (f"{__name__}:raises", *SHAPE),
            f"calling {__name__}:raises without arguments failed (ValueError: no weights here); "
            f"{FORM}, where the factory needs no arguments",
        ),
        (SHAPE, "Missing argument 'MODEL'."),
        ((DEMO,), "Missing option '--input'."),
        ((DEMO, "--input"), "Option '--input' requires an argument."),
        ((DEMO, *SHAPE, "--json=yes"), "Option '--json' does not take a value."),
        *(
            (
                (DEMO, "--input", shape),
                f"Invalid value for '--input': {shape!r} is not a shape; expected positive sizes "
                "joined by x, such as 2x3x800x1333",
            )
            for shape in ("2x3x", "2,3,8,8", "2x0x8x8", "2x3x8.5", "batch")
        ),
        (
            (DEMO, "--input", "2x1x8x8", "--input", "2x1x8x8"),
            f"{DEMO} does not run on 2x1x8x8, 2x1x8x8 of float32 (TypeError: SmallResNet.forward() "
            "takes 2 positional arguments but 3 were given); expected one --input for each of "
            "its inputs, with a shape that it accepts",
        ),
    ],
)
def test_explain_says_what_is_wrong(capsys, arguments, message):
    assert fails(capsys, "explain", *arguments) == message


def test_explain_says_that_a_shape_does_not_fit(capsys):
    message = fails(capsys, "explain", DEMO, "--input", "2x3x8x8")
    assert message.startswith(f"{DEMO} does not run on 2x3x8x8 of float32 (RuntimeError: ")
    assert "to have 1 channels, but got 3 channels" in message


def test_explain_lists_the_dtypes(capsys):
    message = fails(capsys, "explain", DEMO, *SHAPE, "--dtype", "int8")
    assert message.startswith("Invalid value for '--dtype': ")
    assert "'int8'" in message
    assert re.findall(r"\b\w*float\w*\b", message) == ["float32", "bfloat16", "float16", "float64"]
    message = fails(capsys, "explain", DEMO, *SHAPE, "--autocast", "float32")
    assert re.findall(r"\b\w*float\w*\b", message) == ["float32", "bfloat16", "float16"]


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        (("--step-size", "1"), "No such option: --step-size"),
        (("explain", DEMO, *SHAPE, "demo"), "Got unexpected extra argument"),
        (("explian", DEMO), "No such command 'explian'"),
    ],
)
def test_what_cannot_be_parsed_is_named(capsys, arguments, start):
    """The rest of the line is typer's, and changes with its versions."""
    assert fails(capsys, *arguments).startswith(start)


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], ["explain", "--version"]),
        (["-h"], ["explain", "--version"]),
        (
            ["explain", "--help"],
            [
                *("--input", "--dtype", "--dynamic", "--autocast", "--channels-last", "--freeze"),
                *("--train-bn", "--png", "--json", "float64", "resnet50", "2x3x800x1333"),
            ],
        ),
    ],
)
def test_help_lists_everything(capsys, arguments, told):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert [text for text in told if text not in out] == []


def test_a_mistake_as_a_process():
    done = subprocess.run(
        [sys.executable, "-m", "convbn_inductor_pass", "explain"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "convbn_inductor_pass: Missing argument 'MODEL'.\n"


def test_help_loads_no_compiler_and_changes_nothing():
    script = """
import sys, torch
hook = sys.excepthook
from convbn_inductor_pass.__main__ import main
try:
    main(["explain", "--help"])
except SystemExit as done:
    print(done.code, sys.excepthook is hook, "torch._inductor.compile_fx" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 True False", done.stderr
