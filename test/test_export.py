"""Forward folding beyond torch.compile: exported programs, other backends, AOTInductor packages."""

from __future__ import annotations

import copy

import pytest
import torch
from common import ConvBN, Residual, spread_statistics
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table

import convbn_inductor_pass as cbn
from convbn_inductor_pass import testing


def folded_count() -> int:
    return counters["inductor"]["convbn_inductor_pass_forward_folding"]


@pytest.fixture
def folding():
    counters.clear()
    with testing.fresh_compile(), cbn.options(forward="fold"):
        yield


@pytest.mark.usefixtures("folding")
@pytest.mark.parametrize("decomposed", [False, True])
def test_exported_program(decomposed):
    """With a dynamic batch; also lowered to core aten before, as deployments do."""
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(2, 3, 8, 8)
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}})
        if decomposed:
            program = program.run_decompositions()
        compiled = torch.compile(
            program.module(), backend=testing.post_grad_backend(), dynamic=True
        )
        for size in (2, 5):
            x = torch.randn(size, 3, 8, 8)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert folded_count() == Residual.pairs


@pytest.mark.usefixtures("folding")
def test_aot_autograd_backend():
    """Backends made of Inductor's inner compiler never run its pre-grad passes."""
    torch.manual_seed(0)
    model, x = ConvBN(nn.Conv2d(4, 12, 3)), torch.randn(2, 4, 8, 8)
    backend = aot_autograd(fw_compiler=compile_fx_inner, decompositions=select_decomp_table())
    with torch.no_grad():
        out = torch.compile(model, backend=backend)(x)
        torch.testing.assert_close(out, model(x), rtol=1e-5, atol=1e-5)
    assert folded_count() == 1
    assert counters["inductor"]["efficient_conv_bn_eval"] == 0

    # In training, the layer's output is kept for backward there and must exist: nothing to fold.
    torch._dynamo.reset()
    counters.clear()
    parameters = dict(model.named_parameters())
    expected = testing.outputs_and_gradients(model, parameters, (x,))
    got = testing.outputs_and_gradients(torch.compile(model, backend=backend), parameters, (x,))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert folded_count() == 0


def has_compiler() -> bool:
    try:
        torch._inductor.cpp_builder.get_cpp_compiler()
    except Exception:
        return False
    return True


# Constants of at most this many elements become part of a package's code.
INLINED = 8


@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
@pytest.mark.usefixtures("folding")
@pytest.mark.parametrize("at_load", [False, True])
def test_package(at_load, tmp_path):
    """Packages compute the folded forward, and follow an update of their constants.

    With runtime constant folding a package scales weights when constants are loaded, and keeps
    small constants, which else are in its code for good (with or without this package).
    """
    torch.manual_seed(0)
    width = INLINED if at_load else INLINED + 4
    model = nn.Sequential(
        *(nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.ConvTranspose2d(width, width, 2), nn.BatchNorm2d(width)),
    )
    spread_statistics(model.eval())
    x = torch.randn(2, 3, 8, 8)
    config = {"aot_inductor.use_runtime_constant_folding": at_load}
    with torch.no_grad(), torch._inductor.config.patch(config):
        program = torch.export.export(model, (x,))
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        package = torch._inductor.aoti_load_package(path)
    assert folded_count() == 2

    def assert_follows(updated):
        with torch.no_grad():
            torch.testing.assert_close(package(x), updated(x), rtol=1e-4, atol=1e-5)

    assert_follows(model)
    names = set(package.get_constant_fqns())
    state = {k: v for k, v in model.state_dict().items() if v.is_floating_point()}
    assert names.issuperset(state)
    other = copy.deepcopy(model)
    for name, value in other.state_dict().items():
        if name in state:
            value.mul_(1.5)
    assert not torch.allclose(other(x), model(x), rtol=1e-2, atol=1e-2)
    changed = {k: v for k, v in other.state_dict().items() if k in state}
    package.load_constants(changed, check_full_update=not at_load)
    assert_follows(other)

    # A part of them: the statistics of one batch norm.
    partial = copy.deepcopy(other)
    partial[1].running_var.mul_(3)
    name = "1.running_var"
    package.load_constants({name: partial.state_dict()[name]}, check_full_update=False)
    assert_follows(partial)
