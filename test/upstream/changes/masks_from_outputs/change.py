"""Masks of clamp-like activations are taken from their output, if that is saved anyway."""

from test.upstream.edits import Change, Edit

FILE = "torch/_inductor/fx_passes/joint_graph.py"

# The piece of a line before which the call goes
NEXT = "if not config.fallback_random"

CALL = """from .mask_from_output import mask_from_output

    maybe_count = GraphTransformObserver(graph, "mask_from_output").apply_graph_pass(
        mask_from_output
    )
    count += maybe_count or 0

    """

CHANGE = Change(
    name="masks_from_outputs",
    title="[inductor] Masks of clamp-like activations from their output",
    new_files={"torch/_inductor/fx_passes/mask_from_output.py": "mask_from_output.py"},
    removed=(),
    edits=(Edit(FILE, "joint_graph_passes", NEXT, "swap", CALL + NEXT),),
    tests=("test_mask_from_output.py",),
)
