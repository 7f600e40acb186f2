"""Store a masked gradient in half precision where it is used as float32 in several places.

Before:  w = where(mask, 0, g);  f = float32(w);  sum(f);  f * scale      stores f, four bytes each
After:   w = where(mask, 0, g);  sum(float32(w));  float32(w) * scale     stores w, two bytes each

Inductor stores a value that several kernels use and that takes more than a few reads to compute: in
BN-tuning under autocast, where a mask is recomputed from the batch norm's input. Nothing more is
rounded: ``where`` only selects. Declines: devices other than CUDA, casts of anything else.
"""

import torch
from torch import fx

from ..graph.layers import is_cast, value_of
from .base import Outcome, Pass

aten = torch.ops.aten


class RepeatedCastsPass(Pass):
    """Runs on every graph that code is generated for."""

    name = "repeated_casts"
    hook = "post_grad_custom_pre_pass"

    def run(self, graph: fx.Graph) -> Outcome:
        casts = [n for n in graph.nodes if len(n.users) > 1 and _widens_a_choice(n)]
        for cast in casts:
            for user in list(cast.users)[1:]:
                with graph.inserting_after(cast):  # not across what may write to its input
                    user.replace_input_with(cast, graph.node_copy(cast))
        return Outcome(len(casts))


def _widens_a_choice(node: fx.Node) -> bool:
    if not is_cast(node) or node.all_input_nodes[0].target is not aten.where.self:
        return False
    before, after = value_of(node.all_input_nodes[0]), value_of(node)
    return before.itemsize < after.itemsize and after.device.type == "cuda"
