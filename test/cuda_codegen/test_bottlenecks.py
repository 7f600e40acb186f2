"""What Inductor generates for an H100: figures, registers and values, for a stack of bottlenecks.

Each test starts a process (``bottlenecks.py``) in which a CUDA build of PyTorch believes in a GPU.
Record the figures again, for the version that is installed, with
``EXPECTTEST_ACCEPT=1 pytest -n0 test/cuda_codegen``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unittest
from pathlib import Path
from typing import Any

import torch
from expecttest import TestCase

PROGRAM = Path(__file__).with_name("bottlenecks.py")
MODES = ("eval", "builtin", "ours", "deploy")
TEMPLATES = ("eval-gemm-templates", "eval-conv-templates")
VERSION = ".".join(torch.__version__.split(".")[:2])


def run(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(PROGRAM), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(PROGRAM.parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    found: dict[str, Any] = json.loads(done.stdout)
    assert list(found) == list(arguments[3:])
    return found


def table(found: dict[str, Any]) -> str:
    """Kernels and library calls of each phase, bytes that kernels move, bytes saved, the peak."""
    lines = []
    for name, result in found.items():
        v = result["values"]
        cells = [name]
        for phase in ("forward", "backward"):
            if f"{phase}_kernels" in v:
                cells.append(f"{v[f'{phase}_kernels']} + {v[f'{phase}_library_calls']}")
                cells.append(f"{v[f'{phase}_kernel_bytes']:,}")
        cells += [f"{v['saved_bytes']:,}", f"{v['peak_bytes']:,}"]
        lines.append(" | ".join(cells) + "\n")
    return "".join(lines)


needs_cuda_build = unittest.skipIf(torch.version.cuda is None, "needs a CUDA build of PyTorch")


@needs_cuda_build
class TestFigures(TestCase):
    maxDiff = None

    def lower(self, precision: str, protocol: str, *providers: str) -> str:
        """The table, after a check that every kernel compiles for an H100, without spills."""
        found = run("lower", precision, protocol, *providers)
        for name, result in found.items():
            if name not in TEMPLATES:  # a GPU would time their configurations; this is the first
                self.assertEqual(result["spills"], [], name)
        self.assertGreater(sum(result["compiled"] for result in found.values()), 0)
        if VERSION not in ("2.11", "2.14"):
            self.skipTest("figures are recorded for torch 2.11 and 2.14")
        return table(found)

    def test_training_float32(self):
        found = self.lower("float32", "all", *MODES)
        if VERSION == "2.11":
            self.assertExpectedInline(
                found,
                """\
eval | 8 + 9 | 1,130,447,872 | 33 + 10 | 2,552,184,224 | 873,529,344 | 939,360,160
builtin | 22 + 9 | 1,131,684,864 | 34 + 10 | 1,573,602,976 | 424,566,528 | 503,893,152
ours | 9 + 9 | 1,221,968,896 | 34 + 10 | 1,408,582,304 | 207,192,064 | 297,618,080
deploy | 8 + 9 | 1,130,434,816 | 26 + 10 | 1,571,748,000 | 423,952,384 | 503,279,008
""",
            )
        else:
            self.assertExpectedInline(
                found,
                """\
eval | 8 + 9 | 1,130,447,872 | 35 + 10 | 2,962,706,848 | 668,008,448 | 824,205,216
builtin | 22 + 9 | 1,183,065,088 | 35 + 10 | 1,830,504,096 | 270,425,856 | 464,581,280
ours | 9 + 9 | 1,221,968,896 | 35 + 10 | 1,871,004,320 | 207,192,064 | 413,163,424
deploy | 8 + 9 | 1,181,815,040 | 27 + 10 | 1,828,649,120 | 269,811,712 | 464,539,552
""",
            )

    def test_training_bfloat16(self):
        found = self.lower("bf16-autocast", "all", *MODES)
        if VERSION == "2.11":
            self.assertExpectedInline(
                found,
                """\
eval | 19 + 9 | 638,339,056 | 42 + 10 | 1,308,309,024 | 469,694,848 | 502,612,256
builtin | 25 + 9 | 638,353,904 | 33 + 10 | 803,034,400 | 244,909,440 | 278,404,256
ours | 20 + 9 | 678,479,856 | 42 + 10 | 715,583,392 | 130,619,776 | 174,992,416
deploy | 19 + 9 | 638,326,000 | 34 + 10 | 802,402,592 | 244,906,368 | 278,400,544
""",
            )
        else:
            self.assertExpectedInline(
                found,
                """\
eval | 19 + 9 | 638,339,056 | 44 + 10 | 2,078,493,216 | 366,934,400 | 663,396,640
builtin | 25 + 9 | 689,734,128 | 34 + 10 | 1,214,076,192 | 193,529,216 | 380,813,600
ours | 20 + 9 | 678,479,856 | 37 + 10 | 1,204,268,960 | 130,619,776 | 329,433,376
deploy | 19 + 9 | 689,706,224 | 35 + 10 | 1,213,444,384 | 193,526,144 | 380,809,504
""",
            )

    def test_inference_float32(self):
        found = self.lower("float32", "inference", *MODES, "ours-fold", "ours-auto")
        self.assertExpectedInline(
            found,
            """\
eval | 8 + 9 | 1,104,757,760 | 0 | 256,901,120
builtin | 16 + 9 | 1,105,988,608 | 0 | 256,901,120
ours | 8 + 9 | 1,104,757,760 | 0 | 256,901,120
deploy | 8 + 9 | 1,104,744,704 | 0 | 256,901,120
ours-fold | 5 + 9 | 412,358,912 | 0 | 257,477,632
ours-auto | 8 + 9 | 1,104,757,760 | 0 | 256,901,120
""",
        )

    def test_inference_bfloat16(self):
        found = self.lower("bf16-autocast", "inference", *MODES, "ours-fold", "ours-auto")
        # Before, what is cast after has no lists (passes/batched_weights.py).
        if VERSION == "2.11":
            folded = "21 + 9 | 265,842,800 | 0 | 128,450,560"
        else:
            folded = "8 + 9 | 266,457,200 | 0 | 128,738,816"
        self.assertIn(f"ours-fold | {folded}\n", found)
        self.assertExpectedInline(
            found.replace(folded, "..."),
            """\
eval | 19 + 9 | 612,648,944 | 0 | 128,450,560
builtin | 19 + 9 | 612,657,648 | 0 | 128,450,560
ours | 19 + 9 | 612,648,944 | 0 | 128,450,560
deploy | 19 + 9 | 612,635,888 | 0 | 128,450,560
ours-fold | ...
ours-auto | 19 + 9 | 612,648,944 | 0 | 128,450,560
""",
        )

    def test_inference_by_templates(self):
        """Inductor's own: what follows a layer is computed in its kernel (2.11: if timed so)."""
        found = self.lower("float32", "inference", "eval", *TEMPLATES)
        if VERSION == "2.11":
            self.assertExpectedInline(
                found,
                """\
eval | 8 + 9 | 1,104,757,760 | 0 | 256,901,120
eval-gemm-templates | 13 + 4 | 1,413,833,632 | 0 | 256,901,120
eval-conv-templates | 17 + 0 | 1,812,428,448 | 0 | 256,901,120
""",
            )
        else:
            self.assertExpectedInline(
                found,
                """\
eval | 8 + 9 | 1,104,757,760 | 0 | 256,901,120
eval-gemm-templates | 8 + 4 | 1,169,777,568 | 0 | 256,901,120
eval-conv-templates | 12 + 0 | 1,568,372,384 | 0 | 256,901,120
""",
            )

    def test_frozen_layers_and_options(self):
        found = self.lower("float32", "bn-tuning", "eval", "ours", "ours-speed", "frozen")
        if VERSION == "2.11":
            self.assertExpectedInline(
                found,
                """\
eval | 8 + 9 | 1,130,447,872 | 33 + 9 | 2,141,141,920 | 873,529,344 | 939,294,624
ours | 9 + 9 | 1,221,968,896 | 35 + 9 | 2,211,870,624 | 464,093,184 | 660,518,816
ours-speed | 9 + 9 | 1,221,968,896 | 35 + 9 | 2,211,870,624 | 464,093,184 | 660,518,816
frozen | 9 + 9 | 1,221,968,896 | 34 + 10 | 1,407,966,880 | 207,192,064 | 297,405,088
""",
            )
        else:
            self.assertExpectedInline(
                found,
                """\
eval | 8 + 9 | 1,130,447,872 | 35 + 9 | 2,757,185,952 | 668,008,448 | 733,773,728
ours | 9 + 9 | 1,221,968,896 | 36 + 9 | 2,622,912,416 | 464,093,184 | 647,473,056
ours-speed | 9 + 9 | 1,221,968,896 | 36 + 9 | 2,622,912,416 | 464,093,184 | 647,473,056
frozen | 9 + 9 | 1,221,968,896 | 35 + 10 | 1,870,388,896 | 207,192,064 | 412,589,984
""",
            )

    def test_batch_norms_alone_bfloat16(self):
        """Of masked gradients what is stored is in bfloat16 (passes/repeated_casts.py)."""
        found = self.lower("bf16-autocast", "bn-tuning", "eval", "ours")
        if VERSION == "2.11":
            self.assertExpectedInline(
                found,
                """\
eval | 19 + 9 | 638,339,056 | 34 + 9 | 1,101,871,008 | 450,408,448 | 483,293,088
ours | 20 + 9 | 678,479,856 | 36 + 9 | 1,121,186,720 | 240,070,656 | 332,828,576
""",
            )
        else:
            self.assertExpectedInline(
                found,
                """\
eval | 19 + 9 | 638,339,056 | 36 + 9 | 1,974,816,160 | 347,648,000 | 515,094,432
ours | 20 + 9 | 678,479,856 | 37 + 9 | 1,583,608,736 | 240,070,656 | 412,333,984
""",
            )


@needs_cuda_build
class TestValues(TestCase):
    def interpret(self, precision: str, protocol: str, *providers: str) -> dict[str, Any]:
        """Run; as ``testing.assert_numerics`` does, judge errors by the largest of eager mode."""
        found = run("interpret", precision, protocol, *providers)
        dtype = torch.float32 if precision == "float32" else torch.bfloat16
        for name, result in found.items():
            largest = max(eager for _, eager in result["errors"].values())
            allowed = 2 * largest + 8 * torch.finfo(dtype).eps
            for tensor, (error, eager) in result["errors"].items():
                message = f"{name}, {tensor}: {error:.1e}, in eager mode {eager:.1e}"
                self.assertLessEqual(error, allowed, message)
        return found

    def test_training_float32(self):
        found = self.interpret("float32", "all", *MODES)
        self.assertTrue(found["ours"]["same_bits"])

    def test_training_bfloat16(self):
        self.interpret("bf16-autocast", "all", *MODES)

    def test_inference(self):
        found = self.interpret("float32", "inference", *MODES, "ours-fold", *TEMPLATES)
        self.assertTrue(found["ours"]["same_bits"])

    def test_frozen_layers(self):
        self.interpret("float32", "bn-tuning", "eval", "frozen")

    def test_batch_norms_alone_bfloat16(self):
        self.interpret("bf16-autocast", "bn-tuning", "ours")
