"""Registration: order, composition, flag, cache keys, failures. Nothing is compiled for real."""

import copy
import pickle
import warnings

import pytest
import torch
from common import ConvBN, Residual, fastest
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass

import convbn_inductor_pass as cbn
from convbn_inductor_pass import (
    _compat,
    _inductor,
    forward,
    forward_rewrite,
    hook,
    kernels,
    pipeline,
    scales,
    testing,
    timing,
)


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
    """Somebody else's pass: remembers the targets that it saw."""

    def __init__(self, uuid="recorder"):
        self._uuid, self.seen = uuid, []

    def __call__(self, graph):
        self.seen.append([getattr(n.target, "__name__", "") for n in graph.nodes])

    def uuid(self):
        return self._uuid


@pytest.fixture(name="x")
def _x():
    return torch.randn(2, 3, 8, 8)


HOOK = "pre_grad_custom_pass"
OURS = hook._HOOKS[HOOK]


@pytest.fixture(autouse=True)
def _restore():
    before = {hook_name: getattr(config, hook_name) for hook_name in hook._HOOKS}
    yield
    for hook_name, passes in before.items():
        setattr(config, hook_name, passes)
    cbn.install()
    cbn.clear_records()
    assert cbn.is_installed()


def test_flag_decides(x):
    assert compiled(Residual(), x, flag=True) == Residual.pairs
    assert compiled(Residual(), x, flag=False) == 0


def test_options_of_torch_compile_turn_it_on(x):
    counters.clear()
    with testing.fresh_compile(flag=False):
        torch.compile(Residual(), options={"efficient_conv_bn_eval_fx_passes": True})
        compile_with = torch._TorchCompileInductorWrapper(
            "default", {"efficient_conv_bn_eval_fx_passes": True}, None
        )

        def backend(gm, inputs):
            with config.patch(compile_with.config):
                return inductor_up_to_codegen(gm, inputs)

        torch.compile(Residual(), backend=backend)(x)
    assert counters["inductor"]["efficient_conv_bn_eval"] == Residual.pairs


def test_freezing_does_not_turn_it_off_under_grad(x):
    assert compiled(Residual(), x, freezing=True) == Residual.pairs


def test_builtin_pass_stands_aside_and_comes_back(x):
    cbn.uninstall()
    assert not cbn.is_installed()
    assert compiled(Residual(), x) == Residual.pairs  # PyTorch's own
    assert cbn.records() == []
    cbn.install()
    assert compiled(Residual(), x) == Residual.pairs  # ours
    assert [r.fused for r in cbn.records()] == [Residual.pairs]


def test_uninstall_restores_everything():
    wrapped = _inductor.efficient_conv_bn_eval_pass(), _inductor.binary_folding_pass()
    assert all("apply" in vars(builtin) for builtin in wrapped)
    cbn.uninstall()
    assert config.pre_grad_custom_pass is None
    assert config.joint_custom_pre_pass is None
    assert config.post_grad_custom_pre_pass is None
    assert not any("apply" in vars(builtin) for builtin in wrapped)
    cbn.uninstall()
    assert config.pre_grad_custom_pass is None


def test_install_twice_is_once(x):
    cbn.install()
    cbn.install()
    assert hook._current_passes(HOOK) == (OURS,)
    assert compiled(Residual(), x) == Residual.pairs


def test_passes_set_before_run_before(x):
    cbn.uninstall()
    other = Recorder()
    config.pre_grad_custom_pass = other
    cbn.install()
    assert hook._current_passes(HOOK) == (
        other,
        OURS,
    )
    assert compiled(Residual(), x) == Residual.pairs
    assert other.seen[0].count("conv2d") == Residual.pairs  # it saw the graph before us
    cbn.uninstall()
    assert config.pre_grad_custom_pass is other


def test_both_hooks_compose(x):
    """A pass in the post-grad hook keeps running, and sees the graph before the kernel half."""
    cbn.uninstall()
    other = Recorder()
    config.post_grad_custom_pre_pass = other
    cbn.install()
    with cbn.options(forward="fold"), testing.fresh_compile(), torch.no_grad():
        torch.compile(Residual(), backend=testing.post_grad_backend())(x)
    assert other.seen[0].count("convolution.default") == Residual.pairs
    cbn.uninstall()
    assert config.post_grad_custom_pre_pass is other


def test_failure_of_the_kernel_half_is_a_warning(x, monkeypatch):
    monkeypatch.setattr(forward, "analyze", lambda *a, **k: 1 / 0)
    model = Residual()
    with cbn.options(forward="fold"), testing.fresh_compile(), torch.no_grad():
        compiled_model = torch.compile(model, backend=testing.post_grad_backend())
        with pytest.warns(cbn.PassFailedWarning, match="ZeroDivisionError"):
            out = compiled_model(x)
        torch.testing.assert_close(out, model(x))


def test_failure_of_the_joint_pass_is_a_warning(x, monkeypatch):
    monkeypatch.setattr(scales, "analyze", lambda *a, **k: 1 / 0)
    model = Residual()
    with testing.fresh_compile():
        compiled_model = torch.compile(model, backend=testing.post_grad_backend())
        with pytest.warns(cbn.PassFailedWarning, match="ZeroDivisionError"):
            out = compiled_model(x)
        torch.testing.assert_close(out, model(x))


def test_passes_added_after_run_after(x):
    other = Recorder()
    if _inductor.one_pass_per_hook:
        ours = config.pre_grad_custom_pass
        config.pre_grad_custom_pass = hook._InOrder(ours, other)
    else:
        config.pre_grad_custom_pass = [*hook._current_passes(HOOK), other]
    assert compiled(Residual(), x) == Residual.pairs
    assert other.seen[0].count("conv_bn_eval") == Residual.pairs


def test_being_overwritten_is_noticed(x):
    config.pre_grad_custom_pass = Recorder()
    assert not cbn.is_installed()
    with pytest.warns(cbn.PassFailedWarning, match="was overwritten since"):
        assert compiled(Residual(), x) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", cbn.PassFailedWarning)
        assert compiled(Residual(), x, flag=False) == 0  # nothing to notice
        cbn.install()
        assert compiled(Residual(), x) == Residual.pairs


@pytest.mark.skipif(not _inductor.has_onednn_epilogues(torch.float32), reason="needs oneDNN")
def test_a_failure_half_way_leaves_no_packed_weight(x, monkeypatch):
    """Which Inductor cannot take: what was rewritten before the failure is finished."""
    calls = []

    def fails_the_second_time(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise RuntimeError("on purpose")
        forward_rewrite.fold_forward(*arguments)

    monkeypatch.setattr(forward, "fold_forward", fails_the_second_time)
    monkeypatch.setattr(timing, "seconds", fastest(kernels.PACKED))
    model = Residual()
    with (
        testing.fresh_compile(),
        cbn.options(forward="auto"),
        torch.no_grad(),
        pytest.warns(cbn.PassFailedWarning, match="on purpose"),
    ):
        out = torch.compile(model)(x)
    assert len(calls) == 2
    torch.testing.assert_close(out, model(x))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
@pytest.mark.parametrize("enabled", [True, False])
def test_settings_of_libraries_are_in_the_cache_key(enabled):
    ours = hook._HOOKS["post_grad_custom_pre_pass"]
    key = ours.uuid()
    with torch.backends.mkldnn.flags(enabled=enabled):
        assert (ours.uuid() == key) == enabled
        assert _inductor.has_onednn_epilogues(torch.float32) <= enabled
    cudnn = torch.backends.cudnn
    with cudnn.flags(enabled=cudnn.enabled, deterministic=enabled):
        assert (ours.uuid() == key) != enabled


@pytest.mark.parametrize("hook", ["joint_custom_pre_pass", "post_grad_custom_pre_pass"])
def test_other_hooks_being_overwritten_is_noticed(x, hook):
    with config.patch({hook: Recorder()}):
        with pytest.warns(cbn.PassFailedWarning, match=f"{hook} was overwritten since"):
            assert compiled(Residual(), x) == Residual.pairs
        with warnings.catch_warnings():
            warnings.simplefilter("error", cbn.PassFailedWarning)
            assert compiled(Residual(), x, flag=False) == 0  # nothing to notice


def test_a_failure_does_not_fail_the_compilation(x, monkeypatch):
    def broken(graph, options):
        raise RuntimeError("on purpose")

    monkeypatch.setattr(pipeline, "analyze", broken)
    with pytest.warns(cbn.PassFailedWarning, match="RuntimeError: on purpose"):
        assert compiled(Residual(), x) == 0


def test_a_failure_half_way_leaves_a_right_graph(x, monkeypatch):
    calls = []
    rewrite = pipeline.rewrite

    def fails_the_third_time(decision):
        calls.append(decision)
        if len(calls) == 3:
            raise RuntimeError("on purpose")
        return rewrite(decision)

    monkeypatch.setattr(pipeline, "rewrite", fails_the_third_time)
    model = Residual()
    with pytest.warns(cbn.PassFailedWarning), testing.fresh_compile():
        y = torch.compile(model, backend=inductor_up_to_codegen)(x)
    torch.testing.assert_close(y, model(x))


class TestUuid:
    def test_constant_while_off(self):
        with config.patch(efficient_conv_bn_eval_fx_passes=False):
            off = OURS.uuid()
            with cbn.options(objective="speed"):
                assert OURS.uuid() == off

    def test_covers_flag_and_options(self):
        uuids = [OURS.uuid()]
        with config.patch(efficient_conv_bn_eval_fx_passes=True):
            uuids.append(OURS.uuid())
            assert OURS.uuid() == uuids[-1]
            for changes in ({"objective": "speed"}, {"deny": ("a",)}, {"deny": ("b",)}):
                with cbn.options(**changes):
                    uuids.append(OURS.uuid())
        assert len(set(uuids)) == len(uuids)

    def test_covers_sources(self, tmp_path, monkeypatch):
        before = hook._sources_hash()
        package = tmp_path / "copy"
        package.mkdir()
        for path in hook.pathlib.Path(hook.__file__).parent.glob("*.py"):
            (package / path.name).write_bytes(path.read_bytes())
        monkeypatch.setattr(hook, "__file__", str(package / "hook.py"))
        hook._sources_hash.cache_clear()
        assert hook._sources_hash() == before  # wherever the package lies
        (package / "fold.py").write_bytes(b"# another version")
        hook._sources_hash.cache_clear()
        assert hook._sources_hash() != before
        hook._sources_hash.cache_clear()

    def test_of_several_passes_covers_each(self):
        combined = hook._InOrder(Recorder("a"), OURS)
        assert combined.uuid() == hook._InOrder(Recorder("a"), OURS).uuid()
        assert combined.uuid() != hook._InOrder(Recorder("b"), OURS).uuid()
        assert combined.uuid() != hook._InOrder(OURS, Recorder("a")).uuid()
        # A pass without uuid() cannot be cached, and so neither can the two of them.
        assert hook._InOrder(lambda graph: None, OURS).uuid() is None

    def test_pickles_to_its_uuid_alone(self):
        assert pickle.dumps(OURS) == pickle.dumps(copy.deepcopy(OURS))
        assert pickle.loads(pickle.dumps(OURS)) is OURS
        with config.patch(efficient_conv_bn_eval_fx_passes=True):
            plain = pickle.dumps(OURS)
            with cbn.options(objective="speed"):
                assert pickle.dumps(OURS) != plain


class TestOptions:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"objective": "fast"}, "objective must be one of 'memory', 'speed', got 'fast'"),
            ({"deny": "backbone"}, "deny must be a sequence of module path patterns"),
            ({"deny": [1]}, "deny must be a sequence of module path patterns"),
            ({"allow": None}, "allow must be a sequence of module path patterns .* got None"),
            ({"fuse_frozen_layers": "no"}, "fuse_frozen_layers must be True or False, got 'no'"),
            ({"keep_packed_weights": "x"}, "keep_packed_weights must be True or False, got 'x'"),
            ({"forward": None}, "forward must be one of 'exact', 'fold', 'auto', got None"),
            ({"denied": ()}, "unknown option denied; there are: objective, "),
        ],
    )
    def test_wrong_ones_change_nothing(self, changes, message):
        before = cbn.get_options()
        with pytest.raises(ValueError, match=message):
            cbn.set_options(**changes)
        assert cbn.get_options() is before

    def test_context_restores(self):
        before = cbn.get_options()
        with cbn.options(objective="speed", allow=["a.*"]) as inside:
            assert cbn.get_options() is inside
            assert inside.allow == ("a.*",)
        assert cbn.get_options() is before


def test_records_and_logs(x, caplog):
    with caplog.at_level("DEBUG", logger="convbn_inductor_pass"):
        compiled(Residual(), x)
    (records,) = cbn.records()
    assert records.fused == len(records.records) == Residual.pairs
    first = records.records[0]
    assert (first.layer, first.batch_norm) == ("stem", "stem_bn")
    assert first.output_shape == (2, 8, 8, 8)
    assert first.output_bytes == 2 * 8 * 8 * 8 * 4
    assert first.source.split(":")[0].endswith("common.py")
    assert "6 of 6 batch norms fused" in caplog.text
    assert "before\n" in caplog.text
    assert "after\n" in caplog.text
    assert "convbn_inductor_pass_autograd_conv_bn_eval(" in caplog.text


def test_trace_artifact(x, monkeypatch):
    import json

    artifacts = {}

    def capture(kind, metadata_fn=dict, payload_fn=lambda: None, **kwargs):
        artifacts[metadata_fn().get("name")] = payload_fn()

    monkeypatch.setattr(_compat, "trace_structured", capture)
    compiled(ConvBN(nn.Conv2d(3, 4, 3)), x)
    (record,) = json.loads(artifacts["convbn_inductor_pass_decisions"])
    assert record["code"] == "FUSED"


def test_nothing_is_logged_by_default(x, caplog):
    compiled(Residual(), x)
    assert not [r for r in caplog.records if r.name == "convbn_inductor_pass"]
