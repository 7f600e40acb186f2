"""What is in Inductor's cache keys: the sources, the flag, the options, other passes."""

import copy
import pickle
import shutil

import pytest
import torch
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass

import convbn_inductor_pass as cbn
from convbn_inductor_pass._torch import inductor, registry
from convbn_inductor_pass.passes import PASSES, base

OURS = PASSES[0]
(FOLDING,) = (p for p in PASSES if p.name == "forward_folding")


class Other(CustomGraphPass):
    def __init__(self, name):
        self.name = name

    def __call__(self, graph):
        pass

    def uuid(self):
        return self.name


def test_constant_while_off():
    with config.patch(efficient_conv_bn_eval_fx_passes=False):
        off = OURS.uuid()
        with cbn.options(objective="speed"):
            assert OURS.uuid() == off


def test_flag_and_options():
    uuids = [OURS.uuid()]
    with config.patch(efficient_conv_bn_eval_fx_passes=True):
        uuids.append(OURS.uuid())
        assert OURS.uuid() == uuids[-1]
        for changes in ({"objective": "speed"}, {"deny": ("a",)}, {"deny": ("b",)}):
            with cbn.options(**changes):
                uuids.append(OURS.uuid())
    assert len(set(uuids)) == len(uuids)


def test_each_pass_has_its_own():
    with config.patch(efficient_conv_bn_eval_fx_passes=True):
        assert len({str(p.uuid()) for p in PASSES}) == len(PASSES)


def test_sources_of_all_folders(tmp_path):
    root = base.pathlib.Path(base.__file__).parent.parent
    package = tmp_path / "copy"
    shutil.copytree(root, package)
    before = base.sources_hash()
    assert base.sources_hash(package) == before  # wherever the package lies
    for changed in ("config.py", "graph/layers.py", "passes/scale_gradient/decide.py"):
        again = tmp_path / changed.replace("/", "_")
        shutil.copytree(root, again)
        with (again / changed).open("a") as file:
            file.write("# another version\n")
        assert base.sources_hash(again) != before
    moved = tmp_path / "moved"
    shutil.copytree(root, moved)
    (moved / "graph" / "layers.py").rename(moved / "layers.py")
    assert base.sources_hash(moved) != before


def test_of_several_passes_covers_each():
    def uuid(*passes):
        return registry._InOrder(*passes).uuid()

    assert uuid(Other("a"), OURS) == uuid(Other("a"), OURS)
    assert uuid(Other("a"), OURS) != uuid(Other("b"), OURS)
    assert uuid(Other("a"), OURS) != uuid(OURS, Other("a"))
    # A pass without uuid() cannot be cached, and so neither can the two of them.
    assert uuid(lambda graph: None, OURS) is None


def test_pickles_to_its_uuid_alone():
    assert pickle.dumps(OURS) == pickle.dumps(copy.deepcopy(OURS))
    assert pickle.loads(pickle.dumps(OURS)) is OURS
    with config.patch(efficient_conv_bn_eval_fx_passes=True):
        plain = pickle.dumps(OURS)
        with cbn.options(objective="speed"):
            assert pickle.dumps(OURS) != plain


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
@pytest.mark.parametrize("enabled", [True, False])
def test_settings_of_libraries(enabled):
    key = FOLDING.uuid()
    with torch.backends.mkldnn.flags(enabled=enabled):
        assert (FOLDING.uuid() == key) == enabled
        assert inductor.has_onednn_epilogues(torch.float32) <= enabled
    cudnn = torch.backends.cudnn
    with cudnn.flags(enabled=cudnn.enabled, deterministic=enabled):
        assert (FOLDING.uuid() == key) != enabled
