"""Who runs a workload: eager and compiled eval mode, PyTorch's pass, ours, and the limits."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config

import convbn_inductor_pass
from convbn_inductor_pass import plugin
from convbn_inductor_pass.saved_tensors import Mode

from .module_pairs import merge, tune_eagerly
from .protocols import Protocol
from .workload import Workload

__all__ = ["BUDGETS", "PROVIDERS", "Provider"]

Transform = Callable[[nn.Module, tuple[Any, ...]], nn.Module]

# Fractions of eval mode's activation memory that the partitioner may save; see
# torch._functorch.config.activation_memory_budget. It recomputes the rest in backward.
BUDGETS = (0.9, 0.7, 0.5, 0.3)


@dataclasses.dataclass(frozen=True)
class Provider:
    """One way to run a network.

    Attributes:
        name: as given on the command line and in result files.
        title: in reports.
        mode: what :func:`convbn_inductor_pass.saved_tensors.saved_for_backward` calls it.
        compiled: whether ``torch.compile`` is used.
        transform: makes another module of the network first.
        inductor, functorch, options: settings that differ from the defaults, the last ones
            of :class:`convbn_inductor_pass.Options`.
        trains, infers: for which protocols it makes sense.
    """

    name: str
    title: str
    mode: Mode = "eval"
    compiled: bool = True
    transform: Transform | None = None
    inductor: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    functorch: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    trains: bool = True
    infers: bool = True

    def is_for(self, protocol: Protocol) -> bool:
        return self.trains if protocol.trains else self.infers

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Configure compilation for this provider, with no cached graphs in use."""
        ours, flag = self.mode == "tune", self.mode in ("tune", "builtin")
        with (
            plugin.installation(ours),
            inductor_config.patch(
                efficient_conv_bn_eval_fx_passes=flag,
                fx_graph_cache=False,
                fx_graph_remote_cache=False,
                **self.inductor,
            ),
            functorch_config.patch(
                enable_autograd_cache=False,
                force_non_lazy_backward_lowering=True,
                **self.functorch,
            ),
            convbn_inductor_pass.options(**self.options),
        ):
            yield

    def prepare(self, workload: Workload) -> tuple[nn.Module, Callable[..., Any]]:
        """The module whose parameters train, and the function to call; compiles nothing yet.

        Providers of one workload share no parameters, so that each has gradients of its own.
        """
        if self.transform is not None:
            example = tuple(x.detach()[:2] for x in workload.inputs)
            model = self.transform(workload.model, example)
        else:
            model = copy.deepcopy(workload.model)
        if not self.compiled:
            return model, model
        dynamic = workload.settings.dynamic
        return model, torch.compile(model, backend=_fresh_backend(), dynamic=dynamic)


def _fresh_backend() -> Callable[..., Any]:
    """Inductor as a backend of its own.

    Dynamo guards on the backend but not on Inductor's configuration, and copies of a module
    share compiled code. With one backend object per provider, providers never get each other's.
    """

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        compiled: Any = compile_fx(gm, example_inputs)
        return compiled

    return backend


def _turned_on(model: nn.Module, inputs: tuple[Any, ...]) -> nn.Module:
    return convbn_inductor_pass.turn_on(copy.deepcopy(model))


def _budget(budget: float) -> dict[str, Any]:
    return {"activation_memory_budget": budget}


# What a user may turn on beside: mode="reduce-overhead", and the two halves of "max-autotune".
_TEMPLATES = {"max_autotune_gemm": True, "max_autotune_gemm_backends": "ATEN,TRITON"}
_MORE: dict[str, dict[str, Any]] = {
    "graphs": {"triton.cudagraphs": True},
    "gemm-templates": {**_TEMPLATES, "max_autotune_conv_backends": "ATEN"},
    "conv-templates": {**_TEMPLATES, "max_autotune_conv_backends": "ATEN,TRITON"},
}
_WITH_MORE: tuple[tuple[str, str, Mode, Transform | None], ...] = (
    ("eval", "eval mode", "eval", None),
    ("builtin", "PyTorch's pass", "builtin", None),
    ("ours", "ours", "tune", None),
    ("deploy", "deploy mode", "deploy", merge),
)

PROVIDERS: dict[str, Provider] = {
    p.name: p
    for p in (
        Provider("eval", "eval mode, compiled"),
        Provider("builtin", "PyTorch's pass", mode="builtin"),
        Provider("ours", "convbn_inductor_pass", mode="tune"),
        Provider("deploy", "deploy mode (merged)", mode="deploy", transform=merge),
        *(
            Provider(
                f"eval-budget-{b}", f"eval mode, budget {b}", functorch=_budget(b), infers=False
            )
            for b in BUDGETS
        ),
        *(
            Provider(
                f"ours-budget-{b}",
                f"ours, budget {b}",
                mode="tune",
                functorch=_budget(b),
                infers=False,
            )
            for b in BUDGETS
        ),
        Provider("ours-speed", "ours, for speed", mode="tune", options={"objective": "speed"}),
        *(
            Provider(f"ours-{f}", f"ours, forward={f}", mode="tune", options={"forward": f})
            for f in ("fold", "auto")
        ),
        Provider(
            "ours-combined",
            "ours, combo_kernels",
            mode="tune",
            inductor={"combo_kernels": True},
            infers=False,
        ),
        Provider(
            "deploy-combined",
            "deploy mode, combo_kernels",
            mode="deploy",
            transform=merge,
            inductor={"combo_kernels": True},
            infers=False,
        ),
        *(
            Provider(
                f"{who}-{how}",
                f"{title}, {how.replace('-', ' ')}",
                mode=mode,
                transform=transform,
                inductor=inductor,
            )
            for who, title, mode, transform in _WITH_MORE
            for how, inductor in _MORE.items()
        ),
        Provider("eager-eval", "eval mode, eager", compiled=False),
        Provider(
            "eager-tune", "tune mode, eager", mode="tune", compiled=False, transform=tune_eagerly
        ),
        Provider("eager-ours", "turn_on, eager", mode="tune", compiled=False, transform=_turned_on),
        Provider("freezing", "freezing", inductor={"freezing": True}, trains=False),
    )
}
