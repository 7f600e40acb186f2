"""``explain``: what the passes do to a model, and what that saves, without compiling it."""

import contextlib
import dataclasses
import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from . import show
from ._torch import tracing
from .codes import Code
from .passes.scale_gradient.records import NamedRecord
from .records import Record
from .saved_tensors import Mode, SavedForBackward, saved_by_graph

_MODES: tuple[Mode, ...] = ("eval", "tune", "deploy")


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Decisions about a model's batch norms, other scales and layers; bytes saved for backward.

    ``records`` has one per decision, in the order of execution, ``saved`` by mode ("eval", "tune",
    "deploy") the new tensors saved for backward. ``str(explanation)`` is a readable table.
    """

    records: tuple[Record, ...]
    saved: dict[str, SavedForBackward]

    @property
    def graphs(self) -> int:
        """Number of graphs that Dynamo made; more than one means graph breaks."""
        return self.saved["eval"].graphs

    @property
    def batch_norms(self) -> tuple[Record, ...]:
        """The records of batch norms, one per call in a graph."""
        norms = (r for r in self.records if r.kind == "batch norm")
        return tuple(r for r in norms if r.code is not Code.NOT_COMPILED)

    @property
    def fused(self) -> int:
        """Number of batch norm calls in tune mode."""
        return sum(r.code.rewritten for r in self.batch_norms)

    @property
    def saved_bytes(self) -> dict[str, int]:
        """By mode, bytes saved for backward, excluding parameters, buffers and inputs."""
        return {mode: s.all_bytes for mode, s in self.saved.items()}

    @property
    def peak_bytes(self) -> dict[str, int]:
        """By mode, an estimate of a step's peak memory, in bytes: see ``SavedForBackward``."""
        return {mode: s.peak_bytes for mode, s in self.saved.items()}

    def left(self, *, except_codes: tuple[Code, ...] = ()) -> tuple[Record, ...]:
        """Batch norms left as written, except those left for one of ``except_codes``.

        Includes modules that no graph calls (``NOT_COMPILED``).

        Raises:
            TypeError: ``except_codes`` has something that is no ``Code``.
        """
        if unknown := [c for c in except_codes if not isinstance(c, Code)]:
            raise TypeError(f"except_codes must be members of Code, got {unknown[0]!r}")
        left = (r for r in self.records if r.kind == "batch norm" and not r.code.rewritten)
        return tuple(r for r in left if r.code not in except_codes)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        saved = {m: [dataclasses.asdict(t) for t in s.tensors] for m, s in self.saved.items()}
        return {
            "fused": self.fused,
            "batch_norms": len(self.batch_norms),
            "graphs": self.graphs,
            "saved_bytes": self.saved_bytes,
            "peak_bytes": self.peak_bytes,
            "saved_tensors": saved,
            "records": [r.to_dict() for r in self.records],
        }

    __str__ = show.as_text
    save_picture = show.save_picture


def explain(
    model: Callable[..., Any],
    *example_inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    autocast: torch.dtype | None = None,
    channels_last: bool = False,
    freeze: Sequence[str] = (),
    train_bn: bool = False,
) -> Explanation:
    """What the passes would do if the model were compiled, and how many bytes that saves.

    The flag need not be set, and nothing is compiled, run or cached: the model is traced on fake
    tensors. So inputs may be made under ``FakeTensorMode``, of any size (docs/explain.md).

    Args:
        model: a module or function, in the mode (eval, requires_grad) in which it will be used.
        example_inputs, kwargs: its inputs; tensors may be real or fake, other values are passed on.
        dynamic: as in ``torch.compile``.
        autocast: the dtype of an autocast region around the call; None for no autocast.
        channels_last: convert model and 4-d inputs to this memory format.
        freeze: patterns of parameter names (``"layer1.*"``); these parameters are frozen.
        train_bn: train the weights and biases of batch norms, whatever ``freeze`` says.

    The last three are undone at the end, as is whatever the model's code changes in it.

    Raises:
        TypeError: ``model`` is not a module or function, or not a module where one is needed.
        ValueError: it does not run on these inputs, is on the meta device, sharded by FSDP or lazy,
            or reads values of tensors, as ``.item()`` does; ``autocast`` is no half precision, or a
            pattern matches no parameter.
    """
    if isinstance(model, type) or not callable(model):
        what = f"the class {model.__name__}" if isinstance(model, type) else repr(model)
        raise TypeError(f"model must be a module or a function, got {what}")
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"autocast must be torch.bfloat16 or torch.float16, got {autocast!r}")
    if isinstance(freeze, str):
        raise ValueError(f"freeze must be a list such as [{freeze!r}]")
    inputs, keywords = example_inputs, dict(kwargs or {})
    if channels_last:
        inputs, keywords = pytree.tree_map_only(Tensor, _in_channels_last, (inputs, keywords))
    records: list[Record] = []
    total: dict[str, SavedForBackward] = dict.fromkeys(_MODES, SavedForBackward((), graphs=0))
    taken: set[int] = set()  # ids of the tensors that graphs take

    def on_graph(gm: fx.GraphModule, inputs: list[Any]) -> None:
        found: list[NamedRecord] = []
        of_scales = saved_by_graph(gm, inputs, "scale_gradient", found.extend)
        saved = {mode: saved_by_graph(gm, inputs, mode, found.extend) for mode in _MODES}
        # Only now, because Dynamo may give up on a graph above and trace again (dynamic floats).
        for mode in _MODES:
            total[mode] += saved[mode]
        for name, record in found:
            if name and record.code.rewritten:
                less = saved["eval"].bytes_after(name) - of_scales.bytes_after(name)
                record = dataclasses.replace(record, bytes_saved=less)
            records.append(record)

    def on_call(gm: fx.GraphModule, args: tuple[Any, ...]) -> None:
        taken.update(map(id, (*args, *gm.parameters(), *gm.buffers())))

    tensors = [t for t in pytree.tree_leaves((inputs, keywords)) if isinstance(t, Tensor)]
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    if any(t.device.type == "meta" for t in (*tensors, *parameters)):
        raise ValueError("torch.compile has no meta device: put model and inputs on another")
    device = tensors[0].device.type if tensors else "cpu"
    region = torch.autocast(device, autocast) if autocast else contextlib.nullcontext()
    with _as_asked(model, channels_last, freeze, train_bn), region:
        try:
            tracing.trace(model, inputs, on_graph, keywords, dynamic=dynamic, on_call=on_call)
        except tracing.ValuesNeeded as error:
            raise ValueError(
                f"the model reads values of tensors ({error}), as .item() does, which cannot be "
                "traced without running it; explain a part of the model that does not"
            ) from error
        except tracing.ModelError as error:
            # Of Dynamo's many lines, only what the model's own call raised.
            raised = re.search(r"got (\w+\(.*\))", str(error))
            line = raised.group(1) if raised else str(error).strip().partition("\n")[0]
            raise ValueError(f"the model does not run on these inputs: {line}") from error
    records += _not_compiled(model, taken)
    return Explanation(tuple(records), total)


def _not_compiled(model: Callable[..., Any], taken: set[int]) -> list[Record]:
    """Records of the batch norms of a module that no graph takes a tensor of, given by id."""
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    norms = [(p.replace("_orig_mod.", ""), m) for p, m in modules if isinstance(m, _BatchNorm)]
    return [
        Record("scale_gradient", "batch norm", Code.NOT_COMPILED, batch_norm=path)
        for path, m in norms
        if (tensors := {*map(id, (*m.parameters(), *m.buffers()))}) and tensors.isdisjoint(taken)
    ]


@contextlib.contextmanager
def _as_asked(
    model: Callable[..., Any], channels_last: bool, freeze: Sequence[str], train_bn: bool
) -> Iterator[None]:
    """Have other parameters of a module trained, or 4-d ones channels-last, and undo it."""
    if not (channels_last or freeze or train_bn):
        yield
        return
    if not isinstance(model, nn.Module):
        raise TypeError(f"channels_last, freeze and train_bn need a module, got {model!r}")
    parameters = {n.replace("_orig_mod.", ""): p for n, p in model.named_parameters()}
    frozen: set[str] = set()
    for pattern in freeze:
        found = fnmatch.filter(parameters, pattern)
        if not found:
            some = ", ".join([*parameters][:3])
            raise ValueError(f"freeze: {pattern!r} matches no parameter; the model has {some}, ...")
        frozen.update(found)
    before = [(p, p.requires_grad, p.data) for p in parameters.values()]
    kinds = _BatchNorm if train_bn else ()
    trained = {p for m in model.modules() if isinstance(m, kinds) for p in m.parameters()}
    try:
        for name, p in parameters.items():
            p.requires_grad_(p in trained or (p.requires_grad and name not in frozen))
            if channels_last and p.dim() == 4:
                p.data = p.data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for p, requires_grad, data in before:
            p.requires_grad_(requires_grad)
            p.data = data


def _in_channels_last(t: Tensor) -> Tensor:
    if t.dim() != 4:
        return t
    return t.detach().contiguous(memory_format=torch.channels_last).requires_grad_(t.requires_grad)
