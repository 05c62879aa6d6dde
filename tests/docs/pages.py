"""The pages of the documentation, taken apart: their fenced blocks, their links and their headings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
README: Final = ROOT / "README.md"
INDEX: Final = ROOT / "docs" / "index.md"
PAGES: Final = [README, *sorted((ROOT / "docs").rglob("*.md"))]
CARDS: Final = sorted((ROOT / "models").glob("*/README.md"))
LANGUAGES: Final = {"sh", "python", "javascript", "json", "text", "toml", "promql", "nginx"}
RUNNABLE: Final = {"sh", "python"}
ELLIPSIS: Final = "…"

_FENCE: Final = re.compile(r"(?:^<!-- (.*?) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK: Final = re.compile(r"\]\(([^)\s]+)\)")
_HEADING: Final = re.compile(r"^#+ (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: the file.
        line: where the block starts, from 1.
        comment: the HTML comment in the line before the block, or an empty string.
        language: the word behind the fence.
        source: the lines between the fences.
        output: the block of `json` or `text` that follows at once; None if there is none.
    """

    page: Path
    line: int
    comment: str
    language: str
    source: str
    output: Block | None = None

    @property
    def reason_not_run(self) -> str | None:
        """Why the block cannot run in CI; None if it runs."""
        return self.comment.removeprefix("not run: ") if self.comment.startswith("not run: ") else None

    @property
    def serves(self) -> bool:
        """Whether the block starts a server for the blocks below it."""
        return self.comment == "serves until it is stopped"

    def __str__(self) -> str:
        return f"{name(self.page)}:{self.line}"


def name(page: Path) -> str:
    """The path of a page in the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, from its beginning."""
    return _blocks_of(page, page.read_text(encoding="utf-8"))


@cache
def _blocks_of(page: Path, text: str) -> list[Block]:
    matches = list(_FENCE.finditer(text))
    found: list[Block] = []
    following: Block | None = None
    starts_at = len(text)
    for match in reversed(matches):
        comment, language, source = match.groups()
        adjacent = following is not None and not text[match.end() : starts_at].strip()
        answers = following is not None and following.language in ("json", "text") and not following.comment
        output = following if adjacent and answers and language in RUNNABLE else None
        line = text.count("\n", 0, match.start(2)) + 1
        following = Block(page, line, comment or "", language, source, output)
        starts_at = match.start()
        found.append(following)
    return found[::-1]


def links(page: Path) -> list[str]:
    """The targets of the links of a page that stay in the repository."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return [target for target in _LINK.findall(text) if "://" not in target]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    return _anchors_of(page.read_text(encoding="utf-8"))


@cache
def _anchors_of(page_text: str) -> set[str]:
    text = _FENCE.sub("", page_text)
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower()).replace(" ", "-")
        for heading in _HEADING.findall(text)
    }


def table(page: Path, first_column: str) -> list[list[str]]:
    """The rows of the table of a page whose first column has this heading."""
    lines = page.read_text(encoding="utf-8").partition(f"| {first_column} |")[2].splitlines()[2:]
    rows = lines[: next((n for n, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    assert rows, f"{name(page)} has no table with the first column {first_column}"
    return [[cell.strip() for cell in row.strip("|").split(" |")] for row in rows]
