"""Modes that change between layer and batch norm, transforms, and hooks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from programs import (
    arguments,
    bf16,
    bn,
    check,
    conv_bn,
)
from torch.utils.checkpoint import checkpoint

from convbn_inductor_pass import Code


class TestRegions:
    """Autocast and grad mode leave their mark in the graph, and nowhere else."""

    @pytest.mark.parametrize(
        ("context", "codes"),
        [
            (bf16, [Code.FUSED]),
            (torch.no_grad, [Code.LAYER_FROZEN]),  # the layer has no gradient
            (torch.inference_mode, []),  # raises: what it makes cannot be saved for backward
        ],
    )
    def test_layer_inside(self, context, codes):
        def fn(x, w, b, *rest):
            with context():
                c = F.conv2d(x, w, b)
            return bn(c, *rest)

        check(fn, arguments(), *codes)

    @pytest.mark.parametrize(
        ("context", "code"), [(bf16, Code.FUSED), (torch.no_grad, Code.OTHER_GRADIENT)]
    )
    def test_batch_norm_inside(self, context, code):
        def fn(x, w, b, *rest):
            c = F.conv2d(x, w, b)
            with context():
                y = bn(c, *rest)
            return y * w.sum()

        check(fn, arguments(), code)

    def test_region_in_between(self):
        def fn(x, w, b, *rest):
            c = F.conv2d(x, w, b)
            with torch.no_grad():
                u = x * 2
            return bn(c, *rest) + u.sum()

        check(fn, arguments(), Code.FUSED)

    def test_regions_around_and_elsewhere(self):
        """What is left before the layer and entered after the batch norm does not matter."""

        def fn(x, *rest):
            with torch.no_grad():
                x = x + 1
            with bf16():
                y = conv_bn(x, *rest)
            with torch.no_grad():
                z = y.sum()
            return y * z

        check(fn, arguments(), Code.FUSED)

    def test_no_grad_around_both(self):
        def fn(x, w, b, *rest):
            with torch.no_grad():
                y = conv_bn(x, w, b, *rest)
            return y * w.sum()

        check(fn, arguments(), Code.OTHER_GRADIENT)

    def test_annotation(self):
        def fn(x, w, b, *rest):
            with torch.fx.traceback.annotate({"stage": 0}):
                c = F.conv2d(x, w, b)
            with torch.fx.traceback.annotate({"stage": 1}):
                return bn(c, *rest)

        check(fn, arguments(), Code.FUSED)


class TestTransforms:
    """functorch: the graph holds what the transform made of the calls."""

    def test_vmap(self):
        """The samples are made channels: one value per channel and sample is not joined."""

        def fn(x, *rest):
            return torch.vmap(lambda one: conv_bn(one[None], *rest)[0])(x)

        check(fn, arguments(), Code.UNBATCHED)

    def test_vmap_over_weights(self):
        def fn(x, w, *rest):
            return torch.vmap(lambda one: conv_bn(x, one, *rest))(torch.stack([w, w * 2]))

        check(fn, arguments(), Code.NOT_AFTER_LAYER)

    def test_vmap_of_checkpoint(self):
        def fn(x, *rest):
            def body(one):
                return conv_bn(one[None], *rest)[0]

            return torch.vmap(lambda one: checkpoint(body, one, use_reentrant=False))(x)

        check(fn, arguments(), Code.UNBATCHED)

    def test_func_grad(self):
        def fn(x, w, *rest):
            return torch.func.grad(lambda w: conv_bn(x, w, *rest).cos().sum())(w)

        check(fn, arguments(), Code.SAVED_ANYWAY, exact=False)

    def test_gradient_in_the_graph(self):
        """With gradients as outputs, which have gradients in turn."""

        def fn(x, w, b, g, *rest):
            y = conv_bn(x, w, b, g, *rest)
            return torch.autograd.grad(y.sin().sum(), [x, w, b, g])

        check(fn, arguments(grad=("x",)), Code.SAVED_ANYWAY)

    def test_after_a_transform(self):
        def fn(x, *rest):
            return conv_bn(torch.vmap(torch.sin)(x), *rest)

        check(fn, arguments(), Code.FUSED)


class TestHooks:
    def test_on_parameters_and_result(self):
        def fn(x, w, *rest):
            w.register_hook(lambda grad: grad * 2)
            y = conv_bn(x, w, *rest)
            return y.relu()

        check(fn, arguments(), Code.FUSED)

    @pytest.mark.parametrize(
        ("hook", "code"),
        [(lambda grad: grad * 2, Code.FUSED), (torch.tanh, Code.OTHER_GRADIENT)],
        ids=["scales", "tanh"],
    )
    def test_on_layer_output(self, hook, code):
        """It is part of the graph: what it makes of the gradient may be a scaling or not."""

        def fn(x, w, b, *rest):
            c = F.conv2d(x, w, b)
            c.register_hook(hook)
            return bn(c, *rest)

        check(fn, arguments(), code)
