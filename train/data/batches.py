"""Batches of rows: an order that is a pure function of (seed, step), whatever the number of processes."""

import hashlib
from collections.abc import Iterator
from typing import Any, Protocol

import grain
import jax
import numpy as np

from train.data.packing import labels_of, pack
from train.data.rampup import BatchSizes
from train.data.shards import Split
from train.data.tokens import TokenData

Batch = dict[str, np.ndarray]

IGNORED = -100
"""The label of a position that no loss counts."""

PREFETCHED = 8
"""Batches that are made ahead, in a thread of their own, while a step runs."""


class BatchSource(Protocol):
    """What training reads: batches without end, and a place among them that a checkpoint keeps.

    The global batch of a step follows from the seed and the step's number, and this process gets its rows of it; row r
    of step s is the same whatever the number of processes. A wrapper that changes batches (masks words, say) draws from
    `np.random.default_rng((seed, step, row))` and stays so.

    Attributes:
        step: number of the batch that `next` gives, from 0.
        rows: of that global batch, those that this process gets.
    """

    step: int

    @property
    def rows(self) -> range: ...

    def rows_of(self, step: int) -> range:
        """Of a step's global batch, those that this process gets."""
        ...

    def __next__(self) -> Batch:
        """This process's rows of the next global batch, [rows, ...] each."""
        ...

    def get_state(self) -> dict[str, Any]:
        """The place, as JSON: what `next` has given counts, not what is read ahead."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a place that `get_state` told."""
        ...


class _Windows(grain.sources.RandomAccessDataSource):
    """Documents laid end to end and cut into windows of one length; what is left at the end is dropped."""

    def __init__(self, split: Split, length: int):
        self._split, self._length = split, length

    def __len__(self) -> int:
        return self._split.num_tokens // self._length

    def __getitem__(self, index: int) -> Batch:
        ids = self._split.read(index * self._length, (index + 1) * self._length)
        return {"input_ids": ids, "labels": ids}

    def __repr__(self) -> str:
        return f"{len(self)} windows of {self._length} tokens"


class _HeldOutWindows(_Windows):
    """The same with the last one filled up."""

    def __len__(self) -> int:
        return -(-self._split.num_tokens // self._length)

    def __getitem__(self, index: int) -> Batch:
        part = self._split.read(index * self._length, (index + 1) * self._length)
        filled = self._length - len(part)
        return {
            "input_ids": np.pad(part, (0, filled)),
            "labels": np.pad(part, (0, filled), constant_values=IGNORED),
        }


class _Packed(grain.sources.RandomAccessDataSource):
    """Rows of whole documents, with their segments."""

    def __init__(self, split: Split, length: int, padding_id: int):
        self._rows = pack(split, length, padding_id)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Batch:
        row = self._rows[index]
        return {
            "input_ids": row["input_ids"],
            "labels": labels_of(row["input_ids"], row["segment_ids"], IGNORED),
            "segment_ids": row["segment_ids"],
        }

    def __repr__(self) -> str:
        return repr(self._rows)


def _rows(data: TokenData, split: Split, length: int, windows: type[_Windows]) -> Any:
    """Random access to the rows of one part of a mixture."""
    if data.packing == "documents":
        return _Packed(split, length, data.manifest["end_of_text_id"])
    return windows(split, length)


class TextBatches:
    """A `BatchSource` of text; made by `train_batches`."""

    def __init__(self, dataset: grain.IterDataset, sizes: BatchSizes, shard: tuple[int, int]):
        self._batches = iter(dataset)
        self._sizes, self._shard, self.step = sizes, shard, 0

    @property
    def rows(self) -> range:
        """Of the next global batch, those that this process gets."""
        return self.rows_of(self.step)

    def rows_of(self, step: int) -> range:
        """Of a step's global batch, those that this process gets."""
        return self._sizes.part(step, self._shard)

    def __iter__(self) -> "TextBatches":
        return self

    def __next__(self) -> Batch:
        """This process's rows of the next global batch."""
        batch = next(self._batches)
        self.step += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """{"step": steps taken}: all that there is to keep, whatever the number of processes."""
        return {"step": self.step}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a step at once, without reading what lies before it."""
        self._batches.set_state({"next_index": state["step"]})
        self.step = int(state["step"])


def train_batches(
    data: TokenData,
    *,
    sequence_length: int,
    global_batch_size: int,
    seed: int,
    shard: tuple[int, int] = (0, 1),
    rampup: tuple[int, int, int] | None = None,
) -> TextBatches:
    """An endless stream of shuffled rows; every epoch of every part has its own order.

    Args:
        data: from `prepare_tokens`; its mixture says how often each part's rows come, its packing what a row is.
        sequence_length: T.
        global_batch_size: B, over all processes.
        seed: of the order.
        shard: (index, count): this process reads piece `index` of `count` equal pieces of each global batch.
        rampup: how the first batches grow to B (`rampup.BatchSizes`); the rows come in the same order.

    Returns:
        A `BatchSource` of "input_ids" and "labels", int32 [B / count, T], and with packing='documents' "segment_ids"
        int32 [B / count, T], from which a model takes what each token sees and where it stands. Labels equal the ids,
        since the loss shifts, but for those that nothing before them in their document predicts, and for padding.

    Raises:
        ValueError: fewer tokens than one row, or a batch that the shards do not divide.
    """
    index, count = shard
    sizes = BatchSizes(global_batch_size, rampup)
    sizes.check_shards(count)
    parts = []
    for i, split in enumerate(data.train):
        rows = _rows(data, split, sequence_length, _Windows)
        if len(rows) == 0:
            raise ValueError(
                f"the training text{f' of part {i} of data.mixture' if i else ''} has {split.num_tokens} tokens, fewer "
                f"than one row of sequence_length = {sequence_length}: give more text or a shorter sequence_length"
            )
        parts.append(grain.MapDataset.source(rows).seed(_part_seed(seed, i)).shuffle().repeat())
    rows = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, list(data.weights))
    # Batches of one shard's size, of which this process takes every count-th: so the global batch of a step
    # is the same rows in the same order for any count.
    if rampup is None:
        batches = rows.batch(global_batch_size // count, drop_remainder=True).slice(slice(index, None, count))
    else:
        batches = grain.MapDataset.range(2**62).map(lambda step: _stacked(rows, sizes, int(step), shard))
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCHED)
    return TextBatches(batches.to_iter_dataset(options), sizes, shard)


def _stacked(rows: Any, sizes: BatchSizes, step: int, shard: tuple[int, int]) -> Batch:
    """A process's rows of a step's batch, from random access to all rows in order."""
    first = sizes.before(step)
    chosen = [rows[first + i] for i in sizes.part(step, shard)]
    return {name: np.stack([row[name] for row in chosen]) for name in chosen[0]}


def _part_seed(seed: int, part: int) -> int:
    """Parts of a mixture have orders of their own, even where they hold the same text."""
    return (
        seed if part == 0 else int.from_bytes(hashlib.sha256(f"{seed} {part}".encode()).digest()[:4], "big")
    )


def validation_batches(
    data: TokenData,
    *,
    sequence_length: int,
    global_batch_size: int,
    max_batches: int | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """The held-out text in order, once. The last batch is filled with positions that no loss counts.

    Args:
        data, sequence_length, global_batch_size, shard: as for `train_batches`.
        max_batches: stop after this many, in which a mixture's parts have their shares; None reads all.
    """
    index, count = shard
    size = global_batch_size // count
    parts = [_rows(data, split, sequence_length, _HeldOutWindows) for split in data.validation]
    which = [(part, row) for part, rows in enumerate(parts) for row in range(len(rows))]
    if max_batches is not None and len(which) > max_batches * global_batch_size:
        most = [int(weight * max_batches * global_batch_size) for weight in data.weights]
        which = [(part, row) for part, row in which if len(parts) == 1 or row < most[part]]
        which = which[: max_batches * global_batch_size]
    for start in range(0, len(which), global_batch_size):
        mine = which[start : start + global_batch_size][index * size : (index + 1) * size]
        rows = [parts[part][row] for part, row in mine]
        rows += [_filling(parts[which[0][0]][0])] * (size - len(rows))
        yield {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _filling(row: Batch) -> Batch:
    """A row that no loss counts."""
    return {name: np.full_like(value, IGNORED if name == "labels" else 0) for name, value in row.items()}


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
