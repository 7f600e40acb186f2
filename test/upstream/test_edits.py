"""Edits by anchor: where they land, and what they refuse."""

import textwrap

import pytest

from test.upstream.edits import Edit, EditError, apply_edit

PYTHON = textwrap.dedent(
    '''\
    """doc"""
    from a import (
        x,
        y,
    )

    flag = 1
    if flag:
        other = 2


    class C:
        """c"""
        flag = True

        @decorated
        def method(self, a):
            # why
            if a: return 1
            return call(
                a,
                b,
            )


    def function():
        def inner():
            return 3
        return inner
    '''
)
HEADER = textwrap.dedent(
    """\
    #pragma once
    struct V {
      int a;
      void f() {
        for (int i = 0; i < 8; i++) {
          x[i] = 1;
        }
      }
    };
    """
)


def edited(inside, at, put, text, count=1, source=PYTHON, file="torch/a.py"):
    return apply_edit(source, Edit(file, inside, at, put, text, count))


def changed_lines(new, old=PYTHON):
    return [line for line in new.splitlines() if line not in old.splitlines()]


def test_after_a_statement_of_several_lines():
    new = edited("", "from a import", "after", "import z")
    assert "    y,\n)\nimport z\n" in new


def test_before_keeps_the_indentation():
    new = edited(
        "C",
        "flag = ",
        "before",
        """
        if other:
            more = 1
        """,
    )
    assert changed_lines(new) == ["    if other:", "        more = 1"]
    assert "        more = 1\n    flag = True" in new


def test_instead_of_a_call_of_several_lines():
    new = edited("C.method", "return call", "instead", "return 3")
    assert "return 1\n        return 3\n" in new
    assert "call" not in new


def test_removal_takes_the_comment_above():
    new = edited("C.method", "if a", "instead", "")
    assert "# why" not in new
    assert "def method(self, a):\n        return call(" in new


def test_a_decorated_function_is_one_statement():
    new = edited("C", "def method", "instead", "")
    assert "decorated" not in new
    assert "method" not in new


def test_swap_in_any_line_of_the_scope():
    assert "        y, z,\n" not in PYTHON
    new = edited("", "    y,", "swap", "    y, z,")
    assert changed_lines(new) == ["    y, z,"]


def test_a_function_inside_counts_as_its_function():
    assert changed_lines(edited("function", "return 3", "instead", "return 4")) == [
        "        return 4"
    ]


def test_several_at_once():
    new = edited("C.method", "return", "before", "pass", count=2)
    assert new.count("pass") == 2


@pytest.mark.parametrize(
    ("inside", "at"),
    [
        ("", "nothing"),
        ("C.method", "return"),  # two
        ("C.method", "b,"),  # not in a first line
        ("C", "return call"),  # in a method
        ("D", "flag"),
        ("C.method.more", "flag"),
    ],
)
def test_an_edit_that_does_not_fit_says_so(inside, at):
    with pytest.raises(EditError, match=r"torch/a\.py"):
        edited(inside, at, "after", "pass")


def test_braces():
    options = {"source": HEADER, "file": "torch/a.h"}
    new = edited("void f", "for (int", "instead", "memset(x, 1, 8);", **options)
    assert "void f() {\n    memset(x, 1, 8);\n  }\n};" in new
    new = edited("", "#pragma", "after", "#include <a>", **options)
    assert new.startswith("#pragma once\n#include <a>\nstruct")
