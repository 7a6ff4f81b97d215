"""Batches of windows: an order that is a pure function of (seed, step), whatever the number of processes."""

from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np

Batch = dict[str, np.ndarray]

IGNORED = -100
"""The label of a position that no loss counts."""


class _Windows(grain.sources.RandomAccessDataSource):
    """Tokens cut into windows of one length, side by side; what is left at the end is dropped."""

    def __init__(self, tokens: np.ndarray, length: int):
        self._tokens, self._length = tokens, length

    def __len__(self) -> int:
        return len(self._tokens) // self._length

    def __getitem__(self, index: int) -> np.ndarray:
        return self._tokens[index * self._length : (index + 1) * self._length].astype(np.int32)

    def __repr__(self) -> str:
        return f"{len(self)} windows of {self._length} tokens"


def train_batches(
    tokens: np.ndarray,
    *,
    sequence_length: int,
    global_batch_size: int,
    seed: int,
    shard: tuple[int, int] = (0, 1),
) -> grain.IterDataset:
    """An endless stream of shuffled windows; every epoch has its own order.

    Its iterator is grain's: `get_state()` and `set_state()` hold the position, the number of steps taken.

    Args:
        tokens: [tokens], from `prepare_tokens`.
        sequence_length: T.
        global_batch_size: B, over all processes.
        seed: of the order.
        shard: (index, count): this process reads piece `index` of `count` equal pieces of each global batch.

    Returns:
        Batches of "input_ids" and "labels", both int32 [B / count, T]. They are equal: the loss shifts.

    Raises:
        ValueError: fewer tokens than one window, or a batch that the shards do not divide.
    """
    windows = _Windows(tokens, sequence_length)
    index, count = shard
    if len(windows) == 0:
        raise ValueError(
            f"the training text has {len(tokens)} tokens, fewer than one window of sequence_length = "
            f"{sequence_length}: give more text or a shorter sequence_length"
        )
    if global_batch_size % count:
        raise ValueError(f"global_batch_size = {global_batch_size}: {count} processes do not divide it")
    # Batches of one shard's size, of which this process takes every count-th: so the global batch of a step
    # is the same rows in the same order for any count.
    return (
        grain.MapDataset.source(windows)
        .seed(seed)
        .shuffle()
        .repeat()
        .batch(global_batch_size // count, drop_remainder=True)
        .slice(slice(index, None, count))
        .map(_batch)
        .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8))
    )


def _batch(rows: np.ndarray) -> Batch:
    return {"input_ids": rows, "labels": rows}


def validation_batches(
    tokens: np.ndarray,
    *,
    sequence_length: int,
    global_batch_size: int,
    max_batches: int | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """The held-out text in order, once. The last batch is filled with positions that no loss counts.

    Args:
        tokens, sequence_length, global_batch_size, shard: as for `train_batches`.
        max_batches: stop after this many; None reads all.
    """
    index, count = shard
    per_batch, rows = global_batch_size * sequence_length, global_batch_size // count
    num_batches = -(-len(tokens) // per_batch)
    for i in range(num_batches if max_batches is None else min(num_batches, max_batches)):
        ids = np.zeros(per_batch, np.int32)
        labels = np.full(per_batch, IGNORED, np.int32)
        part = tokens[i * per_batch : (i + 1) * per_batch]
        ids[: len(part)] = labels[: len(part)] = part
        mine = slice(index * rows, (index + 1) * rows)
        shape = (global_batch_size, sequence_length)
        yield {"input_ids": ids.reshape(shape)[mine], "labels": labels.reshape(shape)[mine]}


def batch_shard(sharding: Any, global_batch_size: int) -> tuple[int, int]:
    """Which part of each global batch this process has to read, given how batches lie on the devices.

    Args:
        sharding: of arrays [B, ...], from `parallel.batch_sharding`; None is one process.
        global_batch_size: B.

    Returns:
        (index, count), for `train_batches`. Processes that share rows, as those of one tensor-parallel group
        do, get the same part.

    Raises:
        ValueError: this process's devices hold rows that are not one part of the batch.
    """
    if sharding is None or jax.process_count() == 1:
        return 0, 1
    parts = sharding.addressable_devices_indices_map((global_batch_size,)).values()
    rows = sorted({row for part in parts if part for row in range(global_batch_size)[part[0]]})
    size = len(rows)
    if rows != list(range(rows[0], rows[0] + size)) or global_batch_size % size or rows[0] % size:
        raise ValueError(
            f"this process's devices hold rows {rows[0]} to {rows[-1]} with gaps: order the mesh so that "
            "each process holds one part of the batch"
        )
    return rows[0] // size, global_batch_size // size
