"""The project's pages, and what stands in them."""

import re
from collections.abc import Iterator
from pathlib import Path

TOP = Path(__file__).parent.parent.parent
FOLDERS = ("docs", "deploy", "bench", "proto", "tests/vectors")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def pages() -> list[Path]:
    """Every page, those of the top folder first."""
    return [
        *sorted(TOP.glob("*.md")),
        *(p for f in FOLDERS for p in sorted((TOP / f).rglob("*.md"))),
    ]


def blocks(page: Path, language: str) -> Iterator[str]:
    """The fenced blocks of a language."""
    for name, text in FENCE.findall(page.read_text()):
        if name == language:
            yield text


def commands(page: Path) -> list[str]:
    """What a page's sessions type behind the prompt."""
    return [
        line.removeprefix("$ ")
        for text in blocks(page, "console")
        for line in text.splitlines()
        if line.startswith("$ ")
    ]


def anchors(page: Path) -> set[str]:
    """Where a link can point to within a page."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
