"""Where fusing could be wrong, one class of test per class of hazard.

Each test says what the pass decides and holds outputs, gradients, final state and errors against
the same compiler without the pass, and gradients against float64 (``oracle``). Where a pair is
left alone, ``oracle`` also asserts that the graph is unchanged.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import PassRecorder, assert_same_as_unfused, compare, run
from random_graphs import WRITES, WRITES_STATISTICS
from torch import Tensor, fx, nn
from torch._higher_order_ops import scan, while_loop
from torch._higher_order_ops.map import map as map_
from torch._subclasses import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from convbn_inductor_pass import Code, options, testing

SHAPES = {
    "x": (2, 3, 6, 6),
    "w": (4, 3, 3, 3),
    "b": (4,),
    "g": (4,),
    "beta": (4,),
    "m": (4,),
    "v": (4,),
}
PARAMETERS = ("w", "b", "g", "beta")
Arguments = dict[str, Tensor]


def arguments(
    frozen: tuple[str, ...] = (), grad: tuple[str, ...] = (), **changes: Any
) -> Callable[[], Arguments]:
    """A factory of the same arguments; ``changes`` are shapes, or functions of the arguments."""

    def make() -> Arguments:
        generator = torch.Generator().manual_seed(0)
        made: Arguments = {}
        for name, shape in {**SHAPES, **changes}.items():
            if callable(shape):
                made[name] = shape(made)
                continue
            value = torch.randn(shape, generator=generator)
            value = value.abs() + 0.5 if name == "v" else value * 0.5
            needs_grad = name in grad or (name in PARAMETERS and name not in frozen)
            made[name] = value.requires_grad_(needs_grad)
        return made

    return make


def double(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


def check(
    fn: Callable[..., Any],
    make: Callable[[], Arguments],
    *codes: Code,
    exact: bool = True,
    **kwargs: Any,
) -> PassRecorder:
    """Compare with and without the pass, and assert what it decided."""

    def in_float64() -> Arguments:
        return {n: double(t) for n, t in make().items()}

    recorder = assert_same_as_unfused(fn, make, double=in_float64 if exact else None, **kwargs)
    assert recorder.codes == list(codes)
    return recorder


def bn(c, g, beta, m, v):
    return F.batch_norm(c, m, v, g, beta)


def conv_bn(x, w, b, g, beta, m, v):
    return bn(F.conv2d(x, w, b), g, beta, m, v)


def bf16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


class TestArguments:
    """1. Keywords, defaults, ``input=``, string padding, overload packets."""

    aten = torch.ops.aten
    CONVS = (
        lambda x, w, b: F.conv2d(x, w, b),
        lambda x, w, b: F.conv2d(input=x, bias=b, weight=w, stride=2),
        lambda x, w, b: torch.conv2d(x, w, b, (1, 2), 1, (1, 2), 1),
        lambda x, w, b: F.conv2d(x, w, b, padding="same"),
        lambda x, w, b: F.conv2d(x, w, b, (2, 1), "valid"),
        lambda x, w, b: F.conv2d(x, w, padding=[1]),
        lambda x, w, b: torch.ops.aten.conv2d(x, w, b),
        lambda x, w, b: torch.ops.aten.conv2d.default(x, w, None, [1, 1], [1, 0]),
        lambda x, w, b: torch.ops.aten.conv2d.padding(x, w, b, padding="same"),
        lambda x, w, b: torch.ops.aten.convolution.default(
            x, w, b, [1], [1], [1], False, [0, 0], 1
        ),
        lambda x, w, b: torch.convolution(x, w, b, (2, 2), (0, 1), (1, 1), False, (0, 0), 1),
    )
    BATCH_NORMS = (
        lambda c, g, beta, m, v: F.batch_norm(c, m, v),
        lambda c, g, beta, m, v: F.batch_norm(c, m, v, g, beta, False, 0.3, 0.1),
        lambda c, g, beta, m, v: F.batch_norm(
            running_var=v, running_mean=m, input=c, weight=g, eps=1e-2
        ),
        lambda c, g, beta, m, v: torch.batch_norm(c, g, beta, m, v, False, 0.1, 1e-5, True),
        lambda c, g, beta, m, v: torch.ops.aten.batch_norm(
            c, g, beta, m, v, False, 0.1, 1e-5, False
        ),
        lambda c, g, beta, m, v: torch.ops.aten.batch_norm.default(
            c, g, None, m, v, training=False, momentum=0.1, eps=1e-5, cudnn_enabled=False
        ),
        lambda c, g, beta, m, v: torch.native_batch_norm(c, g, beta, m, v, False, 0.1, 1e-5)[0],
        lambda c, g, beta, m, v: torch.ops.aten.native_batch_norm.default(
            c, g, beta, m, v, False, 0.1, 1e-5
        )[0],
        lambda c, g, beta, m, v: torch.ops.aten._native_batch_norm_legit_no_training.default(
            c, g, beta, m, v, 0.1, 1e-5
        )[0],
    )

    @pytest.mark.parametrize("i", range(len(CONVS)))
    def test_layer(self, i):
        conv = self.CONVS[i]
        check(lambda x, w, b, *rest: bn(conv(x, w, b), *rest), arguments(), Code.FUSED)

    @pytest.mark.parametrize("i", range(len(BATCH_NORMS)))
    def test_batch_norm(self, i):
        norm = self.BATCH_NORMS[i]
        code = Code.FUSED if i else Code.AFFINE_FROZEN
        check(lambda x, w, b, *rest: norm(F.conv2d(x, w, b), *rest), arguments(), code)

    def test_linear_keywords(self):
        check(
            lambda x, w, b, *rest: bn(F.linear(bias=b, input=x, weight=w), *rest),
            arguments(x=(5, 3), w=(4, 3)),
            Code.FUSED,
        )

    def test_statistics_used(self):
        """The other outputs of native_batch_norm are not what a fused call returns."""

        def fn(x, w, b, g, beta, m, v):
            y, mean, _ = torch.native_batch_norm(F.conv2d(x, w, b), g, beta, m, v, False, 0.1, 1e-5)
            return y, mean

        check(fn, arguments(), Code.STATISTICS_USED)


class TestLayouts:
    """2. The scale lies on the output channels, whose axis differs by kind of layer."""

    @pytest.mark.parametrize("groups", [1, 2, 4])
    @pytest.mark.parametrize("dims", [1, 2, 3])
    def test_transposed(self, dims, groups):
        """Square weights: a scale on the wrong axis has the right shape."""
        conv = getattr(F, f"conv_transpose{dims}d")
        check(
            lambda x, w, b, *rest: bn(
                conv(x, w, b, stride=2, output_padding=1, groups=groups), *rest
            ),
            arguments(grad=("x",), x=(2, 4, *[3] * dims), w=(4, 4 // groups, *[2] * dims)),
            Code.FUSED,
        )

    def test_padding_same_of_even_kernels(self):
        """One more on the right than on the left."""
        check(
            lambda x, w, b, *rest: bn(F.conv2d(x, w, b, padding="same", dilation=(1, 3)), *rest),
            arguments(grad=("x",), x=(2, 3, 6, 5), w=(4, 3, 2, 4)),
            Code.FUSED,
        )

    @pytest.mark.parametrize("groups", [2, 4])
    def test_grouped_wider_than_input(self, groups):
        check(
            lambda x, w, b, *rest: bn(F.conv2d(x, w, b, groups=groups), *rest),
            arguments(
                grad=("x",),
                x=(2, 4, 5, 5),
                w=(8, 4 // groups, 3, 3),
                **dict.fromkeys(("b", "g", "beta", "m", "v"), (8,)),
            ),
            Code.FUSED,
        )


class TestRank:
    """3. Dimension 1, which a batch norm normalises, is not always the layer's channels."""

    def test_unbatched_convolution(self):
        """conv2d of [3, 6, 6] gives [4, 4, 4]: dimension 1 is the height, and has 4 rows too."""
        fn = conv_bn
        check(fn, arguments(x=(3, 6, 6)), Code.UNBATCHED)

    def test_unbatched_then_unsqueezed_in_place(self):
        """The recorded input has its later shape, with a batch."""

        def fn(x, *rest):
            y = conv_bn(x, *rest)
            x.data.unsqueeze_(0)
            return y

        check(fn, arguments(x=(3, 6, 6)), Code.UNBATCHED)

    @pytest.mark.parametrize("shape", [(2, 4, 3), (2, 4, 5, 3)])
    def test_linear_of_many_dimensions(self, shape):
        check(
            lambda x, w, b, *rest: bn(F.linear(x, w, b), *rest),
            arguments(x=shape, w=(4, 3)),
            Code.UNBATCHED,
        )

    def test_linear_weight_of_one_dimension(self):
        check(
            lambda x, w, b, *rest: bn(F.linear(x, w), *rest),
            arguments(x=(5, 4, 3), w=(3,)),
            Code.UNBATCHED,
        )

    def test_rows_of_a_convolution(self):
        """[N, 4, 4].flatten(0, 1): the rows' length is that of the channels, by accident."""
        check(
            lambda x, w, b, *rest: bn(F.conv1d(x, w, b).flatten(0, 1), *rest),
            arguments(x=(2, 3, 6), w=(4, 3, 3)),
            Code.UNBATCHED,
        )

    def test_transposed_rows_of_a_linear(self):
        check(
            lambda x, w, b, *rest: bn(F.linear(x, w, b).transpose(1, 2), *rest),
            arguments(x=(2, 5, 3), w=(4, 3)),
            Code.NOT_AFTER_LAYER,
        )

    @pytest.mark.parametrize("bias", [(1,), (5, 4), ()])
    def test_linear_bias_that_broadcasts(self, bias):
        check(
            lambda x, w, b, *rest: bn(F.linear(x, w, b), *rest),
            arguments(x=(5, 3), w=(4, 3), b=bias),
            Code.UNSUPPORTED_SHAPE,
        )


def in_dtype(make: Callable[[], Arguments], dtype: torch.dtype, names: str) -> Any:
    def cast() -> Arguments:
        return {
            n: t.detach().to(dtype).requires_grad_(t.requires_grad) if n in names.split() else t
            for n, t in make().items()
        }

    return cast


class TestDtypes:
    """4. Half-precision layers with float32 batch norms, autocast, promotion."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("names", ["x w b", "x w b g beta m v"])
    def test_dtypes(self, dtype, names):
        make = in_dtype(arguments(grad=("x",)), dtype, names)
        check(conv_bn, make, Code.FUSED)

    def test_float16_stays_in_range(self):
        """With a large variance dW is in float16's range, and dW / s would not be."""

        def fn(*args):
            return conv_bn(*args) * 1000

        make = arguments(x=(8, 3, 32, 32), v=lambda made: torch.full((4,), 1e6))
        make = in_dtype(make, torch.float16, "x w b")
        check(fn, make, Code.FUSED)
        assert all(g.isfinite().all() for g in run(fn, make()).gradients.values())

    def test_autocast_inside(self):
        def fn(*args):
            with bf16():
                return conv_bn(*args).relu() + 1

        check(fn, arguments(grad=("x",)), Code.FUSED)

    def test_autocast_ambient(self):
        check(conv_bn, arguments(grad=("x",)), Code.FUSED, context=bf16)

    @pytest.mark.parametrize("i", range(len(TestArguments.CONVS)))
    def test_autocast_of_every_spelling(self, i):
        """Autocast casts for conv2d; torch.convolution it does not know and leaves in float32."""
        conv = TestArguments.CONVS[i]
        check(
            lambda x, w, b, *rest: bn(conv(x, w, b), *rest),
            arguments(grad=("x",)),
            Code.FUSED,
            context=bf16,
        )

    def test_autocast_ambient_and_off_inside(self):
        def fn(*args):
            with torch.autocast("cpu", enabled=False):
                return conv_bn(*args)

        check(fn, arguments(grad=("x",)), Code.FUSED, context=bf16)

    def test_autocast_float64(self):
        """Autocast leaves float64 alone."""
        check(
            conv_bn,
            in_dtype(arguments(), torch.float64, "x w b g beta m v"),
            Code.FUSED,
            context=bf16,
        )

    def test_autocast_linear(self):
        check(
            lambda x, w, b, *rest: bn(F.linear(x, w, b).flatten(0, 1), *rest),
            arguments(grad=("x",), x=(2, 5, 3), w=(4, 3)),
            Code.FUSED,
            context=bf16,
        )

    def test_autocast_weight_used_twice(self):
        def fn(x, w, b, *rest):
            return conv_bn(x, w, b, *rest) + conv_bn(x * 2, w, None, *rest)

        check(fn, arguments(grad=("x",)), Code.FUSED, Code.FUSED, context=bf16)


class TestRegions:
    """5. A mode that changes between layer and batch norm, and transforms."""

    CONTEXTS = (bf16, torch.no_grad, torch.inference_mode)

    @pytest.mark.parametrize("i", range(len(CONTEXTS)))
    def test_layer_inside(self, i):
        def fn(x, w, b, *rest):
            with self.CONTEXTS[i]():
                c = F.conv2d(x, w, b)
            return bn(c, *rest)

        check(fn, arguments(), Code.REGION)

    @pytest.mark.parametrize("i", range(2))
    def test_batch_norm_inside(self, i):
        def fn(x, w, b, *rest):
            c = F.conv2d(x, w, b)
            with self.CONTEXTS[i]():
                y = bn(c, *rest)
            return y * w.sum()

        check(fn, arguments(), Code.REGION)

    def test_region_in_between(self):
        def fn(x, w, b, *rest):
            c = F.conv2d(x, w, b)
            with torch.no_grad():
                u = x * 2
            return bn(c, *rest) + u.sum()

        check(fn, arguments(), Code.REGION)

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

        check(fn, arguments(), Code.NO_GRAD)

    def test_annotation(self):
        def fn(x, w, b, *rest):
            with torch.fx.traceback.annotate({"stage": 0}):
                c = F.conv2d(x, w, b)
            with torch.fx.traceback.annotate({"stage": 1}):
                return bn(c, *rest)

        check(fn, arguments(), Code.REGION)

    def test_vmap(self):
        def fn(x, *rest):
            return torch.vmap(lambda one: conv_bn(one[None], *rest)[0])(x)

        check(fn, arguments(), Code.FUNCTORCH)

    def test_vmap_over_weights(self):
        def fn(x, w, *rest):
            return torch.vmap(lambda one: conv_bn(x, one, *rest))(torch.stack([w, w * 2]))

        check(fn, arguments(), Code.FUNCTORCH)

    def test_vmap_of_checkpoint(self):
        def fn(x, *rest):
            def body(one):
                return conv_bn(one[None], *rest)[0]

            return torch.vmap(lambda one: checkpoint(body, one, use_reentrant=False))(x)

        check(fn, arguments(), Code.FUNCTORCH)

    def test_func_grad(self):
        def fn(x, w, *rest):
            return torch.func.grad(lambda w: conv_bn(x, w, *rest).cos().sum())(w)

        check(fn, arguments(), Code.FUNCTORCH, exact=False)

    def test_after_a_transform(self):
        def fn(x, *rest):
            return conv_bn(torch.vmap(torch.sin)(x), *rest)

        check(fn, arguments(), Code.FUSED)

    def test_hooks_on_parameters_and_result(self):
        def fn(x, w, *rest):
            w.register_hook(lambda grad: grad * 2)
            y = conv_bn(x, w, *rest)
            return y.relu()

        check(fn, arguments(), Code.FUSED)

    def test_hook_on_layer_output(self):
        """A graph break; whatever the graphs, the hook sees the layer's output gradient."""

        def fn(x, w, b, *rest):
            c = F.conv2d(x, w, b)
            c.register_hook(lambda grad: grad * 2)
            return bn(c, *rest)

        assert not assert_same_as_unfused(fn, arguments()).fused


def written_function(write: str, where: str, extra: str = "") -> Callable[..., Any]:
    """conv, [write], batch norm, [write] as a function of its own code."""
    lines = ["c = F.conv2d(x, w, b)", "y = F.batch_norm(c, m, v, g, beta)", "return y * 2"]
    lines[1 if where == "between" else 2 : 1 if where == "between" else 2] = write.split("\n")
    source = f"def fn(x, w, b, g, beta, m, v{extra}):\n" + "\n".join("    " + li for li in lines)
    scope: dict[str, Any] = {"torch": torch, "F": F}
    exec(source, scope)
    return scope["fn"]


# These cannot be seen for what they are, or come with a region, which is refused first.
UNREADABLE_WRITES = ("numpy", "no_grad")


class TestMutation:
    """6. Writes between layer and batch norm, and later; aliases."""

    @pytest.mark.parametrize("write", WRITES)
    def test_input_written_between(self, write):
        unreadable = any(word in write for word in UNREADABLE_WRITES)
        code = Code.REGION if unreadable else Code.INPUT_MUTATED
        check(written_function(write.format(t="x"), "between"), arguments(), code)

    @pytest.mark.parametrize("target", ["w", "b", "x[:, :1]", "w.view(-1)", "w.transpose(0, 1)"])
    @pytest.mark.parametrize("write", ["{t}.data.mul_(0.5)", "alias = {t}.data\nalias += 1"])
    def test_operand_written_between(self, target, write):
        check(written_function(write.format(t=target), "between"), arguments(), Code.INPUT_MUTATED)

    @pytest.mark.parametrize("write", WRITES_STATISTICS)
    def test_operand_written_as_statistics(self, write):
        """The bias of the layer is the running mean of another batch norm, in training mode."""
        write = write.format(t="b", c=4)
        check(written_function(write, "between"), arguments(), *self.codes_after(write))

    @staticmethod
    def codes_after(write: str) -> list[Code]:
        other = [] if "_legit" in write or "instance" in write else [Code.NOT_AFTER_LAYER]
        return [*other, Code.INPUT_MUTATED]

    @pytest.mark.parametrize("target", ["g", "beta", "m", "v"])
    def test_batch_norm_written_between(self, target):
        """The batch norm stays where it is: it sees the write, fused or not."""
        check(written_function(f"{target}.data.mul_(0.5)", "between"), arguments(), Code.FUSED)

    @pytest.mark.parametrize("write", ["c.mul_(2)", "c.view(-1)[:3].zero_()", "c[0] = 1.0"])
    def test_layer_output_written(self, write):
        for where in ("between", "after"):
            check(written_function(write, where), arguments(), Code.LAYER_OUTPUT_USED)

    @pytest.mark.parametrize("how", ["detach", "view_as", "[:, :2]", "T"])
    def test_input_alias_argument(self, how):
        """Two arguments of the graph that share memory."""
        alias = {
            "detach": lambda made: made["x"].detach(),
            "view_as": lambda made: made["x"].view(-1),
            "[:, :2]": lambda made: made["x"][:, :2],
            "T": lambda made: made["x"].permute(3, 2, 1, 0),
        }[how]
        fn = written_function("z.data.mul_(2)", "between", extra=", z")
        check(fn, arguments(z=alias), Code.INPUT_MUTATED)

    def test_unrelated_write(self):
        fn = written_function("z.mul_(2)", "between", extra=", z")
        check(fn, arguments(z=(2, 3, 6, 6)), Code.FUSED)

    @pytest.mark.parametrize("target", ["x", "w", "b", "g", "m", "v"])
    @pytest.mark.parametrize("write", ["{t}.data.mul_(2)", "with torch.no_grad(): {t}.mul_(2)"])
    def test_written_later(self, target, write):
        """Behind autograd's back eager mode loses dW to it, fused dgamma as well; else it raises.

        The bias is not kept in eval mode, so that writing to it later is no error at all.
        """
        fn = written_function(write.format(t=target), "after")
        check(fn, arguments(), Code.MUTATED_LATER)

    def test_weight_written_later_under_autocast(self):
        """Eval mode keeps the copy after the cast; writing to the weight is no error."""

        def fn(x, w, *rest):
            with bf16():
                y = conv_bn(x, w, *rest)
            w.data.mul_(2)
            return y

        check(fn, arguments(), Code.MUTATED_LATER)

    def test_result_written_later(self):
        check(written_function("y.mul_(2)\ny += 1\nF.relu_(y)", "after"), arguments(), Code.FUSED)

    @pytest.mark.parametrize("target", ["x", "w", "g"])
    def test_version_counter(self, target):
        """A write after the call and before backward is still an error."""

        def call(fn, made):
            y = fn(*made.values())
            with torch.no_grad():
                made[target].add_(1)
            return y

        check(conv_bn, arguments(grad=("x",)), Code.FUSED, call=call)
        assert isinstance(run(conv_bn, arguments()(), call).error, RuntimeError)

    @pytest.mark.parametrize("target", ["m", "b"])
    def test_version_counter_of_a_shift(self, target):
        """What is kept is ``b - mean``, not the two: the gradient is that of before the write."""

        def call(fn, made):
            y = fn(*made.values())
            with torch.no_grad():
                made[target].add_(1)
            return y

        make = arguments()
        fused = run(torch.compile(conv_bn, backend=testing.fast_backend()), make(), call)
        unfused = run(torch.compile(conv_bn, backend=testing.fast_backend(fuse=False)), make())
        eager = run(conv_bn, make())
        fused.state = unfused.state
        if fused.error is None:
            compare(fused, unfused, eager, eager)
        else:
            assert "modified by an inplace operation" in str(fused.error)

    def test_storage_exchanged(self):
        def fn(x, w, b, g, beta, m, v, z):
            c = F.conv2d(x, w, b)
            torch.ops.aten.set_.source_Tensor(z, x)
            z.mul_(2)
            return bn(c, g, beta, m, v)

        check(fn, arguments(z=(2, 3, 6, 6)), Code.INPUT_MUTATED)

    def test_storage_freed(self):
        """An operator whose schema does not say what it does to its argument."""

        def fn(x, w, b, *rest):
            c = F.conv2d(x, w, b)
            x.untyped_storage().resize_(0)
            return bn(c, *rest)

        check(fn, arguments(), Code.INPUT_MUTATED)

    def test_alias_through_an_operator(self):
        def fn(x, w, b, *rest):
            alias = checkpoint(lambda t: t.view(-1), x, use_reentrant=False)
            c = F.conv2d(x, w, b)
            alias.data.mul_(2)
            return bn(c, *rest)

        check(fn, arguments(), Code.INPUT_MUTATED)

    def test_alias_through_idle_dropout(self):
        def fn(x, w, b, *rest):
            alias = F.dropout(x, 0.5, training=False)
            c = F.conv2d(x, w, b)
            alias.data.mul_(2)
            return bn(c, *rest)

        check(fn, arguments(), Code.INPUT_MUTATED)

    def test_alias_through_a_function(self):
        class View(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.view(-1)

            @staticmethod
            def backward(ctx, grad):
                return grad.view(2, 3, 6, 6)

        def fn(x, w, b, *rest):
            alias = View.apply(x)
            c = F.conv2d(x, w, b)
            alias.data.mul_(2)
            return bn(c, *rest)

        check(fn, arguments(), Code.INPUT_MUTATED)

    @pytest.mark.parametrize("write", [True, False])
    def test_custom_operator(self, write):
        """What an operator's schema says counts."""
        name = "scale_" if write else "scale"

        def fn(x, w, b, *rest):
            c = F.conv2d(x, w, b)
            u = getattr(torch.ops.convbn_test, name)(x.data)
            return bn(c, *rest) + u.sum()

        def scale(x):
            return x.mul_(2) if write else x * 2

        with torch.library._scoped_library("convbn_test", "FRAGMENT") as library:
            schema = "(Tensor(a!) x) -> Tensor(a!)" if write else "(Tensor x) -> Tensor"
            library.define(name + schema)
            library.impl(name, scale, "CompositeImplicitAutograd")
            check(fn, arguments(), Code.INPUT_MUTATED if write else Code.FUSED)

    def test_function_that_dynamo_does_not_trace(self):
        torch.compiler.allow_in_graph(opaque)

        def fn(x, w, b, *rest):
            c = F.conv2d(x, w, b)
            opaque(x.data)
            return bn(c, *rest)

        check(fn, arguments(), Code.REGION)


def opaque(x):
    return x.mul_(2)


# Layers whose output has the shape of their input, so that they can be carried by a loop.
def carried(**changes):
    return arguments(x=(2, 4, 6, 6), w=(4, 4, 1, 1), **changes)


@torch.compiler.nested_compile_region
def region(*args):
    return conv_bn(*args).relu()


class TestSubgraphs:
    """7. Pairs in the bodies of operators that run graphs."""

    def test_checkpoint(self):
        def fn(x, *rest):
            return checkpoint(lambda x: conv_bn(x, *rest).relu(), x, use_reentrant=False) * 2

        check(fn, arguments(grad=("x",)), Code.FUSED)

    def test_cond(self):
        def fn(x, *rest):
            return torch.cond(
                x.sum() > 0, lambda x: conv_bn(x, *rest), lambda x: conv_bn(x + 1, *rest), (x,)
            )

        check(fn, arguments(grad=("x",)), Code.FUSED, Code.FUSED)

    def test_scan(self):
        def fn(x, *rest):
            return scan(lambda c, one: (c + 1, conv_bn(one, *rest)), x.sum()[None],
                        torch.stack([x, x + 1]))[1]  # fmt: skip

        check(fn, arguments(), Code.FUSED)

    def test_scan_carry(self):
        def fn(x, *rest):
            return scan(lambda c, one: (conv_bn(c + one, *rest).relu(), one * 1), x,
                        torch.stack([x, x + 1]))[0]  # fmt: skip

        check(fn, carried(), Code.FUSED)

    def test_map(self):
        def fn(x, w, *rest):
            return map_(lambda one, w: conv_bn(one, w, *rest), torch.stack([x, x + 1]), w)

        check(fn, arguments(), Code.FUSED)

    def test_while_loop(self):
        """Without gradients, as these cannot be had through it."""

        def fn(x, *rest):
            def body(i, x):
                return i + 1, conv_bn(x, *rest).relu()

            return while_loop(lambda i, x: i < 3, body, (torch.zeros((), dtype=torch.int64), x))[1]

        check(fn, carried(frozen=PARAMETERS), Code.NO_GRAD)

    def test_nested_compile_region(self):
        def fn(x, *rest):
            return region(region(x, *rest), *rest)

        recorder = assert_same_as_unfused(fn, carried())
        assert recorder.fused
        assert set(recorder.codes) == {Code.FUSED}

    def test_layer_outside_batch_norm_inside(self):
        def fn(x, w, b, *rest):
            c = F.conv2d(x, w, b)
            return checkpoint(lambda c: bn(c, *rest), c, use_reentrant=False)

        check(fn, arguments(), Code.NOT_AFTER_LAYER)

    def test_operators_that_write_nothing(self):
        """A body that only reads the layer's operands is no write to them."""

        def fn(x, w, b, *rest):
            c = F.conv2d(x, w, b)
            u = checkpoint(lambda x: (x * w.sum() + b.sum()).sin(), x, use_reentrant=False)
            return bn(c, *rest) + u.sum()

        check(fn, arguments(), Code.FUSED)

    def test_written_in_a_body(self):
        def fn(x, w, b, *rest):
            def body(t):
                t.data.mul_(2)
                return t + 1

            c = F.conv2d(x, w, b)
            u = checkpoint(body, x, use_reentrant=False)
            return bn(c, *rest) + u.sum()

        recorder = assert_same_as_unfused(fn, arguments())
        assert not recorder.fused

    def test_nodes_print_and_recompile(self):
        def fn(x, *rest):
            return checkpoint(lambda x: conv_bn(x, *rest).relu(), x, use_reentrant=False)

        [inner, outer] = testing.run_pass(fn, *arguments()().values())
        assert "conv_bn_eval(" in inner.after
        assert outer.before == outer.after
        compile(inner.after, "<graph>", "exec")


class RecordMetadata(fx.Interpreter):
    """Records fake values at the nodes, as Dynamo does, of a graph that calls modules."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.fake_mode = FakeTensorMode()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            n.meta["example_value"] = self.fake_mode.from_tensor(value)
        return value


class ConvBN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.eval()

    @property
    def conv(self) -> nn.Conv2d:
        return self.features[0]

    @property
    def bn(self) -> nn.BatchNorm2d:
        return self.features[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


class StandardizedConv(nn.Conv2d):
    """Weight standardisation: the weight that is used is not ``weight``."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class DoubledBatchNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class LeafTracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (nn.Conv2d, nn.BatchNorm2d)) or super().is_leaf_module(
            m, module_qualified_name
        )


def module_graph(model: nn.Module, x: Tensor | None = None) -> fx.GraphModule:
    gm = fx.GraphModule(model, LeafTracer().trace(model))
    if x is not None:
        RecordMetadata(gm).run(x)
    return gm


class TestCallModule:
    """8. Graphs that call modules, as ``torch.fx.symbolic_trace`` makes them."""

    def example(self) -> Tensor:
        return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))

    def decide(self, model: nn.Module, *codes: Code) -> testing.PassResult:
        """Decide about a model, and see that the graph computes what it did."""
        x = self.example()
        parameters = dict(model.named_parameters())
        expected = testing.outputs_and_gradients(model, parameters, (x,))
        gm = module_graph(model, x)
        result = testing.run_on_graph(gm)
        assert result.codes == list(codes)
        assert (result.before != result.after) == (Code.FUSED in codes)
        actual = testing.outputs_and_gradients(gm, parameters, (x,))
        torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=0)
        torch.testing.assert_close(actual[1], expected[1], rtol=1e-4, atol=1e-5)
        return result

    def test_dotted_targets(self):
        result = self.decide(ConvBN(), Code.FUSED)
        assert "self.features.1.running_mean" not in result.after  # a valid name was made of it
        [record] = result.records.records
        assert (record.layer, record.batch_norm) == ("features.0", "features.1")

    def test_no_metadata(self):
        gm = module_graph(ConvBN())
        result = testing.run_on_graph(gm)
        assert result.codes == [Code.NO_METADATA]
        assert result.before == result.after

    def test_subclass_of_layer(self):
        model = ConvBN()
        model.features[0] = StandardizedConv(3, 4, 3)
        self.decide(model, Code.MODULE_NOT_PLAIN)

    def test_subclass_of_batch_norm(self):
        model = ConvBN()
        model.features[1] = DoubledBatchNorm(4).eval()
        self.decide(model, Code.MODULE_NOT_PLAIN)

    def test_quantisation_aware_layer(self):
        from torch.ao.nn.qat import Conv2d as QatConv2d
        from torch.ao.quantization import get_default_qat_qconfig

        model = ConvBN()
        model.features[0] = QatConv2d(3, 4, 3, qconfig=get_default_qat_qconfig("x86"))
        gm = module_graph(model, self.example())
        assert testing.run_on_graph(gm).codes == [Code.MODULE_NOT_PLAIN]

    @pytest.mark.parametrize("name", ["conv", "bn"])
    @pytest.mark.parametrize(
        "hook",
        [
            lambda m: m.register_forward_hook(lambda m, args, out: out * 2),
            lambda m: m.register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
            lambda m: m.register_full_backward_hook(lambda m, grads, outs: None),
            lambda m: setattr(m, "forward", lambda x, f=m.forward: f(x) * 2),
        ],
        ids=["forward", "pre", "backward", "forward_replaced"],
    )
    def test_hooks(self, name, hook):
        model = ConvBN()
        model.features[2] = nn.ReLU()
        hook(getattr(model, name))
        self.decide(model, Code.MODULE_NOT_PLAIN)

    def test_method_replaced(self):
        """What ``forward`` calls is the module's behaviour too."""
        model = ConvBN()
        original = model.conv._conv_forward
        model.conv._conv_forward = lambda x, w, b: original(x, w * 2, b)
        self.decide(model, Code.MODULE_NOT_PLAIN)

    def test_parametrization(self):
        model = ConvBN()
        nn.utils.parametrizations.weight_norm(model.conv)
        self.decide(model, Code.MODULE_NOT_PLAIN)

    @pytest.mark.filterwarnings("ignore::FutureWarning")
    def test_weight_norm_by_hook(self):
        model = ConvBN()
        nn.utils.weight_norm(model.conv)
        self.decide(model, Code.MODULE_NOT_PLAIN)

    def test_padding_mode(self):
        model = ConvBN()
        model.features[0] = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
        self.decide(model, Code.MODULE_NOT_PLAIN)

    def test_without_statistics(self):
        model = ConvBN()
        model.features[1] = nn.BatchNorm2d(4, track_running_stats=False).eval()
        self.decide(model, Code.BATCH_STATISTICS)

    def test_training_mode(self):
        model = ConvBN()
        model.bn.train()
        gm = module_graph(model, self.example())
        assert testing.run_on_graph(gm).codes == [Code.BATCH_STATISTICS]

    def test_sync_batch_norm(self):
        model = ConvBN()
        model.features[1] = nn.SyncBatchNorm(4).eval()
        self.decide(model, Code.FUSED)

    def test_output_size(self):
        """A transposed convolution that is told its output's size."""

        class Model(ConvBN):
            def __init__(self):
                super().__init__()
                self.features[0] = nn.ConvTranspose2d(3, 4, 3, stride=2)

            def forward(self, x):
                return self.bn(self.conv(x, (14, 14)))

        self.decide(Model(), Code.UNBOUND_ARGUMENTS)

    @pytest.mark.parametrize("where", ["between", "after"])
    def test_bias_written(self, where):
        """The module's tensor is real, the written node's is fake: they do not look alike."""

        class Model(ConvBN):
            def forward(self, x):
                c = self.conv(x)
                if where == "between":
                    self.conv.bias.data.mul_(2)
                y = self.bn(c)
                if where == "after":
                    self.conv.bias.data.mul_(2)
                return y

        codes = {"between": Code.INPUT_MUTATED, "after": Code.MUTATED_LATER}
        gm = module_graph(Model(), self.example())
        result = testing.run_on_graph(gm)
        assert result.codes == [codes[where]]
        assert result.before == result.after

    @pytest.mark.parametrize("inner", ["plain", "inplace", "norm", "embedding", "custom"])
    def test_module_in_between(self, inner):
        """A module that may write to what it is given, or change a mode."""

        class Custom(nn.Module):
            def forward(self, x):
                return x.mul_(2)

        modules = {
            "plain": nn.Sequential(nn.Sigmoid(), nn.Tanh()),
            "inplace": nn.Sequential(nn.Sigmoid(), nn.ReLU(inplace=True)),
            "norm": nn.InstanceNorm2d(3, track_running_stats=True),
            "embedding": nn.Embedding(3, 3, max_norm=1.0),
            "custom": nn.Sequential(Custom()),
        }

        class Leaf(fx.Tracer):
            def is_leaf_module(self, m, module_qualified_name):
                return module_qualified_name == "between" or super().is_leaf_module(
                    m, module_qualified_name
                )

        class Model(ConvBN):
            def __init__(self):
                super().__init__()
                self.between = modules[inner]

            def forward(self, x):
                c = self.conv(x)
                u = self.between(x.long().clamp(0, 2) if inner == "embedding" else x)
                return self.bn(c), u

        model = Model()
        gm = fx.GraphModule(model, Leaf().trace(model))
        RecordMetadata(gm).run(self.example())
        code = {"plain": Code.FUSED, "inplace": Code.INPUT_MUTATED}.get(inner, Code.REGION)
        assert testing.run_on_graph(gm).codes == [code]

    @pytest.mark.parametrize("inline", [True, False])
    def test_under_dynamo(self, inline):
        """Without inlining, torch 2.11 gives graphs that call modules."""

        class Model(ConvBN):
            def __init__(self, write):
                super().__init__()
                self.write = write
                self.conv.bias.requires_grad_(False)

            def forward(self, x):
                c = self.conv(x)
                if self.write:
                    self.conv.bias.data.mul_(2)
                return self.bn(c)

        x = self.example()
        with torch._dynamo.config.patch(inline_inbuilt_nn_modules=inline):
            for write, code in ((False, Code.FUSED), (True, Code.INPUT_MUTATED)):
                runs = []
                for backend in (PassRecorder(), None):
                    torch._dynamo.reset()
                    torch.manual_seed(0)
                    model = Model(write)
                    compiled = model if backend is None else torch.compile(model, backend=backend)
                    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
                    runs.append(testing.outputs_and_gradients(compiled, parameters, (x,)))
                    assert backend is None or backend.codes == [code]
                torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-4)


class TestMetadata:
    """9. What tracing recorded is carried to the new node."""

    def test_carried(self):
        seen = []

        def backend(gm, example_inputs):
            [old] = [n.meta for n in gm.graph.nodes if n.target is F.batch_norm]
            assert testing.run_on_graph(gm).codes == [Code.FUSED]
            [new] = [n.meta for n in gm.graph.nodes if "conv_bn_eval" in n.name]
            seen.append((old, new))
            return gm.forward

        torch.compile(ConvBN(), backend=backend)(torch.randn(2, 3, 6, 6))
        [(old, new)] = seen
        for key in ("example_value", "stack_trace", "nn_module_stack"):
            assert new[key] is old[key]

    def test_custom(self):
        def fn(*args):
            with torch.fx.traceback.annotate({"stage": 0}):
                return conv_bn(*args)

        nodes = []

        def backend(gm, example_inputs):
            testing.run_on_graph(gm)
            nodes.extend(n for n in gm.graph.nodes if "conv_bn_eval" in n.name)
            return gm.forward

        torch.compile(fn, backend=backend)(*arguments()().values())
        assert [n.meta["custom"]["stage"] for n in nodes] == [0]


class TestViewsAndSharing:
    """11. Views and no-ops in between, shape-only uses, shared layers and batch norms."""

    ROWS = (
        lambda c: c.flatten(0, 1),
        lambda c: c.view(-1, 4),
        lambda c: c.reshape(10, 4),
        lambda c: torch.flatten(c, end_dim=1),
        lambda c: F.dropout(c, 0.5, training=False).flatten(0, 1).contiguous(),
    )

    @pytest.mark.parametrize("i", range(len(ROWS)))
    def test_rows_of_a_linear(self, i):
        def fn(x, w, b, *rest):
            c = F.linear(x, w, b)
            return bn(self.ROWS[i](c), *rest).reshape_as(c)

        check(fn, arguments(grad=("x",), x=(2, 5, 3), w=(4, 3)), Code.FUSED)

    NO_OPS = (
        lambda c: F.dropout(c, 0.5, False),
        nn.Dropout2d(0.3).eval(),
        lambda c: c.contiguous(),
        lambda c: c.to(torch.float32),
        lambda c: c.float(),
        nn.Identity(),
    )

    @pytest.mark.parametrize("i", range(len(NO_OPS)))
    def test_no_ops(self, i):
        check(
            lambda x, w, b, *rest: bn(self.NO_OPS[i](F.conv2d(x, w, b)), *rest),
            arguments(),
            Code.FUSED,
        )

    NOT_NO_OPS = (
        lambda c: c.contiguous(memory_format=torch.channels_last),
        lambda c: c.to(torch.float64).float(),
        lambda c: c.to(torch.float32, copy=True),
        lambda c: c.detach(),
        lambda c: c.transpose(2, 3),
        lambda c: c.relu(),
    )

    @pytest.mark.parametrize("i", range(len(NOT_NO_OPS)))
    def test_not_no_ops(self, i):
        check(
            lambda x, w, b, *rest: bn(self.NOT_NO_OPS[i](F.conv2d(x, w, b)), *rest),
            arguments(),
            Code.NOT_AFTER_LAYER,
        )

    SHAPES = (
        lambda c: c.shape[0],
        lambda c: c.size(1) + c.dim() + c.numel(),
        lambda c: c.stride()[0],
    )

    @pytest.mark.parametrize("i", range(len(SHAPES)))
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_shape_of_layer_output(self, i, dynamic):
        def fn(x, w, b, *rest):
            c = F.conv2d(x, w, b)
            return bn(c, *rest) * self.SHAPES[i](c)

        check(fn, arguments(), Code.FUSED, dynamic=dynamic)

    USES = (
        lambda c, y: (y, c),
        lambda c, y: y + c,
        lambda c, y: y * c.detach(),
        lambda c, y: y.add_(c),
        lambda c, y: (y, c.view(-1)),
    )

    @pytest.mark.parametrize("i", range(len(USES)))
    def test_layer_output_used(self, i):
        def fn(x, w, b, *rest):
            c = F.conv2d(x, w, b)
            return self.USES[i](c, bn(c, *rest))

        check(fn, arguments(), Code.LAYER_OUTPUT_USED)

    def test_layer_output_is_its_own_statistics(self):
        """[N, 4] with N = 4: the layer's output as weight of the batch norm as well."""

        def fn(x, w, b, g, beta, m, v):
            c = F.linear(x, w)
            return F.batch_norm(c, m, v, c.view(-1), beta)

        check(fn, arguments(x=(1, 3), w=(4, 3)), Code.LAYER_OUTPUT_USED)

    def test_one_layer_two_batch_norms(self):
        def fn(x, w, b, g, beta, m, v):
            c = F.conv2d(x, w, b)
            return bn(c, g, beta, m, v) + bn(c, beta, g, m, v)

        check(fn, arguments(), Code.LAYER_OUTPUT_USED, Code.LAYER_OUTPUT_USED)

    def test_one_batch_norm_on_two_layers(self):
        def fn(x, w, b, *rest):
            return bn(F.conv2d(x, w, b), *rest) + bn(F.conv2d(x, w * 2), *rest)

        check(fn, arguments(grad=("x",)), Code.FUSED, Code.FUSED)

    def test_layer_called_twice(self):
        check(
            lambda x, *rest: conv_bn(conv_bn(x, *rest).relu(), *rest),
            carried(grad=("x",)),
            Code.FUSED,
            Code.FUSED,
        )

    def test_tied_parameters(self):
        """gamma is beta, and the bias, and a slice of the weight."""

        def fn(x, w, b, g, beta, m, v):
            return conv_bn(x, w, b, b, b, m, v) + conv_bn(x, w, None, w[:, 0, 0, 0], g, m, v)

        check(fn, arguments(grad=("x",)), Code.FUSED, Code.FUSED)

    def test_weight_is_input(self):
        check(
            lambda x, w, b, *rest: bn(F.conv2d(w, w, b), *rest),
            arguments(w=(4, 4, 1, 1)),
            Code.FUSED,
        )

    def test_interleaved(self):
        def fn(x, w, b, g, beta, m, v):
            c1 = F.conv2d(x, w, b)
            c2 = F.conv2d(x * 2, w, b)
            y1 = F.relu(bn(c1, g, beta, m, v), inplace=True)
            return bn(c2, g, beta, m, v) + y1

        check(fn, arguments(grad=("x",)), Code.FUSED, Code.FUSED)

    def test_two_batch_norms_in_a_row(self):
        check(
            lambda x, w, b, *rest: bn(bn(F.conv2d(x, w, b), *rest), *rest),
            arguments(),
            Code.FUSED,
            Code.NOT_AFTER_LAYER,
        )

    def test_gradient_in_the_graph(self):
        """With gradients as outputs; a graph of its own, or a break where Dynamo cannot."""

        def fn(x, w, b, g, *rest):
            y = conv_bn(x, w, b, g, *rest)
            return torch.autograd.grad(y.sin().sum(), [x, w, b, g])

        make = arguments(grad=("x",))
        recorder = PassRecorder(compile_unfused=True)
        fused = run(torch.compile(fn, backend=recorder), make())
        eager = run(fn, make())
        assert fused.error is None
        assert recorder.fused == 1
        torch.testing.assert_close(fused.outputs, eager.outputs, rtol=1e-4, atol=1e-4)


class TestShapes:
    """12. Empty batches, batches of one, dynamic and unbacked sizes, channels_last, complex."""

    @pytest.mark.parametrize("batch", [0, 1])
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_batch(self, batch, dynamic):
        check(conv_bn, arguments(grad=("x",), x=(batch, 3, 6, 6)), Code.FUSED, dynamic=dynamic)

    def test_empty_rows(self):
        check(
            lambda x, w, b, *rest: bn(F.linear(x, w, b).flatten(0, 1), *rest),
            arguments(grad=("x",), x=(0, 5, 3), w=(4, 3)),
            Code.FUSED,
        )

    def test_sizes_that_change(self):
        """One compilation for all."""
        recorder = PassRecorder()
        compiled = torch.compile(conv_bn, backend=recorder, dynamic=True)
        for shape in ((2, 3, 6, 5), (3, 3, 9, 7), (5, 3, 8, 8)):
            make = arguments(grad=("x",), x=shape)
            expected, actual = run(conv_bn, make()), run(compiled, make())
            torch.testing.assert_close(actual.outputs, expected.outputs)
            torch.testing.assert_close(actual.gradients, expected.gradients, rtol=1e-4, atol=1e-4)
        assert recorder.codes == [Code.FUSED]

    def test_unbacked_sizes(self):
        """A size that depends on data has no number to count bytes with."""

        def fn(x, w, b, *rest):
            x = x[x.sum((1, 2)) > 0]
            torch._check(x.size(0) >= 2)
            return bn(F.linear(x, w, b).flatten(0, 1), *rest)

        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            for objective in ("memory", "speed"):
                with options(objective=objective):
                    check(fn, arguments(x=(16, 5, 3), w=(4, 3)), Code.FUSED)

    def test_stride_that_is_computed(self):
        def fn(x, w, b, *rest):
            return bn(F.conv2d(x, w, b, stride=x.shape[0]), *rest)

        recorder = assert_same_as_unfused(fn, arguments(), dynamic=True)
        assert recorder.codes in ([Code.NON_CONSTANT], [Code.FUSED])  # FUSED where specialised

    @pytest.mark.parametrize("weight_too", [False, True])
    def test_channels_last(self, weight_too):
        def last(made, name, shape):
            value = torch.randn(shape, generator=torch.Generator().manual_seed(1))
            return value.to(memory_format=torch.channels_last).requires_grad_()

        changes: dict[str, Any] = {"x": lambda made: last(made, "x", (2, 4, 6, 6))}
        if weight_too:
            changes["w"] = lambda made: last(made, "w", (4, 4, 3, 3))
        check(conv_bn, arguments(**{"w": (4, 4, 3, 3), **changes}), Code.FUSED)

    def test_zero_variance_and_zero_gamma(self):
        check(
            conv_bn,
            arguments(
                v=lambda made: torch.zeros(4), g=lambda made: torch.zeros(4).requires_grad_()
            ),
            Code.FUSED,
        )

    def test_not_finite(self):
        """Not a number stays in its own output channel."""

        def weight(made):
            value = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(1))
            value[1] = float("nan")
            return value.requires_grad_()

        check(conv_bn, arguments(w=weight), Code.FUSED, exact=False)

    def test_meta_device(self):
        def fn(*args):
            return conv_bn(*args).sum()

        made = {
            n: t.detach().to("meta").requires_grad_(t.requires_grad)
            for n, t in arguments()().items()
        }
        compiled = torch.compile(fn, backend=(recorder := PassRecorder()))
        compiled(*made.values()).backward()
        assert recorder.codes == [Code.FUSED]
        assert made["g"].grad.shape == (4,)


class TestTensors:
    """Tensors that are not plain: subclasses, inference tensors."""

    @pytest.mark.parametrize("name", ["x", "w"])
    def test_subclass(self, name):
        def two(made):
            shape = SHAPES[name]
            pair = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
            return TwoTensor(*pair).requires_grad_(name == "w")

        recorder = PassRecorder()
        torch.compile(conv_bn, backend=recorder)(*arguments(**{name: two})().values())
        assert recorder.codes == [Code.UNSUPPORTED_TENSOR]

    def test_inference_tensor_as_input(self):
        """It cannot be saved for backward, fused or not."""

        def inference(made):
            with torch.inference_mode():
                return torch.randn(2, 3, 6, 6)

        check(conv_bn, arguments(x=inference), Code.FUSED)

    def test_torch_function_subclass(self):
        """Dynamo traces what the subclass does."""

        class Doubling(Tensor):
            @classmethod
            def __torch_function__(cls, func, types, args=(), kwargs=None):
                with torch._C.DisableTorchFunctionSubclass():
                    out = func(*args, **(kwargs or {}))
                return out * 2 if func is torch.conv2d else out

        make = arguments(x=lambda made: torch.ones(2, 3, 6, 6).as_subclass(Doubling))
        with torch._dynamo.config.patch(traceable_tensor_subclasses={Doubling}):
            torch.compile(conv_bn, backend=(recorder := PassRecorder()))(*make().values())
        assert recorder.codes == [Code.NOT_AFTER_LAYER]


@contextlib.contextmanager
def inductor(**config: Any):
    with testing.fresh_compile(), torch._inductor.config.patch(**config):
        yield


class TestInductor:
    """Through Inductor itself, with code generation; and 10., freezing."""

    @pytest.mark.parametrize("config", [{}, {"freezing": True}], ids=["plain", "freezing"])
    def test_training(self, config):
        """``freezing=True`` does not switch the gradient half off where gradients are wanted."""
        model = ConvBN()
        x = torch.randn(2, 3, 6, 6, requires_grad=True)
        parameters = dict(model.named_parameters())
        expected = testing.outputs_and_gradients(model, parameters, (x,))
        with inductor(**config):
            torch._dynamo.utils.counters.clear()
            actual = testing.outputs_and_gradients(torch.compile(model), parameters, (x,))
            assert torch._dynamo.utils.counters["inductor"]["efficient_conv_bn_eval"] == 1
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

    def test_write_in_between(self):
        def fn(x, w, b, *rest):
            c = F.conv2d(x, w, b)
            alias = x.data.view(torch.int32)
            alias &= 0
            return bn(c, *rest), x

        make = arguments()
        expected = fn(*make().values())
        with inductor():
            actual = torch.compile(fn)(*make().values())
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def _graph(build: Callable[[fx.Graph, dict[str, fx.Node]], fx.Node]) -> testing.PassResult:
    """Decide about a graph written by hand, for what tracing does not give."""
    graph = fx.Graph()
    nodes = {}
    for name, tensor in arguments()().items():
        nodes[name] = graph.placeholder(name)
        nodes[name].meta["example_value"] = tensor
    graph.output(build(graph, nodes))
    return testing.run_on_graph(fx.GraphModule(nn.Module(), graph))


def _hand_made_pair(
    out: Tensor | None = None, mean_grad: bool = False, **bn_arguments: Any
) -> testing.PassResult:
    def build(graph: fx.Graph, n: dict[str, fx.Node]) -> fx.Node:
        if mean_grad:
            n["m"].meta["example_value"].requires_grad_()
        c = graph.call_function(torch.conv2d, (n["x"], n["w"], n["b"]))
        c.meta["example_value"] = torch.zeros(2, 4, 4, 4, requires_grad=True)
        named = {"running_mean": n["m"], "running_var": n["v"], "weight": n["g"], **bn_arguments}
        y = graph.call_function(F.batch_norm, (c,), named)
        y.meta["example_value"] = c.meta["example_value"] if out is None else out
        return y

    return _graph(build)


def _layer_without_weight() -> testing.PassResult:
    def build(graph: fx.Graph, n: dict[str, fx.Node]) -> fx.Node:
        c = graph.call_function(torch.conv2d, (n["x"],))
        return graph.call_function(F.batch_norm, (c, n["m"], n["v"]))

    return _graph(build)


def _stride_that_is_computed() -> testing.PassResult:
    def build(graph: fx.Graph, n: dict[str, fx.Node]) -> fx.Node:
        stride = graph.call_function(operator.add, (1, 1))
        c = graph.call_function(torch.conv2d, (n["x"], n["w"]), {"stride": (stride, 1)})
        return graph.call_function(F.batch_norm, (c, n["m"], n["v"]))

    return _graph(build)


def _traced(fn: Callable[..., Any] = conv_bn, **kwargs: Any) -> testing.PassResult:
    [result] = testing.run_pass(fn, *arguments(**kwargs)().values())
    return result


def _denied() -> testing.PassResult:
    with options(deny=("*",)):
        return _traced()


def _speed() -> testing.PassResult:
    with options(objective="speed"):
        return _traced(x=(1, 3, 3, 3))


def _subclass() -> testing.PassResult:
    model = ConvBN()
    model.features[0] = StandardizedConv(3, 4, 3)
    return testing.run_on_graph(module_graph(model))


def _tensor_subclass() -> testing.PassResult:
    recorder = PassRecorder()
    make = arguments(x=lambda made: TwoTensor(torch.ones(2, 3, 6, 6), torch.ones(2, 3, 6, 6)))
    torch.compile(conv_bn, backend=recorder)(*make().values())
    return recorder.results[0]


def _unused(x, w, b, *rest):
    bn(F.conv2d(x, w, b), *rest)
    return x * 2


def _statistics_used(x, w, b, g, beta, m, v):
    return torch.native_batch_norm(F.conv2d(x, w, b), g, beta, m, v, False, 0.1, 1e-5)


def _region(x, w, b, *rest):
    with torch.no_grad():
        c = F.conv2d(x, w, b)
    return bn(c, *rest)


def _per_sample(x, *rest):
    return torch.vmap(lambda one: conv_bn(one[None], *rest)[0])(x)


CASES: dict[Code, Callable[[], testing.PassResult]] = {
    Code.FUSED: _traced,
    Code.UNBOUND_ARGUMENTS: _layer_without_weight,
    Code.NON_CONSTANT: _stride_that_is_computed,
    Code.MODULE_NOT_PLAIN: _subclass,
    Code.NO_METADATA: lambda: testing.run_on_graph(module_graph(ConvBN())),
    Code.NOT_AFTER_LAYER: lambda: _traced(lambda x, w, b, *rest: bn(w[None, :, 0, 0], *rest)),
    Code.BATCH_STATISTICS: lambda: _hand_made_pair(training=True),
    Code.NO_RUNNING_STATISTICS: lambda: _hand_made_pair(running_mean=None, running_var=None),
    Code.OUTPUT_UNUSED: lambda: _traced(_unused),
    Code.LAYER_OUTPUT_USED: lambda: _traced(lambda x, w, b, *r: bn(c := F.conv2d(x, w, b), *r) + c),
    Code.STATISTICS_USED: lambda: _traced(_statistics_used),
    Code.UNBATCHED: lambda: _traced(x=(3, 6, 6)),
    Code.UNSUPPORTED_TENSOR: _tensor_subclass,
    Code.UNSUPPORTED_DTYPE: lambda: _hand_made_pair(torch.zeros(2, 4, 4, 4, dtype=torch.float64)),
    Code.UNSUPPORTED_SHAPE: lambda: _traced(
        lambda x, w, b, *rest: bn(F.linear(x, w, b), *rest), x=(5, 3), w=(4, 3), b=(1,)
    ),
    Code.REGION: lambda: _traced(_region),
    Code.FUNCTORCH: lambda: _traced(_per_sample),
    Code.INPUT_MUTATED: lambda: _traced(written_function("x.mul_(2)", "between")),
    Code.MUTATED_LATER: lambda: _traced(written_function("x.mul_(2)", "after")),
    Code.STATISTICS_REQUIRE_GRAD: lambda: _hand_made_pair(mean_grad=True),
    Code.NO_GRAD: lambda: _traced(frozen=PARAMETERS),
    Code.AFFINE_FROZEN: lambda: _traced(frozen=("g",)),
    Code.LAYER_FROZEN: lambda: _traced(frozen=("w",)),
    Code.LARGE_WEIGHT: _speed,
    Code.DENIED: _denied,
}


class TestCodes:
    """Every code can be had, and only FUSED changes the graph."""

    @pytest.mark.parametrize("code", Code, ids=lambda code: code.name)
    def test_code(self, code):
        assert code in CASES, f"{code} has no test"
        result = CASES[code]()
        assert result.codes == [code]
        assert (result.before != result.after) == code.fused
        [record] = result.records.records
        assert record.detail or code.fused
