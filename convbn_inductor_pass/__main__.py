"""The command line: ``python -m convbn_inductor_pass [demo | explain]``.

Without a command it runs the demonstration. Exit codes: 0; 2 with one line on standard
error if an argument cannot be used; anything else raises.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from rich.console import Console
from torch import nn
from torch._subclasses import FakeTensorMode

from . import __version__, demo
from .explanation import explain

__all__ = ["main"]

_PROGRAM = "python -m convbn_inductor_pass"
_DTYPES = {n: getattr(torch, n) for n in ("float32", "bfloat16", "float16", "float64")}
_MODEL_FORM = "package.module:factory, such as torchvision.models:resnet50"


class _UsageError(Exception):
    """What was asked for cannot be done; the message says what can."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"convbn_inductor_pass: {message}\n")


def _one_line(error: BaseException) -> str:
    """Class and message of an error, without what further lines add."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a shape; expected positive sizes joined by x, such as 2x3x800x1333"
        )
    return tuple(int(size) for size in text.split("x"))


def _positive(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _device(text: str) -> str:
    try:
        torch.empty(0, device=text)
    except (AssertionError, RuntimeError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot be used ({_one_line(error)}); expected cpu, cuda or cuda:N"
        ) from None
    return text


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=_PROGRAM, description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    command = commands.add_parser(
        "demo",
        help="fine-tune a small ResNet in eval mode and in tune mode, and compare (default)",
        description=(demo.__doc__ or "").split("\n\n")[1],
    )
    for name, kind, default in (
        ("--steps", _positive, 40),
        ("--batch-size", _positive, 128),
        ("--device", _device, "cpu"),
        ("--seed", int, 0),
    ):
        command.add_argument(name, type=kind, default=default, help="default: %(default)s")
    command.set_defaults(run=_run_demo)

    command = commands.add_parser(
        "explain",
        help="say which batch norms of a model are fused, and the bytes that this saves",
        description="Trace a model in eval mode on inputs that are not allocated, and say what "
        "the pass does to it. Nothing is run or compiled.",
    )
    command.add_argument(
        "model",
        help=f"{_MODEL_FORM}: a module, or something that returns one when called "
        "without arguments",
    )
    command.add_argument(
        "--input",
        type=_shape,
        action="append",
        required=True,
        dest="inputs",
        metavar="SHAPE",
        help="shape of an input, such as 2x3x800x1333; once for each input",
    )
    command.add_argument(
        "--dtype",
        choices=list(_DTYPES),
        default="float32",
        help="of the model and its inputs; default: %(default)s",
    )
    command.add_argument(
        "--dynamic", action="store_true", help="as torch.compile(dynamic=True): symbolic sizes"
    )
    command.add_argument(
        "--autocast",
        choices=["bfloat16", "float16"],
        help="run the model under autocast in this dtype",
    )
    command.add_argument(
        "--channels-last", action="store_true", help="model and 4-d inputs in channels-last"
    )
    command.add_argument(
        "--freeze",
        action="append",
        default=[],
        metavar="PATTERN",
        help="parameters that are not trained, by name, such as 'layer1.*'; may be repeated",
    )
    command.add_argument(
        "--train-bn", action="store_true", help="batch norms are trained, whatever is frozen"
    )
    command.add_argument(
        "--png", metavar="FILE", help="draw what each part of the model saves for backward"
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.set_defaults(run=_run_explain)
    return parser


def _run_demo(arguments: argparse.Namespace) -> None:
    names = ("steps", "batch_size", "device", "seed")
    try:
        result = demo.run(**{name: getattr(arguments, name) for name in names})
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "sklearn":
            raise
        raise _UsageError(
            "the demonstration's data comes with scikit-learn, which is not installed; "
            "pip install scikit-learn"
        ) from None
    Console().print(result.table())


def _run_explain(arguments: argparse.Namespace) -> None:
    dtype = _DTYPES[arguments.dtype]
    model = _load_model(arguments.model).eval().to(dtype)
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    with fake_mode:
        inputs = [torch.empty(shape, dtype=dtype) for shape in arguments.inputs]
    try:
        # Without Dynamo first: what fails here is the model's own, and says so more plainly.
        with fake_mode, torch.no_grad():
            model(*inputs)
    except Exception as error:
        shapes = ", ".join("x".join(map(str, shape)) for shape in arguments.inputs)
        raise _UsageError(
            f"{arguments.model} does not run on {shapes} of {arguments.dtype} "
            f"({_one_line(error)}); expected one --input for each of its inputs, of a shape "
            "that it takes"
        ) from error
    try:
        with Console(stderr=True).status("tracing the model in each mode"):
            explanation = explain(
                model,
                *inputs,
                dynamic=True if arguments.dynamic else None,
                autocast=_DTYPES[arguments.autocast] if arguments.autocast else None,
                channels_last=arguments.channels_last,
                freeze=arguments.freeze,
                train_bn=arguments.train_bn,
            )
        if arguments.png:
            explanation.save_picture(arguments.png)
    except (ValueError, OSError) as error:
        raise _UsageError(str(error)) from error
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise _UsageError("--png needs matplotlib; pip install matplotlib") from None
    if arguments.json:
        print(json.dumps(explanation.to_dict(), indent=1))
    else:
        print(str(explanation).rstrip())


def _load_model(text: str) -> nn.Module:
    """The module that ``package.module:factory`` names or makes."""
    module_name, _, attribute = text.partition(":")
    if not module_name or not attribute:
        raise _UsageError(f"{text!r} names no model; expected {_MODEL_FORM}")
    try:
        value: Any = importlib.import_module(module_name)
    except Exception as error:  # importing runs other people's code, which may raise anything
        raise _UsageError(
            f"cannot import {module_name!r} ({_one_line(error)}); expected {_MODEL_FORM}"
        ) from error
    path = module_name
    for name in attribute.split("."):
        if not hasattr(value, name):
            raise _UsageError(f"{path} has no {name!r}; {_known_names(value, name)}")
        value, path = getattr(value, name), f"{path}.{name}"
    if callable(value) and not isinstance(value, nn.Module):
        try:
            value = value()
        except Exception as error:
            raise _UsageError(
                f"calling {text} without arguments failed ({_one_line(error)}); expected "
                f"{_MODEL_FORM}, where the factory needs no arguments"
            ) from error
        text = f"what {text} returns"
    if not isinstance(value, nn.Module):
        raise _UsageError(
            f"{text} has type {type(value).__name__}; expected a torch.nn.Module, or something "
            "that returns one when called without arguments"
        )
    return value


def _known_names(owner: Any, name: str) -> str:
    public = [n for n in dir(owner) if not n.startswith("_") and callable(getattr(owner, n))]
    close = difflib.get_close_matches(name, public, n=3)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"it has, for example, {', '.join(public[:5])}" if public else "it has nothing callable"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; ``argv`` without the program's name, ``sys.argv`` by default.

    Raises:
        SystemExit: with code 2 for arguments that cannot be used, 0 after ``--help``.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help", "--version")):
        given.insert(0, "demo")
    parser = _parser()
    arguments = parser.parse_args(given)
    try:
        arguments.run(arguments)
    except _UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
