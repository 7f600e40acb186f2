# Owner(s): ["oncall: cpu inductor"]
"""Bool masks in Inductor's C++ code: loaded and stored with vector instructions."""

import re
import shlex
import subprocess
import tempfile
import unittest
from pathlib import Path

import torch
from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions, is_gcc
from torch._inductor.cpu_vec_isa import VecAVX2, VecAVX512, pick_vec_isa
from torch._inductor.test_case import TestCase, run_tests
from torch._inductor.utils import run_and_get_cpp_code
from torch.testing import FileCheck
from torch.testing._internal.common_utils import (
    IS_WINDOWS,
    instantiate_parametrized_tests,
    parametrize,
)

ISA = pick_vec_isa()
IS_AVX512 = isinstance(ISA, VecAVX512)
HAS_ISA = isinstance(ISA, (VecAVX2, VecAVX512)) and not IS_WINDOWS


def store(x):
    return x <= 0


def load(mask, x):
    return torch.where(mask, 0, x)


def assembly(cpp_code):
    """What the compiler makes of the one kernel in ``cpp_code``, with Inductor's flags."""
    (source,) = re.findall(r"'''(.*?)'''", cpp_code, re.DOTALL)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cpp"
        path.write_text(source)
        builder = CppBuilder(
            name="kernel",
            sources=str(path),
            output_dir=folder,
            BuildOption=CppTorchOptions(vec_isa=ISA),
        )
        command = [*shlex.split(builder.get_command_line()), "-S"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        return Path(builder.get_target_file_path()).read_text()


class ByteMaskTestCase(TestCase):
    def compiled(self, fn, *args, dynamic=False):
        torch._dynamo.reset()
        compiled = torch.compile(fn, dynamic=dynamic)
        actual, code = run_and_get_cpp_code(compiled, *args)
        self.assertEqual(actual, fn(*args), rtol=0, atol=0)
        return code


@unittest.skipUnless(HAS_ISA and is_gcc(), "needs GCC for AVX2 or AVX512")
class TestCppByteMasks(ByteMaskTestCase):
    # 4096 elements: no tail, whose instructions would be beside those of whole vectors

    @parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
    def test_store(self, dtype):
        x = torch.randint(-2, 3, (4096,)).to(dtype)
        code = assembly(self.compiled(store, x))
        one_by_one = r"\tset[a-z]+\t"
        FileCheck().check("vptestmd" if IS_AVX512 else "vpacksswb").run(code)
        self.assertNotRegex(code, one_by_one)

    @parametrize("dtype", [torch.float64, torch.int64])
    def test_store_of_8_bytes(self, dtype):
        x = torch.randint(-2, 3, (4096,)).to(dtype)
        code = assembly(self.compiled(store, x))
        FileCheck().check("vptestmq" if IS_AVX512 else "vmovmskpd").run(code)

    @parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_load(self, dtype):
        x = torch.randn(4096).to(dtype)
        code = assembly(self.compiled(load, x > 0, x))
        FileCheck().check("vptestmb" if IS_AVX512 else "vpmovzxbd").run(code)


class TestCppByteMasksGuards(ByteMaskTestCase):
    """Right results, with and without vector instructions."""

    @parametrize("size", [1, 7, 15, 16, 31, 33, 63, 65, 129, 1000])
    def test_sizes(self, size):
        def fn(mask, *xs):
            return ~mask, [(x <= 0, torch.where(mask, 0, x), mask & (x > 1)) for x in xs]

        x = torch.randint(-2, 3, (size,))
        dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.int64)
        self.compiled(fn, torch.rand(size) > 0.5, *(x.to(dtype) for dtype in dtypes))

    def test_nan_and_zeros(self):
        x = torch.tensor([0.0, -0.0, 1.0, float("nan"), float("inf")]).repeat(100)
        self.compiled(lambda x: (x <= 0, x > 0, x == x, x.bool()), x)

    @parametrize("shape", [(40, 50), (64, 64), (3, 17)])
    def test_transposed(self, shape):
        x, mask = torch.randn(shape), torch.rand(shape) > 0.5
        self.compiled(lambda x, mask: torch.where(mask.t(), 0, x.t()) + 1, x, mask)
        self.compiled(lambda x: (x <= 0).t().contiguous(), x)

    def test_dynamic_size(self):
        for size in (31, 64):
            x = torch.randn(size)
            self.compiled(lambda x, m: (x <= 0, x * m), x, x > 0, dynamic=True)

    def test_masks_of_a_backward(self):
        def fn(x):
            return torch.nn.functional.relu6(x).sin()

        x = torch.randn(1003, requires_grad=True)
        fn(x).sum().backward()
        expected, x.grad = x.grad, None
        torch.compile(fn)(x).sum().backward()
        self.assertEqual(x.grad, expected)


instantiate_parametrized_tests(TestCppByteMasks)
instantiate_parametrized_tests(TestCppByteMasksGuards)

if __name__ == "__main__":
    run_tests()
