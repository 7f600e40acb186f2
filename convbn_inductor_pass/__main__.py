"""The command line: ``python -m convbn_inductor_pass explain``.

Exit code 0, or 2 with one line on standard error if an argument cannot be used; any other error
is raised.
"""

import json
import pkgutil
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from rich.console import Console
from torch import nn
from torch._subclasses import FakeTensorMode
from typer import Argument, BadParameter, Exit, Option, Typer
from typer.main import get_command

from . import __version__
from ._torch import tracing
from .explanation import explain

_PROGRAM = "python -m convbn_inductor_pass"
_MODEL_FORM = "package.module:factory, such as torchvision.models:resnet50"
# What typer raises for arguments that it cannot use, of which it exports only a subclass.
_UsageError: Any = BadParameter.__mro__[1]

_settings = {"help_option_names": ["-h", "--help"]}
_app = Typer(add_completion=False, rich_markup_mode=None, context_settings=_settings)

_Half = Literal["bfloat16", "float16"]
_Dtype = Literal["float32", "bfloat16", "float16", "float64"]


def _one_line(error: Exception) -> str:
    """Class of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0].removesuffix(": ")


def _shape(text: str) -> torch.Size:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
        raise BadParameter(
            f"{text!r} is not a shape; expected positive sizes joined by x, such as 2x3x800x1333"
        )
    return torch.Size(int(size) for size in text.split("x"))


@_app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, Option("--version", help="print the version")] = False) -> None:
    """What the passes do to a model."""
    if version:
        print(__version__)
        raise Exit


@_app.command("explain")
def _explain(
    model: Annotated[
        str,
        Argument(metavar="MODEL", help=f"a module, or a factory without arguments: {_MODEL_FORM}"),
    ],
    inputs: Annotated[
        list[torch.Size],
        Option(
            "--input", parser=_shape, metavar="SHAPE", help="such as 2x3x800x1333; once per input"
        ),
    ],
    dtype: Annotated[_Dtype, Option(help="of the model and its inputs")] = "float32",
    dynamic: Annotated[bool, Option("--dynamic", help="symbolic sizes, as dynamic=True")] = False,
    autocast: Annotated[_Half | None, Option(help="run under autocast in this dtype")] = None,
    channels_last: Annotated[
        bool, Option("--channels-last", help="make model and 4-d inputs channels-last")
    ] = False,
    freeze: Annotated[
        list[str] | None,
        Option(metavar="PATTERN", help="freeze parameters, such as 'layer1.*'; may be repeated"),
    ] = None,
    train_bn: Annotated[bool, Option("--train-bn", help="train batch norms in any case")] = False,
    png: Annotated[
        str | None,
        Option(metavar="FILE", help="draw what each part of the model saves for backward"),
    ] = None,
    as_json: Annotated[bool, Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Show which batch norms are fused, and how many bytes this saves.

    The model is traced in eval mode on inputs that are not allocated. Nothing is run or compiled.
    """
    wanted = getattr(torch, dtype)
    module = _load_model(model).eval().to(wanted)
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with fake_mode:
            tensors = [torch.empty(shape, dtype=wanted) for shape in inputs]
        # Without Dynamo first: what fails here is the model's own, and says so more plainly.
        stance = torch.compiler.set_stance("force_eager")
        with tracing.unchanged(module), fake_mode, torch.no_grad(), stance:
            module(*tensors)
    except tracing.ValuesNeeded:
        pass  # explain says so
    except Exception as error:
        shapes = ", ".join("x".join(map(str, shape)) for shape in inputs)
        raise _UsageError(
            f"{model} does not run on {shapes} of {dtype} ({_one_line(error)}); expected "
            "one --input for each of its inputs, with a shape that it accepts"
        ) from error
    try:
        with Console(stderr=True).status("tracing the model in each mode"):
            explanation = explain(
                module,
                *tensors,
                dynamic=dynamic or None,
                autocast=getattr(torch, autocast) if autocast else None,
                channels_last=channels_last,
                freeze=freeze or (),
                train_bn=train_bn,
            )
        if png:
            explanation.save_picture(png)
            print(f"wrote {png}", file=sys.stderr)
    except (ValueError, OSError) as error:
        raise _UsageError(str(error)) from error
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise _UsageError("--png needs matplotlib; pip install matplotlib") from None
    print(json.dumps(explanation.to_dict(), indent=1) if as_json else str(explanation).rstrip())


def _load_model(text: str) -> nn.Module:
    """The module that ``package.module:factory`` names or makes."""
    try:
        value: Any = pkgutil.resolve_name(text)
    except Exception as error:  # importing runs other people's code, which may raise anything
        why = f"cannot load {text!r} ({_one_line(error)}); expected {_MODEL_FORM}"
        raise _UsageError(why) from error
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


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; ``argv`` without the program's name, ``sys.argv`` by default.

    Raises:
        SystemExit: with code 2 for arguments that cannot be used, 0 after ``--help``.
    """
    given = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        # Not ``_app(...)``: that would replace sys.excepthook, for callers in Python as well.
        code = get_command(_app).main(given, prog_name=_PROGRAM, standalone_mode=False)
    except _UsageError as error:
        # In one line: some messages list choices in lines of their own.
        message = " ".join(error.format_message().split())
        print(f"convbn_inductor_pass: {message}", file=sys.stderr)
        raise SystemExit(2) from None
    if code is not None:  # of --help and --version
        raise SystemExit(code)


if __name__ == "__main__":
    main()
