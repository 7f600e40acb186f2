"""How calls of convolutions are read, drawn at random."""

import hypothesis
import pytest
import torch
from common import fuzz
from hypothesis import strategies as st

from convbn_inductor_pass.eager.calls import LAYERS, LayerCall
from convbn_inductor_pass.functional import layer


@st.composite
def arguments(draw, spatial, transposed):
    """Of a call that may be wrong: sizes, lists of the wrong length, paddings by name."""

    def per_dimension(low, high):
        value = st.integers(low, high)
        lists = st.lists(value, min_size=spatial, max_size=spatial).map(tuple)
        return draw(value | lists | st.tuples(value) | st.tuples(*[value] * 4))

    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel = draw(st.lists(st.integers(1, 4), min_size=spatial, max_size=spatial))
    image = draw(st.lists(st.integers(1, 9), min_size=spatial, max_size=spatial))
    a, b = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    wide = groups * a + draw(st.sampled_from([0, 0, 0, 1]))
    shape = (groups * a, b, *kernel) if transposed else (groups * b, a, *kernel)
    options = {
        "stride": per_dimension(draw(st.sampled_from([0, 1, 1, 1])), 3),
        "padding": per_dimension(-1, 3),
        "dilation": per_dimension(1, 3),
        "groups": groups,
    }
    if transposed:
        options["output_padding"] = per_dimension(0, 2)
    elif draw(st.booleans()):
        options["padding"] = draw(st.sampled_from(["same", "valid", "full"]))
        options["stride"] = draw(st.sampled_from([1, 1, 2]))
    chosen = draw(st.sets(st.sampled_from(sorted(options))))
    x, weight = torch.randn(2, wide, *image), torch.randn(shape)
    return x, weight, {k: v for k, v in options.items() if k in chosen or k == "groups"}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("function", [f for f in LAYERS if LAYERS[f][1]], ids=lambda f: f.__name__)
def test_output_of_a_call_as_read(function):
    _, spatial, transposed = LAYERS[function]
    read, failed = [], []

    @fuzz(examples=60)
    @hypothesis.given(arguments(spatial, transposed))
    def check(drawn):
        x, weight, options = drawn
        call = LayerCall.read(function, (x, weight), options)
        try:
            expected = function(x, weight, **options)
        except (RuntimeError, TypeError, ValueError):
            failed.append(options)
            if call is not None:
                with pytest.raises((RuntimeError, TypeError, ValueError)):
                    layer(*call)
            return
        if call is not None:
            read.append(options)
            assert torch.equal(layer(*call), expected)

    check()
    assert read
    assert failed
