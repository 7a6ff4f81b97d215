"""Where text comes from: folders and files of text, code, JSON lines or Parquet, or Python's own standard library."""

import contextlib
import dataclasses
import gzip
import io
import json
import os
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

TEXT = (".txt", ".md", ".rst", ".tex")
CODE = (
    ".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cs", ".css", ".go", ".hs", ".html", ".java", ".jl", ".js",
    ".kt", ".lua", ".ml", ".php", ".pl", ".r", ".rb", ".rs", ".scala", ".sh", ".sql", ".swift", ".ts", ".tsx",
)  # fmt: skip
JSONL, PARQUET = ".jsonl", ".parquet"
PACKED = (".gz", ".zst")
SUFFIXES = (*TEXT, *CODE, JSONL, PARQUET)
"""Files that are read, all but .parquet also with .gz or .zst behind: a .jsonl gives a document a line, a .parquet one
a row, the others are one each."""

KNOWN = ", ".join((*TEXT, JSONL, PARQUET)) + ", or code"
"""The same for messages."""

STDLIB = "stdlib"
"""The source that every machine has: the installed Python's own modules."""

_STDLIB_SKIPPED = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data",
}  # fmt: skip
"""Folders that are not the library itself, or are tables rather than text."""

PIECE_CHARS = 1 << 16
"""Longer documents are tokenised, kept and held out in pieces of at most this many characters."""

SHARD_BYTES = 64 << 20
"""About so much text makes one shard."""


class Part(NamedTuple):
    """A file, or a stretch of one that is large.

    Attributes:
        file: its path.
        start, stop: of a .jsonl the bytes in which its lines begin, of a .parquet its row groups; None is the end.
    """

    file: Path
    start: int = 0
    stop: int | None = None


class Piece(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    ends_document: bool


@dataclasses.dataclass
class Tally:
    """What reading has counted so far: documents with text, those without (which are left out), bytes of UTF-8."""

    documents: int = 0
    empty: int = 0
    bytes: int = 0


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
    suffixes: tuple[str, ...] = SUFFIXES
    if path == STDLIB:
        root, skipped, suffixes = Path(sysconfig.get_path("stdlib")), _STDLIB_SKIPPED, (".py",)
    else:
        root, skipped = Path(path).expanduser(), set()
    if root.is_file():
        if _kind(root.name) not in SUFFIXES:
            raise ValueError(
                f"data.path = {path!r}: a {root.suffix or 'nameless'} file is not read, only {KNOWN}"
            )
        files = [root]
    elif root.is_dir():
        files = sorted(_walk(root, skipped, suffixes), key=lambda file: file.relative_to(root).as_posix())
    else:
        raise FileNotFoundError(f"data.path = {path!r}: no such file or folder")
    files = [file for file in files if file.stat().st_size > 0]
    if not files:
        raise ValueError(f"data.path = {path!r}: no {KNOWN} file with text in it")
    return files


def _kind(name: str) -> str:
    """The suffix that says how a file is read: of x.jsonl.gz it is .jsonl."""
    stem, suffix = os.path.splitext(name.lower())
    inner = os.path.splitext(stem)[1]
    return inner if suffix in PACKED and inner != PARQUET else suffix


def _walk(root: Path, skipped: set[str], suffixes: tuple[str, ...]) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        for name in names:
            if _kind(name) in suffixes and not name.startswith("."):
                yield Path(folder, name)


def cut_into_shards(files: Iterable[Path], size: int | None = None) -> list[tuple[Part, ...]]:
    """What each shard is made of: some small files, a large one, or a stretch of a very large one.

    Args:
        files: in order.
        size: bytes of a shard, about; None is `SHARD_BYTES`.

    Returns:
        The same files in the same order, cut; it follows from their sizes alone.
    """
    size = size or SHARD_BYTES
    shards: list[tuple[Part, ...]] = []
    few: list[Part] = []
    room = size
    for file in files:
        stretches = _stretches(file, size)
        taken = file.stat().st_size * (4 if file.suffix in PACKED else 1)
        if few and (len(stretches) > 1 or taken > room):
            shards.append(tuple(few))
            few, room = [], size
        if len(stretches) > 1:
            shards += [(part,) for part in stretches]
        else:
            few += stretches
            room -= taken
    return [*shards, tuple(few)] if few else shards


def _stretches(file: Path, size: int) -> list[Part]:
    length = file.stat().st_size
    if length <= size or file.suffix in PACKED:
        return [Part(file)]
    if _kind(file.name) == JSONL:
        return [Part(file, start, start + size) for start in range(0, length, size)]
    if _kind(file.name) == PARQUET:
        with _parquet(file) as table:
            groups = table.num_row_groups
        each = max(1, groups * size // length)
        return [Part(file, start, min(start + each, groups)) for start in range(0, groups, each)]
    return [Part(file)]


def iter_documents(
    parts: Iterable[Part | Path], text_field: str = "text", tally: Tally | None = None
) -> Iterator[str]:
    """The documents of some files, in order; those that hold only white space are counted and left out.

    Args:
        parts: files, whole or in part.
        text_field: of a line of .jsonl or a row of .parquet, where the text stands.
        tally: counts what is read.

    Raises:
        ValueError: a file that is not UTF-8 or cannot be unpacked, or a line of a .jsonl file that is no JSON object
            with a text; the file and, for .jsonl, the line are named.
    """
    tally = Tally() if tally is None else tally
    for part in parts:
        part = Part(part) if isinstance(part, Path) else part
        kind = _kind(part.file.name)
        try:
            if kind == JSONL:
                documents: Iterable[str] = _read_jsonl(part, text_field)
            elif kind == PARQUET:
                documents = _read_parquet(part, text_field)
            else:
                documents = (_read_text(part.file),)
            for text in documents:
                if not text or text.isspace():
                    tally.empty += 1
                    continue
                tally.documents += 1
                yield text
        except (UnicodeError, SyntaxError) as error:
            raise ValueError(
                f"{part.file}: not UTF-8 text ({error}): convert the file or move it away"
            ) from None
        except (EOFError, gzip.BadGzipFile, _zstd_error()) as error:
            raise ValueError(f"{part.file}: cannot be unpacked ({error}): fetch it again") from None


def _zstd_error() -> type[Exception]:
    with contextlib.suppress(ImportError):
        import zstandard

        return zstandard.ZstdError
    return EOFError


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked."""
    if file.suffix == ".gz":
        with gzip.open(file, "rb") as stream:
            yield io.BufferedReader(stream)  # type: ignore[arg-type]
    elif file.suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise _missing("zstandard", file) from None
        with (
            file.open("rb") as packed,
            zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True) as stream,
        ):
            yield io.BufferedReader(stream)  # type: ignore[arg-type]
    else:
        with file.open("rb") as stream:
            yield stream


def _missing(package: str, file: Path) -> ValueError:
    return ValueError(f"{file}: reading {file.suffix} files needs {package}: pip install 'flaxtron[data]'")


def _read_text(file: Path) -> str:
    if file.suffix == ".py":
        with tokenize.open(file) as text:  # heeds the file's own `# -*- coding` line
            return text.read()
    with _opened(file) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig") as text:
        return text.read()


def _read_jsonl(part: Part, field: str) -> Iterator[str]:
    with _opened(part.file) as stream:
        if part.start:  # a line belongs to the stretch that it begins in
            stream.seek(part.start - 1)
            stream.readline()
        place, first = stream.tell() if part.stop is not None else 0, 0
        for number, line in enumerate(iter(stream.readline, b""), 1):
            if part.stop is not None and place >= part.stop:
                return
            place += len(line)
            try:
                yield from _text_of_line(line, field)
            except ValueError as error:
                if part.start:
                    first = _count_lines(part.file, place) - number
                where = f"{part.file}:{first + number}"
                if isinstance(error, UnicodeDecodeError):
                    raise ValueError(f"{where}: not UTF-8 text ({error})") from None
                raise ValueError(f"{where}: {error}") from None


def _text_of_line(line: bytes, field: str) -> Iterator[str]:
    text = line.decode("utf-8-sig")
    if not text.strip():
        return
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} (column {error.colno})") from None
    found = record.get(field) if isinstance(record, dict) else None
    if not isinstance(found, str):
        raise ValueError(f'each line must be an object with a "{field}" string')
    try:
        found.encode()
    except UnicodeEncodeError:
        raise ValueError("half a surrogate pair in the text") from None
    yield found


def _count_lines(file: Path, stop: int) -> int:
    """Lines that end before byte `stop`, or there."""
    with file.open("rb") as stream:
        blocks = iter(lambda: stream.read(min(1 << 20, max(0, stop - stream.tell()))), b"")
        count, last = 0, b"\n"
        for block in blocks:
            count, last = count + block.count(b"\n"), block[-1:]
    return count + (last != b"\n")


@contextlib.contextmanager
def _parquet(file: Path) -> Iterator[Any]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError:
        raise _missing("pyarrow", file) from None
    try:
        with parquet.ParquetFile(file) as table:
            yield table
    except ArrowInvalid as error:
        raise ValueError(
            f"{file}: not a Parquet file that can be read: {str(error).splitlines()[0]}"
        ) from None


def _read_parquet(part: Part, field: str) -> Iterator[str]:
    with _parquet(part.file) as table:
        names: Sequence[str] = table.schema_arrow.names
        if field not in names:
            raise ValueError(f"{part.file}: no column {field!r}: its columns are {', '.join(names)}")
        groups = range(table.num_row_groups)[part.start : part.stop]
        for batch in table.iter_batches(batch_size=1024, row_groups=list(groups), columns=[field]):
            for text in batch.column(0).to_pylist():
                if text is not None and not isinstance(text, str):
                    kind = type(text).__name__
                    raise ValueError(f"{part.file}: column {field!r} holds {kind}, not text")
                yield text or ""


def iter_pieces(
    documents: Iterable[str], max_bytes: int | None = None, tally: Tally | None = None
) -> Iterator[Piece]:
    """Cuts long documents at line ends, so that one huge file is still split between cores and held-out sets.

    Args:
        documents: texts.
        max_bytes: stop before the pieces hold more UTF-8 bytes than this; None reads everything.
        tally: counts the bytes.
    """
    room = float("inf") if max_bytes is None else max_bytes
    for text in documents:
        start = 0
        while start < len(text):
            end = start + PIECE_CHARS
            if end < len(text):
                end = text.rfind("\n", start, end) + 1 or end
            piece = text[start:end]
            size = len(piece.encode())
            room -= size
            if room < 0:
                return
            if tally is not None:
                tally.bytes += size
            yield Piece(piece, end >= len(text))
            start = end
