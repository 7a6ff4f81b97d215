"""The code blocks of a page, and what its author said of them.

A fence names its language. python, bash, gin and json are executed; text, console and the like are not. A block that
cannot run here has a line before it that says why, which a reader of the page does not see:

    <!-- not run: needs a TPU pod -->
"""

import re
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
EXECUTED = {"python", "bash", "gin", "json"}
READ = {"", "text", "console", "diff"}
_COMMAND = re.compile(r"^\s*(\$ )?([A-Z_]+=\S+ )*(python3? |pip |make |curl )", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fence of a page.

    Attributes:
        page: the page's path from the repository's root.
        line: of the first line of code.
        language: of its code.
        text: its code.
        not_run: why it cannot run here; None where it can.
    """

    page: str
    line: int
    language: str
    text: str
    not_run: str | None = None

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """All pages with code, as paths from the repository's root."""
    found = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "benchmarks/RESULTS.md",
        *(ROOT / "docs").rglob("*.md"),
    ]
    return sorted(page.relative_to(ROOT).as_posix() for page in found)


def read_blocks(page: str, text: str | None = None) -> list[Block]:
    """The blocks that are to be executed or checked, in order.

    Args:
        page: path from the repository's root.
        text: of the page; None reads it.

    Raises:
        ValueError: a language that nobody executes, commands without a language, or a mark without a reason or a
            block after it.
    """
    text = (ROOT / page).read_text(encoding="utf-8") if text is None else text
    found: list[Block] = []
    mark: str | None = None
    for token in MarkdownIt("commonmark").parse(text):
        line = token.map[0] + 1 if token.map else 0
        if token.type == "html_block" and "not run" in token.content:
            match = re.fullmatch(r"<!-- not run: (\S.*?) -->", token.content.strip())
            if match is None:
                raise ValueError(f"{page}:{line}: write it as <!-- not run: REASON -->, on a line of its own")
            mark = match[1]
        elif token.type == "fence":
            language = token.info.partition(" ")[0]
            if language not in EXECUTED | READ:
                raise ValueError(
                    f"{page}:{line}: {language!r} is none of {', '.join(sorted(EXECUTED | READ))}"
                )
            if not language and _COMMAND.search(token.content):
                raise ValueError(
                    f"{page}:{line}: commands without a language: bash runs them, text shows them"
                )
            if language in EXECUTED:
                found.append(Block(page, line + 1, language, token.content, mark))
            mark = None
        elif mark is not None and token.type.endswith("_open") and token.level == 0:
            raise ValueError(
                f"{page}:{line}: <!-- not run: {mark} --> has to stand directly before a block of code"
            )
    return found
