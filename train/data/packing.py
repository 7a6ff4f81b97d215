"""Which documents share a row: best-fit decreasing, so that little is padding and no document is cut needlessly.

A document longer than a row is cut into rows and a rest; every piece, longest first, goes into the fullest row that
still has room for it (Ding et al., 2024, arXiv:2404.10830). Rows are the same in every epoch; their order is not.
"""

import bisect
import dataclasses
from typing import Any

import numpy as np

from train.data.shards import Split


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Rows of whole documents; `rows[i]` is the i-th.

    Attributes:
        split: the documents.
        length: T, tokens in a row.
        padding_id: the token that fills rows up.
        document, start, size: int64 [pieces], each a stretch of a document, row by row.
        first: int64 [rows + 1], the piece that each row begins with.
    """

    split: Split
    length: int
    padding_id: int
    document: np.ndarray
    start: np.ndarray
    size: np.ndarray
    first: np.ndarray

    def __len__(self) -> int:
        return len(self.first) - 1

    def __repr__(self) -> str:
        return f"{len(self)} rows of {self.length} tokens, packed with documents"

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        """ "input_ids" and "segment_ids", int32 [T]: the row's documents are 1, 2, ... and its padding is 0."""
        ids = np.full(self.length, self.padding_id, np.int32)
        segments = np.zeros(self.length, np.int32)
        place = 0
        for segment, piece in enumerate(range(self.first[row], self.first[row + 1]), 1):
            start, size = int(self.start[piece]), int(self.size[piece])
            ids[place : place + size] = self.split.document(int(self.document[piece]))[start : start + size]
            segments[place : place + size] = segment
            place += size
        return {"input_ids": ids, "segment_ids": segments}


def pack(split: Split, length: int, padding_id: int) -> PackedRows:
    """Packs all documents of a split.

    Args:
        split: the documents.
        length: T.
        padding_id: what fills rows up.
    """
    document, start, size = _cut(split.lengths, length)
    row = best_fit(size, length)
    order = np.lexsort((-size, row))
    num_rows = int(row.max()) + 1 if len(row) else 0
    first = np.searchsorted(row[order], np.arange(num_rows + 1))
    return PackedRows(split, length, padding_id, document[order], start[order], size[order], first)


def _cut(lengths: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(document, start, size) of every piece of at most `length` tokens."""
    count = -(-lengths // length)
    document = np.repeat(np.arange(len(lengths)), count)
    number = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
    start = number * length
    return document, start, np.minimum(length, lengths[document] - start)


def best_fit(sizes: np.ndarray, length: int) -> np.ndarray:
    """The row of every piece, int64 [pieces]; pieces of one size are placed at a stroke.

    Args:
        sizes: [pieces], each from 1 to length.
        length: of a row.
    """
    order = np.argsort(-sizes, kind="stable")
    row = np.empty(len(sizes), np.int64)
    room: dict[int, list[int]] = {}  # rows by the room they have
    rooms: list[int] = []  # the same rooms in order
    num_rows, at = 0, 0

    def add(left: int, rows: list[int]) -> None:
        if left and rows:
            if left not in room:
                bisect.insort(rooms, left)
                room[left] = []
            room[left].extend(rows)

    values, counts = np.unique(-sizes, return_counts=True)
    for size, count in zip((-values).tolist(), counts.tolist(), strict=True):
        while count:
            fits = bisect.bisect_left(rooms, size)
            if fits < len(rooms):
                left = rooms[fits]
                rows = room[left]
            else:
                left = length
                wanted = -(-count // (length // size))
                rows = list(range(num_rows, num_rows + wanted))
                num_rows += wanted
            each = (
                left // size
            )  # a row with room takes piece after piece of this size: it stays the fullest that fits
            used = min(len(rows), -(-count // each))
            taken, kept = rows[:used], rows[used:]
            placed = min(count, used * each)
            row[order[at : at + placed]] = np.repeat(taken, each)[:placed]
            if fits < len(rooms) and rooms[fits] == left and left in room:
                if kept:
                    room[left] = kept
                else:
                    del room[left], rooms[fits]
            last = placed - (used - 1) * each  # the last row may take fewer
            add(left - each * size, taken[:-1] if last < each else taken)
            if last < each:
                add(left - last * size, taken[-1:])
            count, at = count - placed, at + placed
    return row


def labels_of(ids: np.ndarray, segments: np.ndarray, ignored: int) -> Any:
    """What a row is learned by: its tokens, but for padding and the first of each document.

    The loss holds each label against the logits one place before it, where another document's last token stands.
    """
    starts = np.diff(segments, prepend=-1, axis=-1) != 0
    return np.where((segments == 0) | starts, np.int32(ignored), ids)
