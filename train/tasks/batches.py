"""Batches of rows of labelled examples: an order that is a pure function of (seed, step)."""

from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from train.data.rampup import BatchSizes
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
        rampup: how the first batches grow to B (`train.data.rampup.BatchSizes`).

    Attributes:
        step: the number of the batch that comes next, from 0.

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
        rampup: tuple[int, int, int] | None = None,
    ):
        self._sizes, self._shard = BatchSizes(batch_size, rampup), shard
        self._sizes.check_shards(shard[1])
        if not rows:
            raise ValueError("there is no example to train on")
        self._rows, self._collate, self._lengths = rows, collate, tuple(lengths)
        self._order: Any = grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat()
        self.step = 0

    @property
    def rows(self) -> range:
        """The rows of that global batch that are this process's."""
        return self._sizes.part(self.step, self._shard)

    def __iter__(self) -> "RowBatches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        first, mine = self._sizes.before(self.step), self.rows
        chosen = [self._rows[int(self._order[first + i])] for i in range(self._sizes.of(self.step))]
        self.step += 1
        length = padded_length(chosen, self._lengths)
        return self._collate([chosen[i] for i in mine], length)

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
