"""Random graphs of layers, batch norms and hazards: never anything but what eval mode does.

By default 24 examples, always the same. ``CONVBN_FUZZ_EXAMPLES=5000`` draws that many, and
``CONVBN_FUZZ_SEED=7`` other ones; a failing example prints as source code.
"""

from __future__ import annotations

import collections
import contextlib
import warnings
from functools import partial

import hypothesis
import torch
from common import fuzz
from oracle import assert_same_as_unfused
from random_graphs import RandomFunction, random_functions


class TestRandomGraphs:
    def check(self, function: RandomFunction, codes: collections.Counter) -> None:
        def ambient():
            if function.ambient_autocast:
                return torch.autocast("cpu", dtype=torch.bfloat16)
            return contextlib.nullcontext()

        autocast = function.ambient_autocast or "autocast" in function.source
        dtypes = {t.dtype for t in function.tensors} & {torch.bfloat16, torch.float16}
        dtypes |= {torch.bfloat16 if autocast else torch.float32}
        with warnings.catch_warnings():
            # Autograd points at the operation that a raised error is about.
            warnings.simplefilter("ignore")
            recorder = assert_same_as_unfused(
                function.function(),
                function.arguments,
                make_function=function.function,
                double=partial(function.arguments, double=True),
                make_double_function=partial(function.function, double=True),
                context=ambient,
                always=False,
                computed_in=max(dtypes, key=lambda dtype: torch.finfo(dtype).eps),
                dynamic=function.dynamic,
            )
        codes.update(code.name for code in recorder.codes)
        codes["functions"] += 1
        codes["functions with a fused pair"] += recorder.fused > 0

    def test_random_functions(self) -> None:
        codes: collections.Counter = collections.Counter()

        @fuzz(24)
        @hypothesis.given(random_functions())
        def check(function: RandomFunction) -> None:
            self.check(function, codes)

        check()
        print(dict(codes.most_common()))
        # Else the draws test nothing.
        assert codes["functions with a fused pair"] > codes["functions"] // 3
