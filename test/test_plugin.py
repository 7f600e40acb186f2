"""Registration: order, composition, threads, flag, failures. Nothing is compiled for real."""

import json
import subprocess
import sys
import threading
import types
import warnings

import pytest
import torch
from common import ConvBN, Residual
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass

import convbn_inductor_pass as cbn
from convbn_inductor_pass import plugin, testing
from convbn_inductor_pass._torch import registry
from convbn_inductor_pass.passes import PASSES, base, scale_gradient
from convbn_inductor_pass.passes.scale_gradient import rewrite

HOOK = "joint_custom_pre_pass"
OURS = tuple(p for p in PASSES if p.hook == HOOK)
FLAG = "efficient_conv_bn_eval_fx_passes"


def stop_before_codegen(gm, inputs, **kwargs):
    return gm


def inductor_up_to_codegen(gm, inputs):
    return compile_fx(gm, inputs, inner_compile=stop_before_codegen)


def compiled(model, x, flag=True, **patches):
    """Number of pairs fused when Inductor compiles ``model`` (without code generation)."""
    counters.clear()
    with testing.fresh_compile(flag=flag), config.patch(patches):
        torch.compile(model, backend=inductor_up_to_codegen)(x)
    return counters["inductor"]["efficient_conv_bn_eval"]


class Recorder(CustomGraphPass):
    """Somebody else's pass: remembers which operators the graph calls."""

    def __init__(self):
        self.seen = []

    def __call__(self, graph):
        self.seen.append([n.target for n in graph.nodes if n.op == "call_function"])

    def uuid(self):
        return "recorder"


@pytest.fixture(name="x")
def _x():
    return torch.randn(2, 3, 8, 8)


@pytest.fixture(autouse=True)
def _restore():
    cbn.clear_records()
    with registry.hooks_restored({p.hook for p in PASSES}):
        yield
    cbn.install()
    cbn.clear_records()
    assert cbn.is_installed()


def test_flag_decides(x):
    assert compiled(Residual(), x, flag=True) == Residual.pairs
    assert counters["inductor"]["convbn_inductor_pass_scale_gradient"] == Residual.pairs
    assert compiled(Residual(), x, flag=False) == 0


def test_options_of_torch_compile_turn_it_on(x):
    """The documented way, through Inductor itself."""
    model, count = ConvBN(nn.Conv2d(3, 4, 3)), "convbn_inductor_pass_scale_gradient"
    counters.clear()
    with testing.fresh_compile(flag=False):
        torch.compile(model, options={FLAG: True})(x).sum().backward()
        assert counters["inductor"][count] == 1
        torch._dynamo.reset()
        torch.compile(model, options={FLAG: False})(x)
        assert counters["inductor"][count] == 1


def test_enable_and_disable_hold_in_every_thread(x):
    before = config._config[FLAG].default
    found = {}

    def look(name):
        found[name] = getattr(config, FLAG), cbn.is_installed()

    def in_thread(name):
        thread = threading.Thread(target=look, args=(name,))
        thread.start()
        thread.join()

    try:
        with cbn.options():
            cbn.enable(objective="speed")
            assert cbn.get_options().objective == "speed"
            look("enabled"), in_thread("enabled, other thread")
        cbn.disable()
        look("disabled"), in_thread("disabled, other thread")
    finally:
        registry.set_everywhere(FLAG, before)
    assert found == {
        "enabled": (True, True),
        "enabled, other thread": (True, True),
        "disabled": (False, True),
        "disabled, other thread": (False, True),
    }


def test_wrong_options_enable_nothing():
    with pytest.raises(ValueError, match="unknown option objectiv"):
        cbn.enable(objectiv="speed")
    assert not getattr(config, FLAG)


def test_other_threads_fuse_as_the_importing_one(x):
    counts = []
    model = Residual()
    for target in (lambda f: f(), lambda f: threading.Thread(target=f)):
        job = target(lambda: counts.append(compiled(model, x)))
        if job is not None:
            job.start()
            job.join()
    assert counts == [Residual.pairs] * 2


@pytest.mark.parametrize(
    "first",
    [
        "import convbn_inductor_pass",
        "import torch._inductor.config, convbn_inductor_pass",
        "import convbn_inductor_pass.passes",
        "import convbn_inductor_pass.passes.base",
        "import convbn_inductor_pass as cbn; cbn.enable()",
    ],
)
def test_whatever_is_imported_first(first):
    """And no hook before the joint graph's is used."""
    script = f"""
import torch
{first}
import convbn_inductor_pass as cbn, torch._inductor.config as config
print([cbn.is_installed(), config.pre_grad_custom_pass is None,
       config.custom_partitioner_fn is not None, config.joint_custom_pre_pass is not None])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[True, True, True, True]", done.stderr


def test_the_builtin_pass_stands_aside_after_its_bytes_were_counted_first():
    """Counting them is the first to load Inductor's passes, while this package's are out."""
    script = """
import sys, torch, convbn_inductor_pass as cbn
from convbn_inductor_pass import plugin
with plugin.installation(False):
    torch.compile(torch.nn.Linear(1, 1))(torch.ones(1, 1))
import torch._inductor.fx_passes.freezing_patterns
theirs = [getattr(sys.modules[module], name) for module, name, _ in plugin._WRAPPED]
print([getattr(each, "apply", each).__module__ == plugin.__name__ for each in theirs])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[True, True]", done.stderr


def test_importing_loads_no_compiler_and_no_command_line():
    script = """
import sys, torch
before = set(sys.modules)
import convbn_inductor_pass
print(sorted(m for m in set(sys.modules) - before if m.startswith(("torch", "typer"))))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_freezing_does_not_turn_it_off_under_grad(x):
    assert compiled(Residual(), x, freezing=True) == Residual.pairs


def test_builtin_pass_stands_aside_and_comes_back(x):
    cbn.uninstall()
    assert not cbn.is_installed()
    assert compiled(Residual(), x) == Residual.pairs  # PyTorch's own
    assert cbn.records() == []
    cbn.install()
    assert compiled(Residual(), x) == Residual.pairs  # ours
    assert [r.code for r in cbn.records()] == [cbn.Code.FUSED] * Residual.pairs


def test_uninstall_leaves_no_pass():
    for _ in range(2):
        cbn.uninstall()
        assert [getattr(config, p.hook) for p in PASSES] == [None] * len(PASSES)


def test_a_wrapped_pass_is_pytorchs_own_where_we_are_not_installed_or_off(monkeypatch):
    calls = []
    theirs = types.SimpleNamespace(apply=lambda graph: calls.append(("theirs", graph)))
    monkeypatch.setitem(sys.modules, "theirs", types.SimpleNamespace(theirs=theirs))
    for _ in range(2):  # again is harmless
        plugin._wrap("theirs", "theirs", lambda graph, *_: calls.append(("ours", graph)))
    for flag in (True, False):
        with config.patch({FLAG: flag}):
            theirs.apply(1)
            with plugin.installation(False):
                theirs.apply(2)
    assert calls == [("ours", 1), ("theirs", 2), ("theirs", 1), ("theirs", 2)]


def test_installing_again_wraps_what_was_loaded_again():
    script = """
import importlib, torch, convbn_inductor_pass as cbn
from torch._inductor.fx_passes import freezing_patterns
importlib.reload(freezing_patterns)
cbn.install()
print("apply" in vars(freezing_patterns.binary_folding_pass))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


def test_records_hang_on_all_calls_as_one_tuple(x):
    """Records times calls would be quadratic."""
    outcome = base.Outcome(1, (cbn.Record("a", "batch norm", cbn.Code.FUSED),))

    class Recording(base.Pass):
        name, hook = "recording", HOOK

        def run(self, graph):
            return outcome

    graph = torch.fx.symbolic_trace(Residual()).graph
    for node in graph.nodes:
        node.op = "call_function" if node.op == "call_module" else node.op
    with config.patch(efficient_conv_bn_eval_fx_passes=True):
        for _ in range(2):
            Recording()(graph)
    cbn.clear_records()
    held = [n.meta[base.Pass.KEY] for n in graph.nodes if n.op == "call_function"]
    assert len(held) > 5
    assert all(a is b is outcome.records for a, b in held)


def test_install_twice_is_once(x):
    cbn.install()
    cbn.install()
    assert registry.passes_of(HOOK) == OURS
    assert compiled(Residual(), x) == Residual.pairs


def test_passes_of_others_run_before_and_after(x):
    cbn.uninstall()
    before, after = Recorder(), Recorder()
    setattr(config, HOOK, before)
    cbn.install()
    assert registry.passes_of(HOOK) == (before, *OURS)
    with registry.passes_added({HOOK: after}):
        assert compiled(Residual(), x) == Residual.pairs
    assert before.seen != after.seen  # ours ran between them
    cbn.uninstall()
    assert getattr(config, HOOK) is before


def test_being_overwritten_is_noticed(x):
    setattr(config, HOOK, Recorder())
    assert not cbn.is_installed()
    with pytest.warns(cbn.PassFailedWarning, match=f"{HOOK} was overwritten,"):
        assert compiled(Residual(), x) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", cbn.PassFailedWarning)
        assert compiled(Residual(), x, flag=False) == 0  # nothing to notice
        cbn.install()
        assert compiled(Residual(), x) == Residual.pairs


def test_the_post_grad_hook_being_overwritten_is_noticed(x):
    with (
        config.patch(post_grad_custom_pre_pass=Recorder()),
        pytest.warns(cbn.PassFailedWarning, match="post_grad_custom_pre_pass was overwritten"),
    ):
        assert compiled(Residual(), x) == Residual.pairs


def test_a_failure_does_not_fail_the_compilation(x, monkeypatch):
    monkeypatch.setattr(scale_gradient.ScaleGradientPass, "run", lambda self, graph: 1 / 0)
    model = Residual()
    with testing.fresh_compile():
        compiled_model = torch.compile(model, backend=testing.post_grad_backend())
        with pytest.warns(cbn.PassFailedWarning, match="scale_gradient failed .*ZeroDivision"):
            out = compiled_model(x)
        torch.testing.assert_close(out, model(x))


def test_a_failure_half_way_leaves_a_right_graph(x, monkeypatch):
    calls = []
    replace = rewrite._Rewriting.replace

    def fails_the_third_time(self):
        calls.append(self)
        if len(calls) == 3:
            raise RuntimeError("on purpose")
        return replace(self)

    monkeypatch.setattr(rewrite._Rewriting, "replace", fails_the_third_time)
    model = Residual()
    expected = testing.outputs_and_gradients(model, dict(model.named_parameters()), (x,))
    with testing.fresh_compile():
        fn = torch.compile(model, backend=testing.post_grad_backend())
        with pytest.warns(cbn.PassFailedWarning, match="on purpose"):
            actual = testing.outputs_and_gradients(fn, dict(model.named_parameters()), (x,))
    assert len(calls) == 3
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_dynamic_shapes_count_once(x):
    counters.clear()
    with testing.fresh_compile():
        torch.compile(Residual(), backend=inductor_up_to_codegen, dynamic=True)(x)
    assert counters["inductor"]["efficient_conv_bn_eval"] == Residual.pairs
    assert len(cbn.records()) == Residual.pairs


def test_records_and_logs(x, caplog):
    with caplog.at_level("DEBUG", logger="convbn_inductor_pass"):
        compiled(Residual(), x)
    assert [r.code for r in cbn.records()] == [cbn.Code.FUSED] * Residual.pairs
    first = cbn.records()[0]
    assert (first.kind, first.layer, first.batch_norm) == ("batch norm", "stem", "stem_bn")
    assert first.output_shape == (2, 8, 8, 8)
    assert first.output_bytes == first.bytes_saved == 2 * 8 * 8 * 8 * 4
    assert first.source.split(":")[0].endswith("common.py")
    assert f"{Residual.pairs} of {Residual.pairs} batch norms in tune mode" in caplog.text
    assert "before scale_gradient\n" in caplog.text
    assert "after scale_gradient\n" in caplog.text


def test_records_are_plain_data(x):
    compiled(Residual(), x)
    for record in cbn.records():
        assert cbn.Record.from_dict(json.loads(json.dumps(record.to_dict()))) == record


def test_trace_artifact(x, monkeypatch):
    artifacts = {}

    def capture(kind, metadata_fn=dict, payload_fn=lambda: None, **kwargs):
        artifacts[metadata_fn().get("name")] = payload_fn()

    monkeypatch.setattr(base, "trace_structured", capture)
    compiled(ConvBN(nn.Conv2d(3, 4, 3)), x)
    (record,) = json.loads(artifacts["convbn_inductor_pass_scale_gradient"])
    assert (record["code"], record["batch_norm"]) == ("FUSED", "bn")


def test_decisions_are_not_logged_by_default(x, caplog):
    compiled(Residual(), x)
    assert len([r for r in caplog.records if r.name == "convbn_inductor_pass"]) <= 1  # announce.py
