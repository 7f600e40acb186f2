"""A pretended H100 for a CUDA build of PyTorch. Import this before PyTorch; tensors must be fake.

It holds until the process ends. What asks the driver is answered in two small libraries
(``driver.cpp``, ``guard.cpp``), what asks ``torch.cuda`` or Triton's driver here. Inductor and
Dynamo copy functions of ``torch.cuda`` as they are imported, so they must come later, too.
"""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

__all__ = ["CAPABILITY", "PROPERTIES"]

if "torch" in sys.modules:
    raise ImportError("the GPU has to be pretended before PyTorch is imported")

_HERE = Path(__file__).parent
CAPABILITY = (9, 0)


def _root(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(f"needs {package}, which CUDA builds of PyTorch bring")
    return Path(spec.origin).parent


def _load(name: str, *arguments: str) -> ctypes.CDLL:
    """Compile a library beside this file and load it with its symbols global."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / f"{name}.so"
        command = ["g++", "-shared", "-fPIC", "-O1", str(_HERE / f"{name}.cpp"), *arguments]
        subprocess.run([*command, "-o", str(library)], check=True)
        return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


_load("driver", "-Wl,-soname,libcuda.so.1", f"-I{_root('triton')}/backends/nvidia/include")

import torch  # noqa: E402

if torch.version.cuda is None:
    raise ImportError(f"needs a CUDA build of PyTorch, and {torch.__version__} is none")

PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    multi_processor_count=132,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    total_memory=84929347584,
    L2_cache_size=52428800,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    clock_rate=1980000,
    memory_clock_rate=2619000,
    memory_bus_width=5120,
    gcnArchName="",
    uuid="0",
    is_integrated=False,
    is_multi_gpu_board=False,
)


def _pretend_in_torch() -> None:
    root = _root("torch")
    guard = _load("guard", "-std=c++20", f"-I{root}/include", f"-L{root}/lib", "-lc10")
    guard.install_guard()
    stream = types.SimpleNamespace(cuda_stream=0, stream_id=0, device_index=0, device_type=1)

    def always(value: Any) -> Any:
        return lambda *args, **kwargs: value

    answers = {
        "is_available": True,
        "is_initialized": True,
        "_is_in_bad_fork": False,
        "_lazy_init": None,
        "init": None,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "get_device_properties": PROPERTIES,
        "get_device_name": PROPERTIES.name,
        "get_device_capability": CAPABILITY,
        "get_arch_list": ["sm_90"],
        "is_bf16_supported": True,
        "is_tf32_supported": True,
        "mem_get_info": (PROPERTIES.total_memory, PROPERTIES.total_memory),
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "reset_peak_memory_stats": None,
        "empty_cache": None,
        "synchronize": None,
        "current_stream": stream,
        "is_current_stream_capturing": False,
        "manual_seed": None,
        "manual_seed_all": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
    }
    for name, value in answers.items():
        setattr(torch.cuda, name, always(value))
    torch.cuda.graphs.is_current_stream_capturing = always(False)
    for name, value in {
        "_ensureCUDADeviceGuardSet": None,
        "_cuda_getCurrentRawStream": 0,
        "_cuda_setDevice": None,
    }.items():
        setattr(torch._C, name, always(value))


def _pretend_in_fake_tensors() -> None:
    from torch._subclasses import fake_tensor as module

    fake_tensor: Any = module
    fake_tensor.init_gpu_context = lambda *args: None
    fake_tensor.FakeTensorMode.avoid_device_init = property(lambda self: True)


class _TritonDriver:
    """What Inductor and ``triton.compile`` ask of a driver."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], PROPERTIES.warp_size)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda


def _pretend_in_triton() -> None:
    import triton
    from torch._inductor.runtime import triton_helpers

    triton.runtime.driver.set_active(_TritonDriver())
    triton_helpers.set_driver_to_gpu = lambda: None


def _fold_constants_on_cpu() -> None:
    """What Inductor folds to constants it really computes: here on CPU."""
    from torch._inductor.fx_passes import joint_graph
    from torch.utils._python_dispatch import TorchDispatchMode

    class OnCPU(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = dict(kwargs or {})
            if kwargs.get("device") is not None:
                kwargs["device"] = torch.device("cpu")
            return func(*args, **kwargs)

    folder: Any = joint_graph.UniformValueConstantFolder
    deduce = folder._deduce_value

    def deduce_on_cpu(self: Any, node: Any) -> Any:
        with OnCPU():
            return deduce(self, node)

    folder._deduce_value = deduce_on_cpu


_pretend_in_torch()
_pretend_in_fake_tensors()
_pretend_in_triton()
_fold_constants_on_cpu()
