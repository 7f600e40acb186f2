"""A layer's output is a true tensor: whoever stores, watches or changes it or its gradient."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from common import spread_statistics
from eager_helpers import Fn, codes, run
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from convbn_inductor_pass import Code, turn_on


def classifier():
    """Its first layer's output is what a class activation map is made of."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return spread_statistics(
        nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    ).eval()


def store_by_hook(stored):
    model = classifier()
    model[0].register_forward_hook(lambda m, args, out: stored.update(c=out))
    return model


def store_by_pre_hook(stored):
    model = classifier()
    model[1].register_forward_pre_hook(lambda m, args: stored.update(c=args[0]))
    return model


def store_in_forward(stored):
    layers = classifier()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            self.features = self.layers[0](x)
            stored.update(c=self.features)
            return self.layers[1:](self.features)

    return Model().eval()


class Rows(nn.Module):
    """A linear layer whose output a batch norm takes as rows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.bn = nn.Linear(8, 3), nn.BatchNorm1d(3)
        spread_statistics(self).eval()

    def forward(self, x):
        return self.bn(self.linear(x).flatten(0, -2)).sum(0, keepdim=True)


def store_rows(stored):
    model = Rows()
    model.bn.register_forward_pre_hook(lambda m, args: stored.update(c=args[0]))
    return model


STORES = [store_by_hook, store_by_pre_hook, store_in_forward, store_rows]


@pytest.mark.parametrize("how", ["grad", "retain_grad", "register_hook", "gradient_edge"])
@pytest.mark.parametrize("store", STORES)
def test_gradient_of_a_stored_output(store, how):
    def gradients(on):
        stored, found = {}, []
        model = store(stored)
        if on:
            turn_on(model)
        torch.manual_seed(1)
        x = torch.randn(2, 4, 8, 8)
        for _ in range(3):
            score, c = model(x)[:, 0].sum(), stored["c"]
            if how == "grad":
                found += torch.autograd.grad(score, c)
            elif how == "gradient_edge":
                edge = torch.autograd.graph.get_gradient_edge(c)
                found += torch.autograd.grad(score, edge)
            elif how == "retain_grad":
                c.retain_grad()
                score.backward()
                found.append(c.grad)
            else:
                c.register_hook(found.append)
                score.backward()
        return found

    expected = gradients(on=False)
    assert len(expected) == 3
    torch.testing.assert_close(gradients(on=True), expected)


@pytest.mark.parametrize(
    "change", ["returns", "in_place", "node", "next_node", "norm_node", "inner_region"]
)
def test_hooks_that_change_the_gradient(change):
    """Registered after the batch norm, when the pair is fused already."""

    def forward(m, x):
        c = m.conv(x)
        y = m.bn(c)
        if change == "returns":
            c.register_hook(lambda g: 3 * g)
        elif change == "in_place":
            c.register_hook(lambda g: g.mul_(3))
        elif change == "next_node":
            (node, _), *_ = y.grad_fn.next_functions
            node.register_prehook(lambda grads: (3 * grads[0],))
        elif change == "norm_node":
            y.grad_fn.register_hook(lambda to_inputs, _: (3 * to_inputs[0], *to_inputs[1:]))
        elif change == "inner_region":  # which a module opens that runs under other hooks
            with torch.autograd.graph.save_on_cpu():
                inner(c)
        else:
            c.grad_fn.register_prehook(lambda grads: (3 * grads[0],))
        return y

    inner = Fn(lambda m, c: c.register_hook(lambda g: 3 * g))
    model, x = Fn(forward), torch.randn(2, 4, 6, 6, requires_grad=True)
    expected, gradients = run(model, x)
    turn_on(inner)
    got, tune_gradients = run(turn_on(model), x)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    torch.testing.assert_close(tune_gradients, gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use", ["stored", "autograd_function", "returned"])
def test_gradients_of_two_uses_add_up(use):
    """Whether or not anybody could see the other use when the batch norm ran."""

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, g):
            return 2 * g * ctx.saved_tensors[0]

    stored = []

    def forward(m, x):
        c = m.conv(x)
        y = m.bn(c)
        if use == "stored":
            stored.append(c)
            return y
        return (y, c) if use == "returned" else y + Square.apply(c)

    def gradients(model):
        out = model(x)
        loss = sum(t.sin().sum() for t in (out if use == "returned" else (out,)))
        if use == "stored":
            loss = loss + stored.pop().cos().sum()
        return torch.autograd.grad(loss, [x, *model.parameters()])

    model, x = Fn(forward), torch.randn(2, 4, 6, 6, requires_grad=True)
    expected = gradients(model)
    turn_on(model)
    for _ in range(3):
        torch.testing.assert_close(gradients(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stored", [False, True])
def test_a_gradient_that_nobody_asks_for_is_not_computed(stored):
    """That of a layer's output, as large as the output itself."""
    shapes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            shapes.append((str(func), tuple(out.shape) if isinstance(out, torch.Tensor) else ()))
            return out

    model, x = Fn(lambda m, x: m.bn(m.conv(x))), torch.randn(2, 4, 6, 7)
    c = []
    model.conv.register_forward_hook(lambda m, args, out: c.append(out) if stored else None)
    y = turn_on(model)(x)
    g = torch.randn_like(y)
    with Watch():
        y.backward(g)
    made = [name for name, shape in shapes if shape == y.shape and "detach" not in name]
    assert made[:1] == (["aten.mul.Tensor"] if stored else [])
    assert [name for name, _ in shapes].count("aten.convolution_backward.default") == 1


def test_retained_graphs_and_partial_backwards():
    """What one pass leaves at a layer's node is not taken for another's."""
    model = Fn(lambda m, x: (m.bn(m.conv(x)), m.conv.last))
    model.conv.register_forward_hook(lambda m, args, out: setattr(m, "last", out))
    x = torch.randn(2, 4, 6, 6, requires_grad=True)

    def gradients():
        y, c = model(x)
        found = [*torch.autograd.grad(y.sum(), c, retain_graph=True)]  # stops at c
        found += torch.autograd.grad(c.sum(), model.conv.parameters(), retain_graph=True)
        found += torch.autograd.grad(y.square().sum(), model.parameters(), retain_graph=True)
        found += torch.autograd.grad(y.sum() + c.sum(), [x, *model.parameters()])
        return found

    expected = gradients()
    turn_on(model)
    for _ in range(2):
        torch.testing.assert_close(gradients(), expected, rtol=1e-4, atol=1e-4)


def test_a_backward_pass_inside_another():
    """A hook of another branch runs between the two nodes of a pair, and goes over both."""

    def forward(m, x):
        c = m.conv(x)
        z = x * 2
        return m.bn(c), z

    model, x = Fn(forward), torch.randn(2, 4, 6, 6, requires_grad=True)
    order = []

    def gradients():
        y, z = model(x)

        def again(g):
            order.append("again")
            with torch.enable_grad():
                torch.autograd.grad(y.sum(), model.parameters(), retain_graph=True)

        z.register_hook(again)
        y.grad_fn.register_hook(lambda *_: order.append("batch norm"))
        loss = y.square().sum() + z.sum()
        return torch.autograd.grad(loss, [x, *model.parameters()], retain_graph=True)

    expected = gradients()
    turn_on(model)
    torch.testing.assert_close(gradients(), expected, rtol=1e-4, atol=1e-4)
    assert order == ["batch norm", "again", "batch norm"] * 2


def test_partial_backwards_leave_nothing_behind():
    """Left at a node that does not run, a gradient with a graph would hold that graph."""
    model = turn_on(Fn(lambda m, x: F.relu(m.bn(m.conv(x)))))
    y = model(torch.randn(2, 4, 6, 6, requires_grad=True))
    alive = y.grad_fn.metadata["alive"] = torch.empty(0)
    alive = weakref.ref(alive)
    torch.autograd.grad(y.square().sum(), model.bn.weight, create_graph=True)
    del y
    assert alive() is None


@pytest.mark.parametrize("how", ["module", "global", "backward"])
def test_fused_again_after_a_hook_is_removed(how):
    model, x = classifier(), torch.randn(2, 4, 8, 8)
    turn_on(model)
    model(x)
    assert codes(model) == [Code.FUSED]
    if how == "module":
        handle = model[0].register_forward_hook(lambda m, args, out: out.mean() and None)
    elif how == "global":
        handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: out + 0)
    else:
        handle = model[0].register_full_backward_hook(lambda m, grads, out: None)
    try:
        model(x)
        assert codes(model) != [Code.FUSED]
    finally:
        handle.remove()
    for _ in range(2):
        model(x)
    assert codes(model) == [Code.FUSED]


@pytest.mark.parametrize("loss", [torch.sum, lambda y: y.pow(3).sum()])
@pytest.mark.parametrize("layer", ["convolution", "linear"])
@pytest.mark.parametrize("use", ["stored", "retained", "hooked", "without_grad", "bits"])
def test_second_order_gradients_through_it(use, layer, loss):
    """That of the batch norm's weight depends on a stored output, and passes its hooks."""

    def forward(m, x):
        m.c = m.conv(x)
        y = m.bn(m.c if layer == "convolution" else m.c.flatten(0, 1))
        if use == "retained":
            m.c.retain_grad()
        elif use == "hooked":
            m.c.register_hook(lambda g: 2 * g)
        elif use in ("without_grad", "bits"):  # views that are no part of the graph
            with torch.no_grad():
                m.view = m.c.flatten(0, 1) if use == "without_grad" else m.c.view(torch.int64)
            m.c = x
        return y

    conv, bn = (nn.Linear(4, 4), nn.BatchNorm1d(4)) if layer == "linear" else (None, None)
    model = Fn(forward, conv=conv, bn=bn).double()
    x = torch.randn(2, 4, 6, 4, requires_grad=True, dtype=torch.float64)
    x = x[0].detach().requires_grad_() if layer == "linear" else x

    def second_order():
        y = model(x)
        (dgamma,) = torch.autograd.grad(loss(y), model.bn.weight, create_graph=True)
        wanted = [model.c, x, model.conv.weight, model.conv.bias]
        return torch.autograd.grad(loss(dgamma), wanted)

    expected = second_order()
    turn_on(model)
    for _ in range(2):
        torch.testing.assert_close(second_order(), expected)


def test_layers_without_batch_norm_keep_nothing():
    inputs = []

    def forward(m, x):
        for _ in range(3):
            x = x + 1
            inputs.append(weakref.ref(x))
            x = m.conv(x).detach()
            assert inputs[-1]() is None
        return m.bn(m.conv(x))

    model = turn_on(Fn(forward))
    for _ in range(2):
        model(torch.randn(2, 4, 6, 6)).sum().backward()
        assert codes(model) == [Code.FUSED]
    assert len(inputs) == 6


@pytest.mark.parametrize("second", ["mean", "batch norm"])
def test_layers_graph_freed_by_another_backward(second):
    """The batch norm's gradients do not need it in eval mode, either."""

    def forward(m, x):
        m.c = m.conv(x)
        y = m.bn(m.c)
        return y, m.c.mean() if second == "mean" else m.other(m.c).sum()

    model = Fn(forward)
    model.other = spread_statistics(nn.BatchNorm2d(4)).eval()
    x = torch.randn(2, 4, 6, 6)

    def gradients():
        y, other = model(x)
        other.backward()
        return torch.autograd.grad(y.square().sum(), model.bn.parameters())

    expected = gradients()
    turn_on(model)
    for _ in range(3):
        torch.testing.assert_close(gradients(), expected, rtol=1e-4, atol=1e-4)


def test_layers_whose_output_is_used_keep_nothing():
    """Though the outputs live, and others' hooks put away what is saved."""
    inputs, outputs = [], []

    def forward(m, x):
        for _ in range(3):
            x = x + 1
            inputs.append(weakref.ref(x))
            outputs.append(m.conv(x))
            x = outputs[-1].sin()
            assert inputs[-1]() is None
        return m.bn(m.conv(x))

    model = turn_on(Fn(forward))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy().copy(), torch.from_numpy):
        model(torch.randn(2, 4, 6, 6)).sum().backward()
    assert codes(model) == [Code.FUSED]
