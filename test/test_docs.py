"""The Markdown pages: what they link to is there, down to the heading."""

from __future__ import annotations

import itertools
import pathlib
import re

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [
    *(path for path in ROOT.glob("*.md")),
    *(path for folder in ("docs", "bench", "test") for path in (ROOT / folder).rglob("*.md")),
]


def blocks(page: pathlib.Path) -> list[Token]:
    return MarkdownIt().enable("table").parse(page.read_text("utf-8"))


def anchors(page: pathlib.Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    tokens = blocks(page)
    headings = (b for a, b in itertools.pairwise(tokens) if a.type == "heading_open")
    texts = ("".join(part.content for part in title.children or ()) for title in headings)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    for token in (part for block in blocks(page) for part in block.children or ()):
        link = str(token.attrGet("href") or token.attrGet("src") or "")
        if not link or link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 180
