"""Batches of rows of labelled examples: an order that is a pure function of (seed, step)."""

from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from train.tasks.head import Row

Collate = Callable[[Sequence[Row], int], dict[str, np.ndarray]]


class RowBatches:
    """An endless stream of shuffled rows, in a new order each time through; a source of batches.

    Args:
        rows: of the examples.
        collate: (rows, length) -> arrays, such as `Head.batch`.
        lengths: that batches are padded to, rising; a batch takes the first that holds its longest row.
        batch_size: B, over all processes.
        seed: of the order.
        shard: (index, count): this process's part of each global batch.

    Attributes:
        step: the number of the batch that comes next, from 0.
        rows: the rows of the global batch that are this process's.

    Raises:
        ValueError: no rows, or a batch that the shards do not divide.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        collate: Collate,
        *,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        shard: tuple[int, int] = (0, 1),
    ):
        index, count = shard
        if batch_size % count:
            raise ValueError(f"global_batch_size = {batch_size}: {count} processes do not divide it")
        if not rows:
            raise ValueError("there is no example to train on")
        self._rows, self._collate, self._lengths, self._size = rows, collate, tuple(lengths), batch_size
        self._order: Any = grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat()
        self.rows = range(index * (batch_size // count), (index + 1) * (batch_size // count))
        self.step = 0

    def __iter__(self) -> "RowBatches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        first = self.step * self._size
        chosen = [self._rows[int(self._order[first + i])] for i in range(self._size)]
        self.step += 1
        length = padded_length(chosen, self._lengths)
        return self._collate([chosen[i] for i in self.rows], length)

    def get_state(self) -> dict[str, Any]:
        """How far it is."""
        return {"step": self.step}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where `get_state` was called."""
        self.step = int(state["step"])

    def close(self) -> None:
        """Nothing runs in the background."""


def padded_length(rows: Sequence[Row], lengths: Sequence[int]) -> int:
    """The first of the lengths that holds every row."""
    longest = max(row.length for row in rows)
    return next(length for length in lengths if length >= longest)
