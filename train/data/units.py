"""Units of a build: what one process makes of some files, and the processes that make them side by side.

A unit that is done has its note, unit-NNNNN.json, beside its shards.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from train.data.shards import SUFFIX, ShardWriter
from train.data.sources import SHARD_BYTES, Part, Piece, Tally, iter_documents, iter_pieces
from train.data.tokenizer import load_tokenizer

TOKENIZER = "tokenizer.json"

_BATCH_PIECES = 256
"""Pieces that are tokenised at once."""

_WATCH_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class Unit:
    """What one process makes: a shard to train on and one held out, of some parts of one path."""

    folder: Path
    number: int
    path: int
    parts: tuple[Part, ...]
    limit: int | None
    threshold: int
    end_of_text: str
    text_field: str

    @property
    def note(self) -> Path:
        """The file that says that it is done."""
        return self.folder / f"unit-{self.number:05}.json"

    @property
    def text_bytes(self) -> int:
        """About how much text it holds."""
        stretches = [(p.file.stat().st_size, p) for p in self.parts]
        return sum(size if p.stop is None else min(size, SHARD_BYTES) for size, p in stretches)

    def shard(self, split: str) -> Path:
        """A file that it makes."""
        return self.folder / f"{split}-{self.number:05}{SUFFIX}"

    def finished(self) -> dict[str, Any] | None:
        """Its note, if its shards are there."""
        try:
            note = json.loads(self.note.read_text())
            whole = all(
                self.shard(name).stat().st_size == note[name]["bytes"] for name in ("train", "validation")
            )
        except (OSError, ValueError, KeyError):
            return None
        return note if whole else None


def pieces_of(
    parts: tuple[Part, ...], field: str, limit: int | None = None, tally: Tally | None = None
) -> Iterator[Piece]:
    """The pieces of some files, at most `limit`; the tally counts what is read."""
    return islice(iter_pieces(iter_documents(parts, field, tally), tally=tally), limit)


def hash_of(text: str) -> int:
    """A number below 2**64 that follows from a text alone: it says whether the text is held out."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _make_unit(unit: Unit, advance: Callable[[int], None]) -> dict[str, Any]:
    """Makes a unit's shards and its note, which is returned."""
    tokenizer = _tokenizer(unit.folder / TOKENIZER)
    end_id, dtype = tokenizer.token_to_id(unit.end_of_text), token_dtype(tokenizer)
    tally, documents = Tally(), 0
    writers = {name: ShardWriter(unit.shard(name), dtype) for name in ("train", "validation")}
    try:
        pieces = pieces_of(unit.parts, unit.text_field, unit.limit, tally)
        done = 0
        while batch := list(islice(pieces, _BATCH_PIECES)):
            encodings = tokenizer.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
            for piece, encoding in zip(batch, encodings, strict=True):
                ids = np.asarray([*encoding.ids, end_id] if piece.ends_document else encoding.ids, dtype)
                writers["validation" if hash_of(piece.text) < unit.threshold else "train"].add(ids)
                documents += piece.ends_document
            advance(tally.bytes - done)
            done = tally.bytes
        shards = {name: writer.finish() for name, writer in writers.items()}
    except BaseException:
        for writer in writers.values():
            writer.discard()
        raise
    note = {**shards, "documents": documents, "empty": tally.empty, "bytes": tally.bytes}
    write_json(unit.note, note)
    return note


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """What holds every id."""
    return np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32)


@functools.lru_cache(maxsize=1)
def _cached_tokenizer(file: Path, changed: int) -> Tokenizer:
    tokenizer = load_tokenizer(file)
    tokenizer.encode_special_tokens = True  # a special token's name in the text is text
    return tokenizer


def _tokenizer(file: Path) -> Tokenizer:
    return _cached_tokenizer(file, file.stat().st_mtime_ns)


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Writes JSON, all of it or nothing."""
    aside = file.with_name(f".{file.name}.tmp{os.getpid()}")
    with aside.open("w") as stream:
        stream.write(json.dumps(content, indent=2) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    aside.rename(file)


def make_units(
    units: list[Unit], processes: int | None, advance: Callable[[int], None]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Makes units, several at once, and yields (number, note) of each as it is done."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = min(processes or cpus, len(units))
    if processes <= 1:  # the tokenizers library's threads use all CPUs
        for unit in units:
            yield unit.number, _make_unit(unit, advance)
        return
    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("q", 0), context.Event()
    pool = concurrent.futures.ProcessPoolExecutor(
        processes, context, _start_worker, (counter, stop, os.getpid(), max(1, cpus // processes))
    )
    try:
        futures = {pool.submit(_work, unit): unit.number for unit in units}
        waiting, shown = set(futures), 0
        while waiting:
            done, waiting = concurrent.futures.wait(waiting, 0.1, concurrent.futures.FIRST_COMPLETED)
            advance(counter.value - shown)
            shown = counter.value
            for future in done:
                yield futures[future], future.result()
    except ValueError as error:
        raise ValueError(str(error)) from None  # raised here, so that a command line tells it from a defect
    except OSError as error:
        raise OSError(str(error)) from None
    except BrokenProcessPool:
        raise OSError(
            "a process that tokenises was killed, perhaps for want of memory: run the same again to go on, or with "
            "fewer processes (data.processes)"
        ) from None
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


_counter: Any = None
_stop: Any = None


def _start_worker(counter: Any, stop: Any, parent: int, threads: int) -> None:
    """Runs first in each process: it counts, stops when asked, and ends when its parent was killed."""
    global _counter, _stop
    _counter, _stop = counter, stop
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(unit: Unit) -> dict[str, Any]:
    def advance(size: int) -> None:
        with _counter.get_lock():
            _counter.value += size
        if _stop.is_set():
            raise InterruptedError("stopped")

    return _make_unit(unit, advance)
