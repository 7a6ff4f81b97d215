"""Token shards: ArrayRecord files of documents as token ids, written one at a time and read at random.

A record is a document (or a piece of a long one): little-endian uint16 or uint32 ids, the end-of-text token last. The
last record of a shard is its index: how many tokens each record before it has, uint32. Format: Google's ArrayRecord
(https://github.com/google/array_record), one record a chunk, not compressed, so that any document is one read away.
"""

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

SUFFIX = ".arrayrecord"

_AT_RANDOM = "readahead_buffer_size:0,max_parallelism:0"


class ShardWriter:
    """Writes one shard; it has its name only once it is whole.

    Args:
        path: the file to be.
        dtype: of the ids, uint16 or uint32.
    """

    def __init__(self, path: Path, dtype: np.dtype):
        self._path, self._dtype = path, dtype.newbyteorder("<")
        self._aside = path.with_name(f".{path.name}.tmp")
        self._lengths: list[int] = []
        with self._writing():
            self._writer = ArrayRecordWriter(str(self._aside), "group_size:1,uncompressed")

    def add(self, ids: np.ndarray) -> None:
        """Adds a document [n], its end-of-text token included.

        Raises:
            OSError: it cannot be written, as on a full disk.
        """
        with self._writing():
            self._writer.write(ids.astype(self._dtype).tobytes())
        self._lengths.append(len(ids))

    def finish(self) -> dict[str, int | str]:
        """Writes the index and gives the file its name.

        Returns:
            What a manifest says of a shard: "file", "documents", "tokens", "bytes", "sha256".

        Raises:
            OSError: as `add`.
        """
        with self._writing():
            self._writer.write(np.asarray(self._lengths, "<u4").tobytes())
            self._writer.close()
        with self._aside.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        size = self._aside.stat().st_size
        self._aside.rename(self._path)
        sizes = {"documents": len(self._lengths), "tokens": sum(self._lengths), "bytes": size}
        return {"file": self._path.name, **sizes, "sha256": digest}

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the library raises RuntimeError for what a disk may do
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise OSError(f"{self._path}: cannot be written: {reason}") from None

    def discard(self) -> None:
        """Closes and removes what was written."""
        with contextlib.suppress(Exception):
            self._writer.close()
        self._aside.unlink(missing_ok=True)


class Split:
    """Documents in shards, to be read at random; any number of threads may.

    Args:
        files: the shards in order.
        dtype: of the ids.

    Attributes:
        lengths: int64 [documents], the tokens of each, its end-of-text token included.
        ends: int64 [documents], where each ends when all are laid end to end.

    Raises:
        OSError: a shard is not there or is damaged.
    """

    def __init__(self, files: Sequence[Path], dtype: np.dtype):
        self._dtype = dtype.newbyteorder("<")
        self._files, self._lock = list(files), threading.Lock()
        self._readers: dict[int, ArrayRecordReader] = {}
        indices = [self._index(shard) for shard in range(len(self._files))]
        self._first = np.cumsum([0, *(len(index) for index in indices)])
        self.lengths = np.concatenate([np.zeros(0, np.int64), *indices])
        self.ends = np.cumsum(self.lengths)

    def __repr__(self) -> str:
        return f"{self.num_documents} documents of {self.num_tokens} tokens"

    @property
    def num_documents(self) -> int:
        """How many documents; a long one counts once for each of its pieces."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, end-of-text tokens included."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def document(self, index: int) -> np.ndarray:
        """The tokens of a document, int32 [n], its end-of-text token included.

        Raises:
            IndexError: there is no such document.
        """
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        return next(self.documents(index, index + 1))

    def documents(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Documents start, start + 1, ..., stop - 1."""
        shard = int(np.searchsorted(self._first, start, side="right")) - 1
        while start < stop:
            first, end = int(self._first[shard]), min(stop, int(self._first[shard + 1]))
            for record in self._records(shard, range(start - first, end - first)):
                yield np.frombuffer(record, self._dtype).astype(np.int32)
            start, shard = end, shard + 1

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start, ..., stop - 1 of all documents laid end to end, int32 [at most stop - start]."""
        stop = min(stop, self.num_tokens)
        if start >= stop:
            return np.zeros(0, np.int32)
        first, last = np.searchsorted(self.ends, [start, stop - 1], side="right")
        before = int(self.ends[first - 1]) if first else 0
        return np.concatenate(list(self.documents(int(first), int(last) + 1)))[start - before : stop - before]

    def _records(self, shard: int, which: Sequence[int]) -> list[bytes]:
        with self._lock:
            if shard not in self._readers:
                self._readers[shard] = self._open(shard)
            try:
                records = self._readers[shard].read(list(which))
            except Exception as error:
                raise self._damaged(shard, str(error)) from None
        if len(records) != len(which):
            raise self._damaged(shard, f"{len(which)} records asked for, {len(records)} read")
        return records

    def _open(self, shard: int) -> ArrayRecordReader:
        file = self._files[shard]
        if not file.is_file():
            raise FileNotFoundError(f"{file}: the manifest names this shard, and it is not there")
        try:
            reader = ArrayRecordReader(str(file), _AT_RANDOM)
        except Exception as error:
            raise self._damaged(shard, str(error)) from None
        if not reader.ok() or reader.num_records() == 0:
            raise self._damaged(shard, "it has no records")
        return reader

    def _index(self, shard: int) -> np.ndarray:
        reader = self._readers[shard] = self._open(shard)
        (index,) = self._records(shard, [reader.num_records() - 1])
        lengths = np.frombuffer(index, "<u4").astype(np.int64)
        if len(lengths) != reader.num_records() - 1:
            raise self._damaged(shard, "its index is of another shard")
        return lengths

    def _damaged(self, shard: int, reason: str) -> OSError:
        reason = reason.strip().splitlines()[0] if reason.strip() else "unknown"
        return OSError(f"{self._files[shard]}: this shard cannot be read ({reason}): prepare the text again")
