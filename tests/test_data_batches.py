"""train/data/batches.py: an order that follows from (seed, step), for any number of processes."""

import time
from typing import Any

import jax
import numpy as np
import pytest

from train.data import batches as lib
from train.data.shards import ShardWriter, Split
from train.data.tokens import TokenData

TOKENS = np.arange(1000)
SIZES: Any = dict(sequence_length=10, global_batch_size=8)


def split(path, documents):
    writer = ShardWriter(path, np.dtype(np.uint16))
    for document in documents:
        writer.add(np.asarray(document))
    writer.finish()
    return Split([path], np.dtype(np.uint16))


def data_of(*splits, weights=None, packing="concatenate"):
    weights = weights or (1 / len(splits),) * len(splits)
    return TokenData(splits, splits, weights, None, {"end_of_text_id": 0}, False, packing)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """1000 tokens in documents of 7, and in the last of 6."""
    return data_of(split(tmp_path_factory.mktemp("data") / "a", np.split(TOKENS, range(7, 1000, 7))))


@pytest.fixture
def stream(data):
    def make(seed=0, data=data, **changes):
        return lib.train_batches(data, **{**SIZES, "seed": seed, **changes})

    return make


def take(iterator, steps):
    return np.stack([next(iterator)["input_ids"] for _ in range(steps)])


def test_a_batch_is_windows_of_the_text(stream):
    batch = next(stream())
    ids = batch["input_ids"]

    assert ids.shape == (8, 10)
    assert ids.dtype == np.int32
    assert (ids[:, 0] % 10 == 0).all()
    assert (np.diff(ids) == 1).all()
    np.testing.assert_array_equal(batch["labels"], ids)


def test_order_follows_from_the_seed(stream):
    first, again, other = take(stream(0), 5), take(stream(0), 5), take(stream(1), 5)

    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_every_epoch_has_every_window_in_its_own_order(stream):
    windows = take(stream(), 25)[..., 0].reshape(2, 100)  # 25 batches of 8 are two epochs of 100

    assert sorted(windows[0]) == sorted(windows[1]) == list(range(0, 1000, 10))
    assert (windows[0] != windows[1]).any()


@pytest.mark.parametrize("done", [0, 3, 20])
def test_a_restored_iterator_goes_on_where_it_stopped(stream, done):
    whole = take(stream(), done + 3)
    before = stream()
    for _ in range(done):
        next(before)
    state = before.get_state()
    after = stream()
    after.set_state(state)

    assert state == {"step": done}
    assert after.step == done
    assert after.rows == range(8)
    np.testing.assert_array_equal(take(after, 3), whole[done:])


@pytest.mark.parametrize("count", [2, 4, 8])
def test_shards_make_up_the_same_global_batch(stream, count):
    whole = take(stream(), 20)
    parts = [take(stream(shard=(index, count)), 20) for index in range(count)]

    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_what_does_not_fit_is_named(stream):
    with pytest.raises(ValueError, match="1000 tokens, fewer than one row of sequence_length = 1001"):
        stream(sequence_length=1001)
    with pytest.raises(ValueError, match="global_batch_size = 8: 3 processes do not divide it"):
        stream(shard=(0, 3))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return data_of(split(tmp_path_factory.mktemp("held") / "a", np.split(np.arange(205), [50, 51, 120])))


def test_validation_reads_every_token_once(held_out, tmp_path):
    found = list(lib.validation_batches(held_out, **SIZES))
    labels = np.concatenate([batch["labels"].reshape(-1) for batch in found])

    assert len(found) == 3
    assert {batch["input_ids"].shape for batch in found} == {(8, 10)}
    np.testing.assert_array_equal(labels[labels != lib.IGNORED], np.arange(205))
    assert len(list(lib.validation_batches(held_out, **SIZES, max_batches=2))) == 2
    assert list(lib.validation_batches(data_of(split(tmp_path / "none", [])), **SIZES)) == []


@pytest.mark.parametrize("packing", ["concatenate", "documents"])
def test_validation_shards_make_up_the_same_batches(held_out, packing):
    held_out = data_of(*held_out.validation, packing=packing)
    whole = list(lib.validation_batches(held_out, **SIZES))
    parts = [list(lib.validation_batches(held_out, **SIZES, shard=(index, 4))) for index in range(4)]

    for i, batch in enumerate(whole):
        for name in batch:
            np.testing.assert_array_equal(np.concatenate([part[i][name] for part in parts]), batch[name])


def test_packed_rows_hold_whole_documents(data):
    packed = data_of(*data.train, packing="documents")
    seen, source = [], lib.train_batches(packed, **dict(SIZES, sequence_length=15), seed=0)
    for _ in range(9):  # 72 rows of two documents, of 143 in all: an epoch and a little
        batch = next(source)
        for ids, labels, segments in zip(
            batch["input_ids"], batch["labels"], batch["segment_ids"], strict=True
        ):
            for segment in range(1, segments.max() + 1):
                document = ids[segments == segment]
                np.testing.assert_array_equal(np.diff(document), 1)
                np.testing.assert_array_equal(labels[segments == segment], [lib.IGNORED, *document[1:]])
                seen.append(int(document[0]))
            assert (labels[segments == 0] == lib.IGNORED).all()
            assert (ids[segments == 0] == 0).all()

    assert set(seen) == set(range(0, 1000, 7))


def test_a_mixture_has_its_shares_and_an_order_of_its_own(data, tmp_path, stream):
    other = split(tmp_path / "b", [np.arange(2000, 2400)])
    mixed = data_of(*data.train, other, weights=(0.75, 0.25))
    whole = take(stream(data=mixed), 200)
    parts = [take(stream(data=mixed, shard=(index, 2)), 200) for index in range(2)]
    late = stream(data=mixed)
    late.set_state({"step": 150})

    assert (whole[..., 0] >= 2000).mean() == pytest.approx(0.25, abs=0.01)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    np.testing.assert_array_equal(take(late, 50), whole[150:])
    (rows,) = np.nonzero(whole[..., 0].ravel() >= 2000)
    epochs = whole[..., 0].ravel()[rows][:80].reshape(2, 40)
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(2000, 2400, 10))
    assert (epochs[0] != epochs[1]).any()
    found = list(lib.validation_batches(mixed, **SIZES, max_batches=4))
    assert sum((batch["labels"][:, 0] >= 2000).sum() for batch in found) == 8


def test_what_is_read_ahead_is_not_counted(stream):
    source = stream()
    take(source, 3)
    time.sleep(0.2)

    assert source.get_state() == {"step": 3}


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
