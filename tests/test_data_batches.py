"""train/data/batches.py: an order that follows from (seed, step), for any number of processes."""

from typing import Any

import jax
import numpy as np
import pytest

from train.data import batches as lib

TOKENS = np.arange(1000, dtype=np.uint16)
SIZES: Any = dict(sequence_length=10, global_batch_size=8)


def stream(seed=0, **changes):
    return iter(lib.train_batches(TOKENS, **{**SIZES, "seed": seed, **changes}))


def take(iterator, steps):
    return np.stack([next(iterator)["input_ids"] for _ in range(steps)])


def test_a_batch_is_windows_of_the_text():
    batch = next(stream())
    ids = batch["input_ids"]

    assert ids.shape == (8, 10)
    assert ids.dtype == np.int32
    assert (ids[:, 0] % 10 == 0).all()
    assert (np.diff(ids) == 1).all()
    np.testing.assert_array_equal(batch["labels"], ids)


def test_order_follows_from_the_seed():
    first, again, other = take(stream(0), 5), take(stream(0), 5), take(stream(1), 5)

    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_every_epoch_has_every_window_in_its_own_order():
    windows = take(stream(), 25)[..., 0].reshape(2, 100)  # 25 batches of 8 are two epochs of 100

    assert sorted(windows[0]) == sorted(windows[1]) == list(range(0, 1000, 10))
    assert (windows[0] != windows[1]).any()


@pytest.mark.parametrize("done", [0, 3, 20])
def test_a_restored_iterator_goes_on_where_it_stopped(done):
    whole = take(stream(), done + 3)
    before = stream()
    for _ in range(done):
        next(before)
    state = before.get_state()
    after = stream()
    after.set_state(state)

    assert state == {"next_index": done}
    np.testing.assert_array_equal(take(after, 3), whole[done:])


@pytest.mark.parametrize("count", [2, 4, 8])
def test_shards_make_up_the_same_global_batch(count):
    whole = take(stream(), 20)
    parts = [take(stream(shard=(index, count)), 20) for index in range(count)]

    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="1000 tokens, fewer than one window of sequence_length = 1001"):
        stream(sequence_length=1001)
    with pytest.raises(ValueError, match="global_batch_size = 8: 3 processes do not divide it"):
        stream(shard=(0, 3))


def test_validation_reads_every_token_once():
    tokens = np.arange(205, dtype=np.uint16)
    found = list(lib.validation_batches(tokens, **SIZES))
    labels = np.concatenate([batch["labels"].reshape(-1) for batch in found])

    assert len(found) == 3
    assert {batch["input_ids"].shape for batch in found} == {(8, 10)}
    np.testing.assert_array_equal(labels[labels != lib.IGNORED], tokens)
    assert len(list(lib.validation_batches(tokens, **SIZES, max_batches=2))) == 2
    assert list(lib.validation_batches(tokens[:0], **SIZES)) == []


def test_validation_shards_make_up_the_same_batches():
    tokens = np.arange(205, dtype=np.uint16)
    whole = list(lib.validation_batches(tokens, **SIZES))
    parts = [list(lib.validation_batches(tokens, **SIZES, shard=(index, 4))) for index in range(4)]

    for i, batch in enumerate(whole):
        for name in batch:
            np.testing.assert_array_equal(np.concatenate([part[i][name] for part in parts]), batch[name])


class FakeSharding:
    """Of the processes that a test plays: it holds these rows."""

    def __init__(self, *parts):
        self.parts = parts

    def addressable_devices_indices_map(self, shape):
        return {i: (part,) for i, part in enumerate(self.parts)}


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([slice(None)], (0, 1)),
        ([slice(8, 16), slice(8, 16)], (1, 4)),  # two devices of one tensor-parallel group
        ([slice(16, 24), slice(24, 32)], (1, 2)),
    ],
)
def test_the_part_of_a_process_follows_from_its_devices(monkeypatch, parts, expected):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    assert lib.batch_shard(FakeSharding(*parts), 32) == expected


def test_rows_with_gaps_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ValueError, match="rows 0 to 23 with gaps"):
        lib.batch_shard(FakeSharding(slice(0, 8), slice(16, 24)), 32)


def test_one_process_reads_everything():
    assert lib.batch_shard(None, 32) == (0, 1)
