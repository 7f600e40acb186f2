"""Options: what is allowed, and that what is not changes nothing."""

import pytest

import convbn_inductor_pass as cbn


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "fast"}, "objective must be one of 'memory', 'speed', got 'fast'"),
        ({"deny": "backbone"}, "deny must be a sequence of module path patterns"),
        ({"deny": [1]}, "deny must be a sequence of module path patterns"),
        ({"allow": None}, "allow must be a sequence of module path patterns .* got None"),
        ({"fuse_frozen_layers": "no"}, "fuse_frozen_layers must be True or False, got 'no'"),
        ({"forward": None}, "forward must be one of 'exact', 'fold', 'auto', got None"),
        ({"denied": ()}, "unknown option denied; known: objective, "),
    ],
)
def test_wrong_ones_change_nothing(changes, message):
    before = cbn.get_options()
    with pytest.raises(ValueError, match=message):
        cbn.set_options(**changes)
    assert cbn.get_options() is before


def test_context_restores():
    before = cbn.get_options()
    with cbn.options(objective="speed", allow=["a.*"]) as inside:
        assert cbn.get_options() is inside
        assert inside.allow == ("a.*",)
    assert cbn.get_options() is before


@pytest.mark.parametrize(
    ("allow", "deny", "paths", "expected"),
    [
        ((), (), ("a.conv", "a.bn"), True),
        (("a.*",), (), ("a.conv", "b.bn"), True),
        (("c.*",), (), ("a.conv", "b.bn"), False),
        (("a.*",), ("*.bn",), ("a.conv", "a.bn"), False),
    ],
)
def test_allow_and_deny(allow, deny, paths, expected):
    assert cbn.Options(allow=allow, deny=deny).allows(*paths) == expected
