"""Which jobs a run consists of, and in what order."""

from __future__ import annotations

from typing import Any

from .cases import CASES, Case
from .protocols import PROTOCOLS
from .providers import BUDGETS, PROVIDERS
from .runner import Job
from .workload import PRECISIONS, Settings

__all__ = ["SUITES", "cuda_settings", "custom", "dry_run", "gpu", "gpu_forward", "settings_of"]

SAVED = ("eval", "builtin", "ours", "deploy")
TRAINING = ("eval", "ours", "deploy", "builtin")  # those worth most first
INFERENCE = ("eval", "ours", "deploy", "builtin", "freezing")
FOLDED_INFERENCE = ("eval", "ours-auto", "freezing")
FOLDED_TRAINING = ("eval", "ours", "ours-auto", "deploy")
FORWARD = ("eval", "ours-fold", "freezing", "eval-gemm-templates", "eval-conv-templates")
BUDGETED = tuple(f"{who}-budget-{b}" for b in BUDGETS for who in ("eval", "ours"))
EAGER = ("eager-eval", "eager-tune", "eager-ours")

_GB = 10**9
_GPU_CAP = 20 * _GB


def settings_of(case: Case, *, small: bool = False, **fields: Any) -> Settings:
    """Settings of a case at its real size, or at the size for a laptop's CPU."""
    batch, shape = (case.small_batch, case.small_shape) if small else (case.batch, case.shape)
    return Settings(**{"case": case.name, "batch": batch, "shape": shape, **fields})


def _saved(name: str, providers: tuple[str, ...] = SAVED, **fields: Any) -> Job:
    fields.setdefault("precision", CASES[name].precision)
    return Job("saved", settings_of(CASES[name], **fields), providers)


def _measured(name: str, device: str, providers: tuple[str, ...], **fields: Any) -> Job:
    settings = settings_of(CASES[name], small=device == "cpu", device=device, **fields)
    return Job("measure", settings, providers)


def quick(device: str) -> list[Job]:
    """Ten networks and the protocols exactly, a few measured; under 10 minutes on 2 cores."""
    names = (
        "resnet18",
        "resnet50",
        "vgg16_bn",
        "mobilenet_v2",
        "repvgg_a0",
        "r50_max",
        "r50_hybrid",
        "unet",
        "dcgan_generator",
        "timeseries_fcn",
    )
    jobs = [_saved(name) for name in names]
    jobs += [_saved("resnet18", protocol=p) for p in _OTHER_PROTOCOLS]
    jobs += [_saved("resnet18", BUDGETED)]
    jobs += [_measured("resnet18", device, TRAINING)]
    jobs += [_measured("timeseries_fcn", device, ("eval", "ours", "deploy"))]
    jobs += [_measured("timeseries_fcn", device, INFERENCE, protocol="inference")]
    return jobs


_OTHER_PROTOCOLS = ("frozen-stages", "frozen-bn", "bn-tuning", "adversarial")
_VARIED = ("resnet50", "mobilenet_v2", "repvgg_a0", "faster_rcnn_resnet50")


def paper(device: str) -> list[Job]:
    """Every exact metric: all networks at real sizes, all protocols, precisions, budgets."""
    # The narrow one only measures the time of Python code; nobody trains a network that small.
    jobs = [_saved(name) for name in CASES if name != "resnet18_narrow"]
    for name in _VARIED:
        protocols = [p for p in _OTHER_PROTOCOLS if p != "frozen-stages"]
        if CASES[name].first_stages:
            protocols.insert(0, "frozen-stages")
        jobs += [_saved(name, protocol=p) for p in protocols]
    jobs += [_saved(name, BUDGETED) for name in ("resnet50", "faster_rcnn_resnet50")]
    jobs += [_saved(name, protocol="perceptual-loss") for name in ("vgg19", "vgg16_bn")]
    jobs += [_saved("dcgan_discriminator", protocol="gan-discriminator")]
    others = [p for p in PRECISIONS if p != "float32"]
    jobs += [_saved("resnet50", precision=p) for p in others]
    jobs += [_saved("resnet50", memory_format="channels_last")]
    jobs += [_saved("resnet50", dynamic=True)]
    return jobs


def full(device: str) -> list[Job]:
    """``paper``, and everything measured on ``device``. Takes hours on a CPU."""
    everyone = (*TRAINING, "ours-speed", *EAGER)
    jobs = paper(device)
    jobs += [_measured(name, device, everyone) for name in CASES if CASES[name].batch <= 128]
    jobs += [_measured(name, device, (*TRAINING, *BUDGETED)) for name in ("resnet18", "resnet50")]
    jobs += [_measured("resnet50", device, TRAINING, protocol=p) for p in _OTHER_PROTOCOLS]
    jobs += [
        _measured(name, device, INFERENCE, protocol="inference")
        for name in ("resnet18", "resnet50", "mobilenet_v2", "repvgg_a0", "r50_hybrid")
    ]
    jobs += [
        _measured("resnet50", device, TRAINING, **fields)
        for fields in (
            {"memory_format": "channels_last"},
            {"precision": "bf16-autocast"},
            {"precision": "bf16-autocast", "memory_format": "channels_last"},
            {"precision": "bf16"},
            {"dynamic": True},
        )
    ]
    return [*jobs, *_capacity(device)]


def _capacity(device: str) -> list[Job]:
    providers = ("eval", "builtin", "ours", "deploy")
    if device == "cpu":
        settings = settings_of(CASES["resnet18"], small=True)
        return [Job("capacity", settings, providers, cap_bytes=_GB // 2)]
    settings = settings_of(CASES["resnet50"], device=device)
    return [Job("capacity", settings, providers, cap_bytes=_GPU_CAP)]


_FOLDED = ("resnet50", "mobilenet_v2", "resnext50_32x4d", "regnet_y_1_6gf", "repvgg_a0")


def _at_batch(name: str, batch: int, device: str, providers: tuple[str, ...], **fields: Any) -> Job:
    settings = settings_of(CASES[name], batch=batch, device=device, **fields)
    return Job("measure", settings, providers)


def forward(device: str) -> list[Job]:
    """Forward folding: inference at several batch sizes, and training, at real sizes."""

    def inference(batch: int, *more: str) -> list[Job]:
        providers = (*FOLDED_INFERENCE, *more)
        return [_at_batch(name, batch, device, providers, protocol="inference") for name in _FOLDED]

    # On some CPUs the weight gradient of its first stage corrupts memory: docs/pytorch-faults.md.
    protocols = {"repvgg_a0": "frozen-stages"}
    training = [
        _at_batch(name, 8, device, FOLDED_TRAINING, protocol=protocols.get(name, "all"))
        for name in _FOLDED
    ]
    # "ours" once: the more networks take turns, the less the caches have of each.
    return [*inference(8, "ours"), *inference(1), *training, *inference(32)]


def eager(device: str) -> list[Job]:
    """Steps without ``torch.compile``: from where Python takes most of the time to where none."""
    resnet18 = CASES["resnet18"]
    sizes = [settings_of(CASES["resnet18_narrow"], device=device)]
    sizes += [settings_of(resnet18, batch=8, shape=(3, s, s), device=device) for s in (96, 224)]
    return [Job("measure", settings, EAGER) for settings in sizes]


def gpu_forward(device: str = "cuda") -> list[Job]:
    """Forward folding on a GPU, most valuable first, for a run that may be cut off."""

    def inference(name: str, batch: int, precision: str, memory_format: str) -> Job:
        providers = (*FOLDED_INFERENCE, "builtin")
        fields = {"precision": precision, "memory_format": memory_format}
        return _at_batch(name, batch, device, providers, protocol="inference", **fields)

    formats = [
        (precision, memory_format)
        for precision in ("bf16-autocast", "float32", "fp16-autocast")
        for memory_format in ("channels_last", "contiguous")
    ]
    usual = {"precision": "bf16-autocast", "memory_format": "channels_last"}
    return [
        inference("resnet50", 32, *formats[0]),
        inference("resnet50", 32, *formats[2]),
        _at_batch("resnet50", 32, device, FOLDED_TRAINING, **usual),
        *(inference("resnet50", batch, *formats[0]) for batch in (1, 8)),
        *(inference("resnet50", 32, *each) for each in (formats[1], *formats[3:])),
        *(inference(name, 32, *formats[0]) for name in _FOLDED[1:]),
        *(_at_batch(name, 32, device, FOLDED_TRAINING) for name in _FOLDED[:2]),
        *(inference(name, 32, *each) for each in formats[1:] for name in _FOLDED[1:]),
        *(inference(name, batch, *formats[0]) for batch in (1, 8) for name in _FOLDED[1:]),
    ]


def gpu(device: str = "cuda") -> list[Job]:
    """What is wanted of a GPU, most valuable first, for a run that may be cut off."""
    plain = {"memory_format": "channels_last"}
    fast = {"precision": "bf16-autocast", **plain}
    everyone = (*TRAINING, "eval-budget-0.5")
    # At a batch of their own, so that each takes turns with those that it is compared with.
    graphs = ("eval", "eval-graphs", "ours", "ours-graphs", "deploy-graphs")
    templates = ("eval", "ours-fold", "eval-gemm-templates", "eval-conv-templates")
    detectors = ("resnet101", "resnext101", "regnetx", "hrnet_w32", "repvgg_fp16")
    return [
        _measured("resnet50", device, everyone, **fast),
        _measured("resnet50", device, everyone, **plain),
        _measured("resnet50", device, ("eval", "ours"), protocol="adversarial", **fast),
        _measured("resnet50", device, ("eval", "ours"), protocol="bn-tuning", **fast),
        _measured("faster_rcnn_resnet50", device, TRAINING, **plain),
        _measured("resnet50", device, INFERENCE, protocol="inference", **fast),
        *_capacity(device),
        _at_batch("resnet50", 32, device, graphs, **fast),
        _at_batch("resnet50", 32, device, templates, protocol="inference", **fast),
        *(
            _measured(f"faster_rcnn_{name}", device, ("eval", "ours", "deploy"), **plain)
            for name in detectors
        ),
        _measured("resnet50", device, ("eval-budget-0.7", "eval-budget-0.3"), **plain),
        _measured("resnet50", device, EAGER, **plain),
        *(_measured(name, device, TRAINING, **plain) for name in ("repvgg_a0", "mobilenet_v2")),
    ]


def dry_run(jobs: list[Job]) -> list[Job]:
    """The same workloads and compiled providers, lowered for a pretended GPU, not measured."""
    return [
        Job("cuda-codegen", job.settings, names)
        for job in jobs
        if (names := tuple(p for p in job.providers if PROVIDERS[p].compiled))
    ]


def cuda_codegen(device: str = "cuda") -> list[Job]:
    """Code for CUDA without a GPU, as people train there: channels-last, and under autocast."""
    jobs = []
    for protocol in ("all", *_OTHER_PROTOCOLS, "inference"):
        for name in _VARIED:
            if protocol == "frozen-stages" and not CASES[name].first_stages:
                continue
            both = protocol in ("all", "bn-tuning", "adversarial")
            precisions = ("float32", "bf16-autocast") if both else ("float32",)
            jobs += [
                Job("cuda-codegen", cuda_settings(CASES[name], protocol, precision), SAVED)
                for precision in precisions
            ]
    jobs += [
        Job("cuda-codegen", cuda_settings(CASES["resnet50"], "inference", precision), FORWARD)
        for precision in ("float32", "bf16-autocast")
    ]
    return jobs


def cuda_settings(case: Case, protocol: str, precision: str, **fields: Any) -> Settings:
    """Settings of a case at its real size for code that is generated for CUDA."""
    usual = {"memory_format": "channels_last", "device": "cuda"}
    return settings_of(case, protocol=protocol, precision=precision, **{**usual, **fields})


SUITES = {
    "quick": quick,
    "paper": paper,
    "full": full,
    "forward": forward,
    "eager": eager,
    "gpu": gpu,
    "gpu-forward": gpu_forward,
    "cuda-codegen": cuda_codegen,
}


def custom(
    cases: list[Case], metrics: list[str], providers: list[str], small: bool, **fields: Any
) -> list[Job]:
    """Jobs for cases that were named on the command line; no ``providers`` means the usual ones."""
    protocol = PROTOCOLS[fields.get("protocol", "all")]
    usual = {"saved": SAVED, "measure": TRAINING if protocol.trains else INFERENCE}
    jobs = []
    for case in cases:
        for metric in metrics:
            device = "cpu" if metric == "saved" else fields.get("device", "cpu")
            settings = settings_of(
                case, small=small and metric != "saved", **{**fields, "device": device}
            )
            names = tuple(providers) or usual.get(metric, SAVED)
            cap = 0 if metric != "capacity" else _GB // 2 if device == "cpu" else _GPU_CAP
            jobs.append(Job(metric, settings, names, cap))
    return jobs
