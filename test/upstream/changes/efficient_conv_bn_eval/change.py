"""The main change: PyTorch's pass of the flag becomes one on the joint graph."""

from test.upstream.edits import Change, Edit

_PASS = "torch/_inductor/fx_passes/efficient_conv_bn_eval.py"
_JOINT = "torch/_inductor/fx_passes/joint_graph.py"
_PRE_GRAD = "torch/_inductor/fx_passes/pre_grad.py"

CHANGE = Change(
    name="efficient_conv_bn_eval",
    title="[inductor] efficient_conv_bn_eval on the joint graph",
    new_files={_PASS: "efficient_conv_bn_eval.py"},
    removed=(),
    edits=(
        Edit(
            _JOINT,
            "",
            "from .decompose_mem_bound_mm import",
            "after",
            "from .efficient_conv_bn_eval import efficient_conv_bn_eval_pass",
        ),
        Edit(
            _JOINT,
            "joint_graph_passes",
            "import remove_noop_ops",
            "before",
            """
            # Before the passes that simplify: it reads batch norms as they are decomposed.
            if config.efficient_conv_bn_eval_fx_passes:
                fused = GraphTransformObserver(
                    graph, "efficient_conv_bn_eval_pass"
                ).apply_graph_pass(efficient_conv_bn_eval_pass)
                count += fused or 0

            """,
        ),
        Edit(_PRE_GRAD, "", "efficient_conv_bn_eval_pass = ", "instead", ""),
        Edit(_PRE_GRAD, "lazy_init", "efficient_conv_bn_eval,", "swap", ""),
        Edit(
            _PRE_GRAD,
            "pre_grad_passes",
            '"efficient_conv_bn_eval_pass"',
            "instead",
            "",
        ),
        Edit(
            "torch/_inductor/config.py",
            "",
            "efficient_conv_bn_eval_fx_passes = ",
            "before",
            "# It changes gradients alone: nothing in inference, nothing in the forward.",
        ),
    ),
    tests=("test_efficient_conv_bn_eval.py",),
)
