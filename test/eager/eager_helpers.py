"""Eval mode's and tune mode's outputs, gradients and saved bytes, side by side."""

import copy

import torch
from common import spread_statistics
from torch import nn
from torch.utils import _pytree as pytree

from convbn_inductor_pass import Code, decisions, turn_on


class Fn(nn.Module):
    """A conv, a batch norm, and a forward given as a function of them and the input."""

    def __init__(self, forward, conv=None, bn=None):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1) if conv is None else conv
        self.bn = nn.BatchNorm2d(4) if bn is None else bn
        self.function = forward
        spread_statistics(self).eval()

    def forward(self, x):
        return self.function(self, x)


def codes(model):
    return [r.code for r in decisions(model)]


def run(model, *inputs, parameters=None):
    """Outputs of ``model``, and all gradients by name, from the same gradients of the outputs."""
    named = dict(model.named_parameters()) if parameters is None else parameters
    leaves = {**named, **{f"input{i}": t for i, t in enumerate(inputs) if t.requires_grad}}
    outputs = [t for t in pytree.tree_leaves(model(*inputs)) if isinstance(t, torch.Tensor)]
    differentiable = [o for o in outputs if o.requires_grad]
    if differentiable:
        generator = torch.Generator().manual_seed(0)
        upstream = [torch.randn(o.shape, generator=generator).to(o) for o in differentiable]
        torch.autograd.backward(differentiable, upstream)
    gradients = {n: t.grad for n, t in leaves.items() if t.grad is not None}
    for t in leaves.values():
        t.grad = None
    return [o.detach().clone() for o in outputs], gradients


def saved_bytes(model, *inputs):
    """Bytes saved for backward, each storage once, without parameters, buffers and inputs."""
    alive = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    alive |= {t.untyped_storage().data_ptr() for t in inputs}
    saved = {}

    def pack(t):
        assert type(t) in (torch.Tensor, nn.Parameter), type(t)
        saved[t.untyped_storage().data_ptr()] = t.detach()  # the graph holds this function
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(*inputs)
    assert out.requires_grad
    return sum(t.untyped_storage().nbytes() for p, t in saved.items() if p not in alive)


def assert_like_eval(model, *inputs, fused, factor=2.0):
    """Outputs and gradients in tune mode are eval mode's within budgets from float64."""
    doubles = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    exact_out, exact = run(copy.deepcopy(model).double(), *doubles)
    eval_out, by_eval = run(model, *inputs)
    turn_on(model)
    tune_out, by_tune = run(model, *inputs)
    assert codes(model).count(Code.FUSED) == fused
    assert by_tune.keys() == by_eval.keys() == exact.keys()

    def error(value, reference):
        return (value.double() - reference).abs().max() / reference.abs().max().clamp(min=1e-30)

    triples = [*zip(tune_out, eval_out, exact_out, strict=True)]
    triples += [(by_tune[n], by_eval[n], exact[n]) for n in exact]
    budget = factor * max(error(e, r) for _, e, r in triples) + 8 * torch.finfo(torch.float32).eps
    for tune, by, reference in triples:
        assert tune.dtype == by.dtype
        assert tune.stride() == by.stride()
        assert error(tune, reference) <= budget
