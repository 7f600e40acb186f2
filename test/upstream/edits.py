"""Describe a change to PyTorch without its lines, and apply it to a copy of an installed torch.

A :class:`Change` is new files, removed files, and :class:`Edit` s of files that are there. An edit
names the statement that it is about: by file, by function or class, and by a piece of the
statement's first line. A piece that fits none or several is an error, so that an edit never lands
in a wrong place of another version.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import shutil
import subprocess
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

__all__ = ["Change", "Edit", "EditError", "apply_edit", "copy_torch", "git_diff", "load_changes"]

CHANGES = Path(__file__).parent / "changes"


class EditError(ValueError):
    """An edit that does not fit the file: says which, and how many statements its piece fits."""


@dataclasses.dataclass(frozen=True)
class Edit:
    """One edit of a file.

    Attributes:
        file: path beside the package, such as ``"torch/_inductor/config.py"``.
        inside: ``"function"``, ``"Class"`` or ``"Class.method"``; "" for the module's level. In a
            file that is not Python: a piece of the one line before which nothing is looked at.
        at: a piece of the first line of exactly ``count`` statements there (for "swap": of lines).
        put: where ``text`` goes: before or after the statement, instead of it, or ("swap") in the
            place of the piece alone.
        text: what is put, dedented; indented as the statement is. "" removes, with comments above.
        count: how many statements ``at`` fits; each is edited.
    """

    file: str
    inside: str
    at: str
    put: Literal["before", "after", "instead", "swap"]
    text: str
    count: int = 1


@dataclasses.dataclass(frozen=True)
class Change:
    """One pull request: what to do to torch, and the tests that fail without it.

    ``new_files`` are paths beside the package, each with the file in the change's folder that it
    is; ``tests`` are files in that folder; ``needs`` names changes to be applied before.
    """

    name: str
    title: str
    new_files: dict[str, str]
    removed: tuple[str, ...]
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]
    needs: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return CHANGES / self.name

    @property
    def touched(self) -> list[str]:
        """Files that the change is about, sorted."""
        return sorted({*self.new_files, *self.removed, *(e.file for e in self.edits)})

    def apply(self, root: Path) -> None:
        """Apply to a copy of torch in ``root``.

        Raises:
            EditError: an edit does not fit.
        """
        for name, source in self.new_files.items():
            target = root / name
            target.unlink(missing_ok=True)
            shutil.copyfile(self.folder / source, target)
        for name in self.removed:
            (root / name).unlink()
        for edit in self.edits:
            path = root / edit.file
            text = apply_edit(path.read_text(), edit)
            path.unlink()  # it may be a link
            path.write_text(text)


def load_changes(names: Sequence[str] = ()) -> list[Change]:
    """The changes of those names (all: of no names), each after what it needs."""
    found = {p.parent.name for p in CHANGES.glob("*/change.py")}
    if unknown := set(names) - found:
        raise ValueError(f"no change {', '.join(unknown)}; there are: {', '.join(sorted(found))}")
    loaded: dict[str, Change] = {}

    def load(name: str) -> None:
        module = importlib.import_module(f"{__package__}.changes.{name}.change")
        if module.CHANGE.name != name:
            raise ValueError(f"the change in {name}/ says that it is {module.CHANGE.name!r}")
        for needed in module.CHANGE.needs:
            load(needed)
        loaded.setdefault(name, module.CHANGE)

    for name in names or sorted(found):
        load(name)
    return list(loaded.values())


def apply_edit(text: str, edit: Edit) -> str:
    """The text of a file after an edit.

    Raises:
        EditError: it does not fit.
    """
    lines = text.splitlines(keepends=True)
    read = _python_statements if edit.file.endswith(".py") else _other_statements
    spans = list(read(text, edit))
    if edit.put == "swap":
        within = sorted({i for first, last, _ in spans for i in range(first, last)})
        hits = [(i, i + 1) for i in within if edit.at in lines[i]]
    else:
        # Of statements with one first line, the outermost: it has whole lines.
        outermost: dict[int, int] = {}
        for first, last, heads in spans:
            if any(edit.at in lines[i] for i in heads):
                outermost[first] = max(last, outermost.get(first, 0))
        hits = sorted(outermost.items())
    if len(hits) != edit.count:
        raise EditError(
            f"{edit.file}: {edit.at!r} inside {edit.inside or 'the module'!r} fits {len(hits)} "
            f"statements, not {edit.count}"
        )
    for first, last in reversed(hits):
        old = lines[first:last]
        indent = re.match(r"\s*", old[0]).group()  # type: ignore[union-attr]
        # A text in triple quotes begins and ends with a line break that is not of it.
        new = textwrap.dedent(edit.text).removeprefix("\n").removesuffix("\n")
        put = [textwrap.indent(new, indent) + "\n"] if new else []
        if edit.put == "swap":
            line = old[0].replace(edit.at, edit.text, 1)
            put = [line] if line.strip() else []
        elif edit.put == "before":
            put += old
        elif edit.put == "after":
            put = old + put
        elif not put:
            # With the comment above it, and one of two blank lines around it.
            while first and lines[first - 1].startswith(f"{indent}#"):
                first -= 1
            last += not "".join(lines[max(first - 1, 0) : first] + lines[last : last + 1]).strip()
        lines[first:last] = put
    return "".join(lines)


Span = tuple[int, int, tuple[int, ...]]  # first line, line after the last, lines that may match


def _python_statements(text: str, edit: Edit) -> Iterator[Span]:
    scope: ast.AST = ast.parse(text)
    for name in filter(None, edit.inside.split(".")):
        inner = [n for n in _definitions(scope) if n.name == name]  # type: ignore[attr-defined]
        if len(inner) != 1:
            raise EditError(f"{edit.file}: {len(inner)} definitions of {edit.inside!r}, not one")
        scope = inner[0]
    deep = isinstance(scope, (ast.FunctionDef, ast.AsyncFunctionDef))
    for node in _statements(scope, deep):
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))]) - 1
        yield first, node.end_lineno or node.lineno, (first, node.lineno - 1)


def _definitions(scope: ast.AST) -> Iterator[ast.stmt]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return (n for n in _statements(scope, deep=False) if isinstance(n, kinds))


def _statements(scope: ast.AST, deep: bool) -> Iterator[ast.stmt]:
    """The statements of ``scope``, those in blocks too; those of definitions inside if ``deep``."""
    for child in ast.iter_child_nodes(scope):
        is_statement = isinstance(child, ast.stmt)
        if is_statement:
            yield child
        inner = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        holds_more = is_statement or isinstance(child, (ast.ExceptHandler, ast.match_case))
        if holds_more and (deep or not isinstance(child, inner)):
            yield from _statements(child, deep)


def _other_statements(text: str, edit: Edit) -> Iterator[Span]:
    """From each line on: until brackets are closed and a line ends with ; or } or begins with #."""
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if edit.inside in line]
    if edit.inside and len(starts) != 1:
        raise EditError(f"{edit.file}: {len(starts)} lines have {edit.inside!r}, not one")
    for first in range(starts[0] if edit.inside else 0, len(lines)):
        depth = 0
        for last in range(first, len(lines)):
            line = lines[last].split("//")[0].rstrip()
            depth += sum(map(line.count, "([{")) - sum(map(line.count, ")]}"))
            ends = line.endswith((";", "}")) or lines[first].lstrip().startswith("#")
            if (depth <= 0 and ends) or depth < 0:
                yield first, last + 1, (first,)
                break


def copy_torch(installed: Path, root: Path, changes: Sequence[Change]) -> None:
    """Lay a copy of the package ``installed`` out in ``root`` for ``changes`` to be applied to.

    Folders that no change touches are linked; so are single files, which an edit replaces.
    """
    touched = {Path(name) for change in changes for name in change.touched}
    folders = {Path("torch")} | {p for name in touched for p in name.parents if p != Path(".")}
    for folder in sorted(folders):
        (root / folder).mkdir(parents=True, exist_ok=True)
        source = installed.parent / folder
        for entry in source.iterdir() if source.is_dir() else ():
            # Compiled code of files that are edited must not go to the installed package.
            if entry.name != "__pycache__" and folder / entry.name not in folders:
                (root / folder / entry.name).symlink_to(entry)


def git_diff(installed: Path, root: Path, changes: Sequence[Change], *options: str) -> str:
    """``git diff`` of the installed torch and the copy in ``root``, of what ``changes`` touch."""
    names = sorted({name for change in changes for name in change.touched})
    sides = {"a": installed.parent, "b": root}
    scratch = root / ".diff"
    shutil.rmtree(scratch, ignore_errors=True)
    for side, base in sides.items():
        for name in names:
            if (base / name).is_file():
                (scratch / side / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(base / name, scratch / side / name)
        (scratch / side).mkdir(parents=True, exist_ok=True)
    command = ["git", "diff", "--no-index", "--no-renames", *options, "--no-prefix", "a", "b"]
    return subprocess.run(command, cwd=scratch, capture_output=True, text=True).stdout
