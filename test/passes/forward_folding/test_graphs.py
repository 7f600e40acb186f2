"""Graphs before and after, one for each kernel."""

from __future__ import annotations

import expecttest
import torch
import torch.nn.functional as F
from torch import fx

import convbn_inductor_pass as cbn
from convbn_inductor_pass import testing
from convbn_inductor_pass._torch import inductor


def conv_scale_relu(x, w, s):
    return F.relu(F.conv2d(x, w) * s)


def calls(graph: fx.Graph) -> str:
    """The calls of a graph, a line each, with the arguments that are nodes."""
    names: dict[fx.Node, str] = {}
    lines = []
    for node in graph.nodes:
        names[node] = node.name if node.op == "placeholder" else f"v{len(lines)}"
        if node.op == "call_function":
            name = node.target._schema.name.split("::")[1]
            arguments = ", ".join(names[n] for n in node.all_input_nodes)
            lines.append(f"{names[node]} = {name}({arguments})")
    return "\n".join(lines)


class TestGraphs(expecttest.TestCase):
    maxDiff = None

    def graph(self, dtype: torch.dtype, forward: str = "fold") -> str:
        torch.manual_seed(0)
        shapes = (2, 3, 8, 8), (4, 3, 3, 3), (4, 1, 1)
        x, w, s = (torch.randn(shape, dtype=dtype) for shape in shapes)
        graphs: list[str] = []
        backend = testing.post_grad_backend(lambda graph: graphs.append(calls(graph)))
        with testing.fresh_compile(), cbn.options(forward=forward), torch.no_grad():
            torch.compile(conv_scale_relu, backend=backend)(x, w, s)
        return graphs[0]

    def test_as_written(self):
        self.assertExpectedInline(
            self.graph(torch.float32, "exact"),
            """\
v0 = convolution(arg0_1, arg1_1)
v1 = mul(v0, arg2_1)
v2 = relu(v1)""",
        )

    def test_aten(self):
        """oneDNN has no float64: the layer's own operator, without an epilogue."""
        self.assertExpectedInline(
            self.graph(torch.float64),
            """\
v0 = reshape(arg2_1)
v1 = inductor_force_stride_order(arg1_1)
v2 = reshape(v0)
v3 = mul(v1, v2)
v4 = convolution(arg0_1, v3)
v5 = relu(v4)""",
        )

    def test_onednn(self):
        """Inductor puts the ReLU into the kernel."""
        if not inductor.has_onednn_epilogues(torch.float32):
            self.skipTest("needs oneDNN")
        self.assertExpectedInline(
            self.graph(torch.float32),
            """\
v0 = reshape(arg2_1)
v1 = inductor_force_stride_order(arg1_1)
v2 = reshape(v0)
v3 = mul(v1, v2)
v4 = _convolution_pointwise(arg0_1, v3)
v5 = relu(v4)""",
        )

    def test_cudnn(self):
        before = inductor.has_cudnn_epilogues
        inductor.has_cudnn_epilogues = lambda device: True
        try:
            self.assertExpectedInline(
                self.graph(torch.float32),
                """\
v0 = reshape(arg2_1)
v1 = inductor_force_stride_order(arg1_1)
v2 = reshape(v0)
v3 = mul(v1, v2)
v4 = inductor_force_stride_order(arg0_1)
v5 = convolution_relu(v4, v3)""",
            )
        finally:
            inductor.has_cudnn_epilogues = before
