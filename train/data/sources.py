"""Where text comes from: a folder, a file, or the standard library of the Python that runs this."""

import json
import os
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

SUFFIXES = (".txt", ".md", ".py", ".jsonl")
"""Files that are read: a .jsonl gives one document a line, its "text" field; the others are one each."""

STDLIB = "stdlib"
"""The source that every machine has: the installed Python's own modules."""

_STDLIB_SKIPPED = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data",
}  # fmt: skip
"""Folders that are not the library itself, or are tables rather than text."""

PIECE_CHARS = 1 << 16
"""Longer documents are tokenised, and held out, in pieces of at most this many characters."""


class Piece(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    ends_document: bool


def find_files(path: str) -> list[Path]:
    """The text files of a source, in an order that does not depend on the machine.

    Args:
        path: a folder (searched recursively, hidden files and folders left out), a file, or "stdlib".

    Returns:
        Files with one of `SUFFIXES`, sorted by their path below `path`.

    Raises:
        OSError: nothing lies at `path`.
        ValueError: no file there has a known suffix, or all of them are empty.
    """
    known = ", ".join(SUFFIXES)
    suffixes: tuple[str, ...] = SUFFIXES
    if path == STDLIB:
        root, skipped, suffixes = Path(sysconfig.get_path("stdlib")), _STDLIB_SKIPPED, (".py",)
    else:
        root, skipped = Path(path).expanduser(), set()
    if root.is_file():
        if root.suffix not in SUFFIXES:
            raise ValueError(
                f"data.path = {path!r}: a {root.suffix or 'nameless'} file is not read, only {known}"
            )
        files = [root]
    elif root.is_dir():
        files = sorted(_walk(root, skipped, suffixes), key=lambda file: file.relative_to(root).as_posix())
    else:
        raise FileNotFoundError(f"data.path = {path!r}: no such file or folder")
    files = [file for file in files if file.stat().st_size > 0]
    if not files:
        raise ValueError(f"data.path = {path!r}: no {known} file with text in it")
    return files


def _walk(root: Path, skipped: set[str], suffixes: tuple[str, ...]) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        for name in names:
            if name.endswith(suffixes) and not name.startswith("."):
                yield Path(folder, name)


def iter_documents(files: Iterable[Path]) -> Iterator[str]:
    """The documents of some files, in order; those that hold only white space are left out.

    Raises:
        ValueError: a file that is not UTF-8, or a line of a .jsonl file that is no JSON object with a "text";
            the file and, for .jsonl, the line are named.
    """
    for file in files:
        try:
            documents = _read_jsonl(file) if file.suffix == ".jsonl" else (_read_text(file),)
            yield from (text for text in documents if text and not text.isspace())
        except (UnicodeError, SyntaxError) as error:
            raise ValueError(f"{file}: not UTF-8 text ({error}): convert the file or move it away") from None


def _read_text(file: Path) -> str:
    if file.suffix == ".py":
        with tokenize.open(file) as text:  # heeds the file's own `# -*- coding` line
            return text.read()
    return file.read_text(encoding="utf-8-sig")


def _read_jsonl(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.isspace():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}:{number}: not JSON: {error.msg} (column {error.colno})") from None
            text = record.get("text") if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise ValueError(f'{file}:{number}: each line must be an object with a "text" string')
            try:
                text.encode()
            except UnicodeEncodeError:
                raise ValueError(f"{file}:{number}: half a surrogate pair in the text") from None
            yield text


def iter_pieces(documents: Iterable[str], max_bytes: int | None = None) -> Iterator[Piece]:
    """Cuts long documents at line ends, so that one huge file is still split between cores and held-out sets.

    Args:
        documents: texts.
        max_bytes: stop before the pieces hold more UTF-8 bytes than this; None reads everything.
    """
    room = float("inf") if max_bytes is None else max_bytes
    for text in documents:
        start = 0
        while start < len(text):
            end = start + PIECE_CHARS
            if end < len(text):
                end = text.rfind("\n", start, end) + 1 or end
            piece = text[start:end]
            room -= len(piece.encode())
            if room < 0:
                return
            yield Piece(piece, end >= len(text))
            start = end
