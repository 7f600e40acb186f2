"""``forward="auto"``: what is measured, what follows from it, and that nothing else does."""

from __future__ import annotations

import collections
import time

import pytest
import torch
from common import spread_statistics
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor import config as inductor_config
from torch._inductor.utils import fresh_cache

import convbn_inductor_pass as cbn
from convbn_inductor_pass import ForwardCode, _compat, testing, timing

pytestmark = pytest.mark.timed


@pytest.fixture(autouse=True)
def quick_and_alone(monkeypatch):
    """No timings of other runs, none left behind, and no care for how good they are."""
    monkeypatch.setattr(timing, "_last_level_cache", lambda: 1 << 16)
    with fresh_cache():
        yield


def block(*, transposed: bool = False, relu: bool = True) -> nn.Module:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layers = [kind(8, 8, 3, padding=1), nn.BatchNorm2d(8)]
    return nn.Sequential(*layers, *[nn.ReLU()] * relu).eval()


def compiled(model: nn.Module, *inputs: torch.Tensor) -> tuple[cbn.ForwardRecord, ...]:
    """Compile for inference with ``forward="auto"``, check the result, and return the records."""
    expected = model(*inputs)
    with testing.fresh_compile(), cbn.options(forward="auto"), torch.no_grad():
        cbn.clear_records()
        out = torch.compile(model, backend=testing.post_grad_backend())(*inputs)
        torch.testing.assert_close(out, expected)
        return cbn.forward_records()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_a_layer_is_timed_in_every_way(transposed, relu):
    (record,) = compiled(block(transposed=transposed, relu=relu), torch.randn(2, 8, 16, 16))
    assert record.seconds_exact > 0
    assert 0 < record.seconds_folded < float("inf")
    assert record.code.folded == (record.seconds_folded < 0.99 * record.seconds_exact)


class Mixed(nn.Module):
    """A residual, a linear layer with a batch norm, and a convolution in 3-d."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.b, self.bn_b = nn.Conv2d(4, 4, 1, groups=2), nn.BatchNorm2d(4)
        self.c, self.bn_c = nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6)
        self.d, self.bn_d = nn.Linear(6, 5), nn.BatchNorm1d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn_a(self.a(x)))
        x = torch.relu(self.bn_b(self.b(x)) + x)
        x = self.bn_c(self.c(x.unsqueeze(2).expand(-1, -1, 3, -1, -1))).sigmoid()
        return self.bn_d(self.d(x.mean((2, 3, 4))))


@pytest.mark.parametrize("autocast", [False, True])
def test_every_kind_of_layer_can_be_timed(autocast):
    model, x = Mixed().eval(), torch.randn(2, 3, 6, 6)
    with testing.fresh_compile(), cbn.options(forward="auto"), torch.no_grad():
        cbn.clear_records()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            torch.compile(model, backend=testing.post_grad_backend())(x)
    records = cbn.forward_records()
    assert len(records) == 4
    for record in records:
        assert record.seconds_exact > 0
        assert 0 < record.seconds_folded < float("inf")


def test_timings_are_kept_on_disk(monkeypatch):
    model, x = block(), torch.randn(2, 8, 16, 16)
    first = compiled(model, x)

    def measured_again(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(timing, "_measure", measured_again)
    assert compiled(model, x) == first
    with pytest.raises(BackendCompilerFailed, match="measured again"):  # another shape
        compiled(model, torch.randn(3, 8, 16, 16))


@pytest.mark.parametrize(
    ("times", "folded", "kernel"),
    [
        ({"as written": 1.0, "aten": 0.9, "onednn": 0.5}, True, "onednn"),
        ({"as written": 1.0, "onednn": 0.9, "onednn, packed": 0.8}, True, "onednn, packed"),
        ({"as written": 1.0, "onednn": 0.7, "onednn, packed": 0.8}, True, "onednn, packed"),
        ({"as written": 1.0, "onednn": 0.66, "onednn, packed": 0.8}, True, "onednn"),
        ({"as written": 1.0, "onednn": 1.0, "onednn, packed": 1.01}, False, "onednn"),
        ({"as written": 1.0, "aten": 0.5, "onednn": 0.9}, True, "aten"),
        ({"as written": 1.0, "aten": 1.2, "onednn": 1.1}, False, "onednn"),
        ({"as written": 1.0, "aten": 0.995, "onednn": 2.0}, False, "onednn"),
        ({"as written": 1.0, "aten": 0.9, "onednn": float("inf")}, True, "aten"),
    ],
)
def test_the_fastest_way_is_taken(monkeypatch, times, folded, kernel):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("without oneDNN there is one kernel")
    slow = float("inf")
    monkeypatch.setattr(timing, "_measure", lambda _, names: {n: times.get(n, slow) for n in names})
    (record,) = compiled(block(), torch.randn(2, 8, 4, 4))
    assert (record.code.folded, record.kernel) == (folded, kernel)
    assert record.epilogue == ("" if kernel == "aten" and folded else "relu")


def test_each_call_that_is_timed_follows_one_with_other_tensors(monkeypatch):
    """Else programs would count that a network keeps in the caches, or weights would not."""
    made, called = [], []

    class Ways(timing.Ways):
        def __init__(self, workload):
            super().__init__(workload)
            made.append(self)

        def function(self, name):
            call = super().function(name)
            return lambda: (called.append((self, name)), call())

    monkeypatch.setattr(timing, "Ways", Ways)
    compiled(block(), torch.randn(2, 8, 4, 4))
    timed, other = made
    assert timed.weight.data_ptr() != other.weight.data_ptr()
    tried = 2 * len({name for _, name in called})
    turns = called[tried:]
    assert len(turns) >= 2 * timing._FEWEST_ROUNDS
    assert [way for way, _ in turns] == [other, timed] * (len(turns) // 2)
    assert [name for _, name in turns[::2]] == [name for _, name in turns[1::2]]


def test_a_kernel_that_refuses_is_not_taken(monkeypatch):
    def refuse(self):
        raise RuntimeError("not supported")

    monkeypatch.setattr(timing.Ways, "_onednn", refuse)
    monkeypatch.setattr(timing.Ways, "_aten", refuse)
    monkeypatch.setattr(timing.Ways, "_packed", refuse)
    (record,) = compiled(block(), torch.randn(2, 8, 4, 4))
    assert record.code is ForwardCode.SLOWER
    assert record.seconds_folded == float("inf")


def test_without_memory_to_measure_in_bytes_are_counted(monkeypatch):
    def out_of_memory(*_):
        torch.empty(1 << 60, device="cpu")

    monkeypatch.setattr(timing.Ways, "__init__", out_of_memory)
    (record,) = compiled(block(), torch.randn(2, 8, 32, 32))
    assert record.code is ForwardCode.FOLDED
    assert record.seconds_exact is None


def test_a_part_of_the_ways_is_on_file():
    """As after a compilation that had fewer: of what is there the fastest is taken."""
    model, x = block(), torch.randn(2, 8, 16, 16)
    with inductor_config.patch(cpp_wrapper=True):
        (measured,) = compiled(model, x)
    with inductor_config.patch(deterministic=True):
        (record,) = compiled(model, x)
    assert record.seconds_exact == measured.seconds_exact > 0
    with cbn.options(forward="auto"), torch.no_grad():
        assert cbn.explain(model, x).forward


def test_no_timing_for_a_size_that_is_not_known():
    layer = nn.Linear(8, 8)

    def fn(x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return torch.relu(layer(x[keep.nonzero().flatten()]))

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        records = compiled(fn, torch.randn(4, 8), torch.tensor([1, 0, 1, 1]))
    assert all(r.seconds_exact is None for r in records)


def test_deterministic_compilation_measures_nothing():
    with inductor_config.patch(deterministic=True):
        (record,) = compiled(block(), torch.randn(2, 8, 16, 16))
    assert record.seconds_exact is None


def test_explain_measures_nothing_but_knows_what_was_measured():
    model, x = block(), torch.randn(2, 8, 16, 16)
    with cbn.options(forward="auto"), torch.no_grad():
        (before,) = cbn.explain(model, x).forward
        (measured,) = compiled(model, x)
        explanation = cbn.explain(model, x)
    assert before.seconds_exact is None
    assert explanation.forward[0].seconds_exact == measured.seconds_exact
    assert f"{measured.seconds_exact * 1e3:.3g}" in str(explanation)


def test_measuring_is_not_cast_by_autocast():
    with torch.autocast("cpu", torch.bfloat16), _compat.real_tensors():
        assert nn.functional.linear(torch.ones(1, 2), torch.ones(3, 2)).dtype == torch.float32


def test_measuring_leaves_random_numbers_alone():
    model, x = block(), torch.randn(2, 8, 16, 16)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    compiled(model, x)
    assert torch.equal(torch.rand(3), expected)


# Timings of a 1x1 convolution, and what is made of it.
_ONE_BY_ONE = [
    ({"aten": 0.9, "onednn": 0.9, "linear": 0.5, "unfolded linear": 0.6}, "FOLDED", "linear"),
    (
        {"aten": 0.9, "onednn": 0.9, "linear": 0.6, "unfolded linear": 0.5},
        "AS_LINEAR",
        "unfolded linear",
    ),
]


class OneByOne(nn.Module):
    """1x1 convolutions: strided, in 1-d and 3-d, with a residual; and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(4, 6, 1, stride=(2, 1), bias=False), nn.BatchNorm2d(6)
        self.b, self.bn_b = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.c, self.bn_c = nn.Conv1d(6, 5, 1, stride=3), nn.BatchNorm1d(5)
        self.d, self.bn_d = nn.Conv3d(5, 4, 1), nn.BatchNorm3d(4)
        self.e, self.bn_e = nn.Linear(4, 7), nn.BatchNorm1d(7)
        self.f, self.bn_f = nn.Linear(7, 3, bias=False), nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn_a(self.a(x)))
        x = torch.relu(self.bn_b(self.b(x)) + x)
        x = nn.functional.silu(self.bn_c(self.c(x.flatten(2))))
        x = nn.functional.hardsigmoid(self.bn_d(self.d(x[..., None, None])))
        x = nn.functional.gelu(self.bn_e(self.e(x.mean((2, 3, 4)))))
        return self.bn_f(self.f(x))


@pytest.mark.parametrize(("times", "code", "kernel"), _ONE_BY_ONE)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("inductor", [False, True])
def test_layers_as_linear_layers(monkeypatch, times, code, kernel, autocast, dynamic, inductor):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("needs oneDNN")
    if inductor and not dynamic == autocast == (code == "AS_LINEAR"):
        pytest.skip("two through Inductor are enough: each takes a quarter of a minute")
    monkeypatch.setattr(
        timing, "_measure", lambda work, names: {n: times.get(n, 1.0) for n in names}
    )
    torch.manual_seed(0)
    model = OneByOne().eval()
    spread_statistics(model)
    x = torch.randn(2, 4, 6, 5)
    with testing.fresh_compile(), cbn.options(forward="auto"), torch.no_grad():
        expected = model.double()(x.double())
        model.float()
        cbn.clear_records()
        backend = "inductor" if inductor else testing.post_grad_backend()
        compiled_model = torch.compile(model, backend=backend)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for batch in (2, 3) if dynamic else (2,):
                inputs = x[[0, 1, 0][:batch]]
                if dynamic:
                    torch._dynamo.mark_dynamic(inputs, 0)
                out = compiled_model(inputs)
                tolerance = 0.05 if autocast else 1e-5
                torch.testing.assert_close(
                    out[:2].double(), expected, rtol=tolerance, atol=tolerance
                )
    linear = {"linear", "unfolded linear"}
    records = [r for r in cbn.forward_records() if r.kernel in linear]
    assert len(records) == 6
    assert {r.code.name for r in records} == {code}
    assert {r.kernel for r in records} == {kernel}


def test_no_own_operator_where_python_may_not_run(monkeypatch):
    times = _ONE_BY_ONE[0][0]
    monkeypatch.setattr(
        timing, "_measure", lambda work, names: {n: times.get(n, 1.0) for n in names}
    )
    model = nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)).eval()
    with inductor_config.patch(cpp_wrapper=True):
        (record,) = compiled(model, torch.randn(2, 4, 6, 6))
    assert record.kernel == "onednn"


def test_timed_as_outside_of_compilation(monkeypatch):
    """Where PyTorch compiles, calls of operators are slow, and autocast may be on."""
    measure, seen = timing._measure_here, []

    def spied(workload, names):
        included = torch._C._dispatch_tls_is_dispatch_key_included
        seen.append(
            (included(torch._C.DispatchKey.PythonDispatcher), torch.is_autocast_enabled("cpu"))
        )
        assert torch._C._len_torch_dispatch_stack() == torch._C._len_torch_function_stack() == 0
        assert torch.get_num_threads() == threads
        return measure(workload, names)

    threads = torch.get_num_threads()
    monkeypatch.setattr(timing, "_measure_here", spied)
    with torch.autocast("cpu", torch.bfloat16):
        compiled(block().bfloat16(), torch.randn(2, 8, 16, 16, dtype=torch.bfloat16))
    assert seen == [(False, False)]


def test_slow_ways_drop_out(monkeypatch):
    """The more rounds for those that matter."""
    monkeypatch.setattr(timing, "_SECONDS", float("inf"))
    calls = collections.Counter()

    def way(name, seconds):
        def call():
            calls[name] += 1
            time.sleep(seconds)

        return call, lambda: None

    ways = {"fast": way("fast", 0), "close": way("close", 0), "slow": way("slow", 0.02)}
    times = timing._take_turns(ways, [torch.ones(1)])
    assert times.keys() == ways.keys()
    assert calls["slow"] == timing._FEWEST_ROUNDS
    assert max(calls["fast"], calls["close"]) == timing._ROUNDS


def test_last_level_cache():
    assert 1 << 16 <= timing._last_level_cache() <= 256 << 20
