"""Builds a prepared folder: text to token shards, in parallel processes, so that a killed build goes on where it was.

What each shard is made of follows from the files alone (`sources.cut_into_shards`), and so does its content: however
many processes build, and however often they are stopped, the folder is the same byte for byte. The manifest is written
last, and a folder that has it is complete.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from tokenizers import Tokenizer

from train.data.sources import SHARD_BYTES, Part, cut_into_shards, find_files
from train.data.tokenizer import load_tokenizer, train_tokenizer
from train.data.units import TOKENIZER, Unit, hash_of, make_units, pieces_of, token_dtype, write_json

FORMAT = 2
"""Raised when what the files hold changes, so that older folders are not read."""

MANIFEST, PLAN = "manifest.json", "plan.json"

TOKENIZER_TEXT_BYTES = 64 << 20
"""A tokenizer is trained on at most this much text."""

SCANNED_BYTES = 64 << 20
"""Files of less text than this are read once before, to see that something is held out."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a prepared folder is made of.

    Attributes:
        paths: folders, files or "stdlib".
        tokenizer: the tokenizer, or None to train one.
        vocab_size: of the one that is trained.
        end_of_text: the token that ends each document.
        validation_fraction: share of the documents held out, chosen by a hash of their text.
        max_bytes: read at most this much text; None reads all.
        text_field: of a line of .jsonl or a row of .parquet.
    """

    paths: tuple[str, ...]
    tokenizer: Tokenizer | None
    vocab_size: int | None
    end_of_text: str
    validation_fraction: float
    max_bytes: int | None
    text_field: str

    @functools.cached_property
    def files(self) -> list[list[Path]]:
        """The files of every path."""
        return [find_files(path) for path in self.paths]

    @functools.cached_property
    def plan(self) -> dict[str, Any]:
        """All that decides what is built, to compare with what a folder was begun with."""
        tokenizer = None if self.tokenizer is None else sha256(self.tokenizer.to_str())
        every = [
            (str(file), file.stat().st_size, file.stat().st_mtime_ns)
            for files in self.files
            for file in files
        ]
        return {
            "format": FORMAT,
            "paths": list(self.paths),
            "files": sha256(json.dumps(every)),
            "tokenizer": tokenizer or f"trained, vocab_size {self.vocab_size}",
            "end_of_text": self.end_of_text,
            "validation_fraction": self.validation_fraction,
            "max_bytes": self.max_bytes,
            "text_field": self.text_field,
            "shard_bytes": SHARD_BYTES,
        }


def sha256(text: str) -> str:
    """Of its UTF-8 bytes, hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def read_plan(folder: Path) -> dict[str, Any] | None:
    """What a folder was built of or is being built of; None where there is no such thing."""
    for name, take in ((MANIFEST, lambda found: found["plan"]), (PLAN, dict)):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return take(json.loads((folder / name).read_text()))
    return None


def build(folder: Path, recipe: Recipe, processes: int | None = None) -> dict[str, Any]:
    """Builds what is not there yet.

    Args:
        folder: exists and is nobody else's at the time (`locked`); what a stopped build of this recipe left is kept.
        recipe: what of.
        processes: how many tokenise at once; None is one for each CPU.

    Returns:
        The manifest.

    Raises:
        ValueError: text that cannot be read, or no tokenizer of that size.
        OSError: the folder cannot be written.
    """
    for left in folder.glob(".*.tmp*"):
        left.unlink(missing_ok=True)
    write_json(folder / PLAN, recipe.plan)
    with _progress() as progress:
        units, tokenizer = _plan_units(folder, recipe, progress)
        total = sum(unit.text_bytes for unit in units)
        task = progress.add_task("tokenising", total=total)
        notes: dict[int, dict[str, Any]] = {}
        left = []
        for unit in units:
            note = unit.finished()
            if note is None:
                left.append(unit)
            else:
                notes[unit.number] = note
                total += note["bytes"] - unit.text_bytes
                progress.update(task, total=total, advance=note["bytes"])
        by_number = {unit.number: unit for unit in units}
        for number, note in make_units(left, processes, functools.partial(progress.advance, task)):
            notes[number] = note
            total += note["bytes"] - by_number[number].text_bytes
            progress.update(task, total=total)
    manifest = _manifest(recipe, tokenizer, units, notes)
    write_json(folder / MANIFEST, manifest)
    for unit in units:
        unit.note.unlink()
    (folder / PLAN).unlink()
    return manifest


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes a folder and holds it, so that two builds of it do not mix; waits for another to end.

    Raises:
        OSError: it cannot be made or written.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _plan_units(folder: Path, recipe: Recipe, progress: Progress) -> tuple[list[Unit], Tokenizer]:
    parts = [
        (i, parts) for i, files in enumerate(recipe.files) for parts in cut_into_shards(files, SHARD_BYTES)
    ]
    small = sum(file.stat().st_size for files in recipe.files for file in files) < SCANNED_BYTES
    threshold = int(recipe.validation_fraction * 2.0**64)
    limits: list[int | None] = [None] * len(parts)
    if recipe.max_bytes is not None or small:
        within, lowest = _scan(parts, recipe)
        if sum(within) == 0:
            shown = repr(recipe.paths[0]) if len(recipe.paths) == 1 else str(list(recipe.paths))
            raise ValueError(f"data.path = {shown}: its files hold no text, or none within data.max_bytes")
        if recipe.validation_fraction > 0 and lowest is not None:
            threshold = max(threshold, lowest + 1)
        if recipe.max_bytes is not None:
            limits = list(within)
    options: dict[str, Any] = dict(
        threshold=threshold, end_of_text=recipe.end_of_text, text_field=recipe.text_field
    )
    units = [
        Unit(folder, number, path, group, limit, **options)
        for number, ((path, group), limit) in enumerate(zip(parts, limits, strict=True))
        if limit != 0
    ]
    tokenizer = recipe.tokenizer
    if tokenizer is None:
        tokenizer = _kept_tokenizer(folder)
    if tokenizer is None:
        assert recipe.vocab_size is not None
        task = progress.add_task("training the tokenizer", total=None)
        tokenizer = train_tokenizer(_training_texts(units), recipe.vocab_size, recipe.end_of_text)
        progress.remove_task(task)
    aside = folder / f".{TOKENIZER}.tmp"
    tokenizer.save(str(aside))
    aside.rename(folder / TOKENIZER)
    return units, tokenizer


def _kept_tokenizer(folder: Path) -> Tokenizer | None:
    """The one that a stopped build has trained."""
    with contextlib.suppress(OSError, ValueError):
        return load_tokenizer(folder / TOKENIZER)
    return None


def _scan(parts: list[tuple[int, tuple[Part, ...]]], recipe: Recipe) -> tuple[list[int], int | None]:
    """(how many pieces of each unit are within max_bytes, the lowest hash, None of a single piece)."""
    room = float("inf") if recipe.max_bytes is None else recipe.max_bytes
    limits: list[int] = []
    lowest = 2**64
    for _, group in parts:
        count = 0
        for piece in pieces_of(group, recipe.text_field) if room > 0 else ():
            room -= len(piece.text.encode())
            if room < 0:
                break
            lowest, count = min(lowest, hash_of(piece.text)), count + 1
        limits.append(count)
    return limits, lowest if sum(limits) > 1 else None


def _training_texts(units: list[Unit]) -> Iterator[str]:
    size = 0
    for unit in units:
        for piece in pieces_of(unit.parts, unit.text_field, unit.limit):
            if size >= TOKENIZER_TEXT_BYTES:
                return
            if hash_of(piece.text) >= unit.threshold:
                size += len(piece.text)
                yield piece.text


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _manifest(
    recipe: Recipe, tokenizer: Tokenizer, units: list[Unit], notes: dict[int, dict[str, Any]]
) -> dict[str, Any]:
    sources = []
    for i, path in enumerate(recipe.paths):
        mine = [notes[unit.number] for unit in units if unit.path == i]
        counts = {key: sum(note[key] for note in mine) for key in ("documents", "empty", "bytes")}
        tokens = {
            f"{name}_tokens": sum(note[name]["tokens"] for note in mine) for name in ("train", "validation")
        }
        sources.append({"path": path, "files": len(recipe.files[i]), **counts, **tokens})
    shards = {name: [notes[unit.number][name] for unit in units] for name in ("train", "validation")}
    counted = ("files", "documents", "empty", "bytes", "train_tokens", "validation_tokens")
    digest = sha256(tokenizer.to_str())
    return {
        "format": FORMAT,
        "path": recipe.paths[0] if len(recipe.paths) == 1 else list(recipe.paths),
        **{key: sum(source[key] for source in sources) for key in counted},
        "vocab_size": tokenizer.get_vocab_size(),
        "end_of_text": recipe.end_of_text,
        "end_of_text_id": tokenizer.token_to_id(recipe.end_of_text),
        "dtype": token_dtype(tokenizer).name,
        "tokenizer": digest,
        "fingerprint": sha256(
            json.dumps([digest, *(shard["sha256"] for part in shards.values() for shard in part)])
        ),
        "plan": recipe.plan,
        "sources": sources,
        "shards": shards,
    }
