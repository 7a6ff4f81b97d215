"""Token files: text is tokenised once, kept under a name made of its origin, and read as mapped memory.

A folder of the cache holds train.npy and validation.npy (uint16 or uint32, 1-D), tokenizer.json and
manifest.json. It is written aside and renamed, so a folder that exists is complete.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from train.data.sources import Piece, find_files, iter_documents, iter_pieces
from train.data.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer

FORMAT = 1
"""Raised when what the files hold changes, so that older folders are not read."""

TOKENIZER_TEXT_BYTES = 64 << 20
"""A tokenizer is trained on at most this much text."""

_BATCH_PIECES = 256
"""Pieces that are tokenised at once, in parallel."""


@dataclasses.dataclass(frozen=True)
class TokenData:
    """Tokenised text.

    Attributes:
        train: uint16 or uint32 [tokens], documents one after another, each followed by the end-of-text token.
        validation: the same of the documents held out.
        folder: where the files lie.
        manifest: what they were made of; `manifest["fingerprint"]` names the tokens themselves.
        built: whether this call made them, rather than finding them in the cache.
    """

    train: np.ndarray
    validation: np.ndarray
    folder: Path
    manifest: dict[str, Any]
    built: bool

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer.json."""
        return self.folder / "tokenizer.json"


def prepare_tokens(
    path: str,
    *,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    end_of_text: str = END_OF_TEXT,
    validation_fraction: float = 0.05,
    max_bytes: int | None = None,
    cache_dir: str | None = None,
    model_vocab_size: int | None = None,
) -> TokenData:
    """Tokenises a source of text, or finds that it was done before.

    Args:
        path: a folder or file of .txt, .md, .py or .jsonl ("text" field), or "stdlib".
        tokenizer: a tokenizer.json, or a folder with one or with vocab.json and merges.txt; None trains one
            on the text.
        vocab_size: of the tokenizer that is trained; None is the model's.
        end_of_text: the token that ends each document.
        validation_fraction: share of the documents held out, chosen by a hash of their text.
        max_bytes: read at most this much text; None reads all.
        cache_dir: where token files are kept; None is flaxtron/data in the user's cache folder.
        model_vocab_size: the model's vocabulary, which has to hold every token; None skips the check.

    Raises:
        ValueError: no text, text that cannot be read, a value out of range, or a tokenizer larger than the
            model's vocabulary.
        OSError: no such path, or the cache cannot be written.
    """
    _check_settings(path, validation_fraction, max_bytes)
    files = find_files(path)
    loaded = None if tokenizer is None else load_tokenizer(tokenizer)
    if loaded is not None:
        _check_vocabulary(loaded, end_of_text, model_vocab_size)
    vocab_size = vocab_size or model_vocab_size
    if loaded is None and vocab_size is None:
        raise ValueError("data.vocab_size is not set: say how large a tokenizer to train")
    if (
        model_vocab_size is not None
        and vocab_size is not None
        and loaded is None
        and vocab_size > model_vocab_size
    ):
        raise ValueError(
            f"data.vocab_size = {vocab_size} is larger than the model's vocabulary, {model_vocab_size}"
        )

    origin = {
        "format": FORMAT,
        "files": [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        "tokenizer": vocab_size if loaded is None else _sha256(loaded.to_str().encode()),
        "end_of_text": end_of_text,
        "validation_fraction": validation_fraction,
        "max_bytes": max_bytes,
    }
    folder = _cache_root(cache_dir) / _sha256(json.dumps(origin).encode())[:24]
    found = _open(folder, built=False)
    if found is not None:
        return found

    def pieces() -> Iterator[Piece]:
        return iter_pieces(iter_documents(files), max_bytes)

    with _written_aside(folder) as scratch, _progress() as progress:
        held_out, num_documents, num_bytes = _choose_held_out(pieces(), validation_fraction)
        if loaded is None:
            assert vocab_size is not None
            task = progress.add_task("training the tokenizer", total=None)
            loaded = train_tokenizer(_training_texts(pieces(), held_out), vocab_size, end_of_text)
            progress.remove_task(task)
        loaded.save(str(scratch / "tokenizer.json"))
        task = progress.add_task("tokenising", total=num_bytes)
        counts = _write_tokens(
            scratch, pieces(), held_out, loaded, end_of_text, lambda size: progress.advance(task, size)
        )
        manifest = {
            "path": path,
            "files": len(files),
            "documents": num_documents,
            "bytes": num_bytes,
            **counts,
            "vocab_size": loaded.get_vocab_size(),
            "end_of_text": end_of_text,
            "end_of_text_id": loaded.token_to_id(end_of_text),
            "fingerprint": _fingerprint(scratch),
        }
        (scratch / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    data = _open(folder, built=True)
    assert data is not None, folder
    return data


def _check_settings(path: str, validation_fraction: float, max_bytes: int | None) -> None:
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"data.validation_fraction = {validation_fraction}: a share lies in [0, 1)")
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"data.max_bytes = {max_bytes}: it is at least 1, or None to read all of {path!r}")


def _check_vocabulary(tokenizer: Tokenizer, end_of_text: str, model_vocab_size: int | None) -> None:
    largest = max(tokenizer.get_vocab().values())
    if model_vocab_size is not None and largest >= model_vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {largest}, but the model's vocab_size is {model_vocab_size}: raise "
            f"vocab_size to {largest + 1} or choose a smaller tokenizer"
        )
    if tokenizer.token_to_id(end_of_text) is None:
        special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        raise ValueError(
            f"data.end_of_text = {end_of_text!r} is not a token of the tokenizer; its special tokens are "
            f"{special[:8]}"
        )


def _cache_root(cache_dir: str | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "flaxtron", "data")


def _open(folder: Path, built: bool) -> TokenData | None:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        train, validation = (
            np.load(folder / f"{split}.npy", mmap_mode="r") for split in ("train", "validation")
        )
    except (OSError, ValueError):
        return None  # not there, or damaged: it is made anew
    if (len(train), len(validation)) != (manifest["train_tokens"], manifest["validation_tokens"]):
        return None
    return TokenData(train, validation, folder, manifest, built)


@contextlib.contextmanager
def _written_aside(folder: Path) -> Iterator[Path]:
    """A scratch folder that becomes `folder` if the block ends well, and goes if it does not."""
    scratch = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    try:
        scratch.mkdir(parents=True)
    except OSError as error:
        raise OSError(f"data.cache_dir: cannot write to {folder.parent}: {error.strerror}") from None
    try:
        yield scratch
        if folder.exists() and _open(folder, built=False) is None:
            shutil.rmtree(folder)
        with contextlib.suppress(FileExistsError):
            try:
                scratch.rename(folder)
            except OSError:
                if not folder.exists():  # otherwise another process was first, with the same content
                    raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _choose_held_out(pieces: Iterable[Piece], fraction: float) -> tuple[np.ndarray, int, int]:
    """(bool [pieces] that says which are held out, number of documents, bytes of text)."""
    hashes, documents, size = [], 0, 0
    for piece in pieces:
        data = piece.text.encode()
        hashes.append(int.from_bytes(hashlib.sha256(data).digest()[:8], "big"))
        documents += piece.ends_document
        size += len(data)
    # uint64 against a Python int: exact, and the same on every machine.
    held_out = np.asarray(hashes, np.uint64) < np.uint64(int(fraction * 2.0**64))
    if fraction > 0 and len(hashes) > 1 and not held_out.any():
        held_out[np.argmin(np.asarray(hashes, np.uint64))] = True
    return held_out, documents, size


def _training_texts(pieces: Iterable[Piece], held_out: np.ndarray) -> Iterator[str]:
    size = 0
    for piece, is_held_out in zip(pieces, held_out, strict=True):
        if not is_held_out and size < TOKENIZER_TEXT_BYTES:
            size += len(piece.text)
            yield piece.text


def _write_tokens(
    scratch: Path,
    pieces: Iterable[Piece],
    held_out: np.ndarray,
    tokenizer: Tokenizer,
    end_of_text: str,
    advance: Callable[[int], None],
) -> dict[str, int]:
    """Writes train.npy and validation.npy, batch by batch; returns how many tokens each holds."""
    end_id = tokenizer.token_to_id(end_of_text)
    dtype = np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32
    tokenizer.encode_special_tokens = True  # a special token's name in the text is text
    counts = {"train_tokens": 0, "validation_tokens": 0}
    with _npy(scratch / "train.npy", dtype) as train, _npy(scratch / "validation.npy", dtype) as validation:
        source = iter(zip(pieces, held_out, strict=True))
        while batch := list(islice(source, _BATCH_PIECES)):
            encodings = tokenizer.encode_batch_fast(
                [piece.text for piece, _ in batch], add_special_tokens=False
            )
            for (piece, is_held_out), encoding in zip(batch, encodings, strict=True):
                ids = encoding.ids + [end_id] * piece.ends_document
                (validation if is_held_out else train).write(np.asarray(ids, dtype).tobytes())
                counts["validation_tokens" if is_held_out else "train_tokens"] += len(ids)
            advance(sum(len(piece.text.encode()) for piece, _ in batch))
    return counts


@contextlib.contextmanager
def _npy(path: Path, dtype: type[np.generic]) -> Iterator[BinaryIO]:
    """A .npy file of one dimension whose length is known when it is closed."""

    def header(length: int) -> dict[str, Any]:
        return {
            "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
            "fortran_order": False,
            "shape": (length,),
        }

    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header(0))
        start = file.tell()
        yield file
        length = (file.tell() - start) // np.dtype(dtype).itemsize
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header(length))
        assert file.tell() == start, "numpy keeps room in the header for the length to grow"


def _fingerprint(folder: Path) -> str:
    """A hash of the tokens and the tokenizer: runs that read the same text agree on it, wherever it lay."""
    digest = hashlib.sha256()
    for name in ("tokenizer.json", "train.npy", "validation.npy"):
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
