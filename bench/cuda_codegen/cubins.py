"""Compile generated kernels for the real device, with the assembler that Triton brings."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton
from torch._inductor.codecache import PyCodeCache
from triton.backends.compiler import GPUTarget

from .pretended_gpu import CAPABILITY, PROPERTIES

__all__ = ["Cubin", "compile_kernel"]

_TARGET = GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], PROPERTIES.warp_size)
_TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclasses.dataclass(frozen=True)
class Cubin:
    """A kernel in one of the configurations that Inductor would try.

    ``registers`` are per thread, ``spilled_bytes`` what of it lies in local memory instead.
    """

    kernel: str
    configuration: str
    registers: int
    spilled_bytes: int


def compile_kernel(name: str, source: str) -> Iterator[Cubin]:
    """Compile a kernel of Inductor's in each of its configurations."""
    tuner = getattr(PyCodeCache.load(source), name)
    for each in tuner.configs:
        constants = {**tuner.triton_meta.get("constants", {}), **each.kwargs}
        signature = {**tuner.triton_meta["signature"], **dict.fromkeys(constants, "constexpr")}
        (attributes,) = tuner.triton_meta["configs"]
        kernel = triton.compile(
            triton.compiler.ASTSource(tuner.fn, signature, constants, attributes),
            target=_TARGET,
            options={"num_warps": each.num_warps, "num_stages": each.num_stages},
        )
        registers, spilled = _usage(kernel.asm["cubin"])
        yield Cubin(name, str(each), registers, spilled)


def _usage(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_TOOL), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"{_TOOL.name} tells no registers: {text}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local
