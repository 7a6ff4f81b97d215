"""Batch sizes that grow: Megatron's rule, and places that follow from the step alone."""

import numpy as np
import pytest

from tests.test_data_batches import SIZES, TOKENS, data_of, split
from tests.test_tasks_batches import ROWS, collate
from train.data.batches import train_batches
from train.data.rampup import BatchSizes
from train.tasks.batches import RowBatches


def megatron(start, increment, samples, size, steps):
    """The sizes by Megatron's own way of counting, step by step."""
    per_increment, seen, sizes = samples / ((size - start) // increment), 0, []
    for _ in range(steps):
        sizes.append(size if seen > samples else start + int(seen / per_increment) * increment)
        seen += sizes[-1]
    return sizes


@pytest.mark.parametrize(
    "rampup", [(4, 4, 100), (2, 2, 64), (8, 8, 8), (4, 12, 1000), (12, 4, 1), (1, 5, 77)]
)
def test_sizes_are_those_of_megatron(rampup):
    sizes = BatchSizes(16, rampup)
    found = [sizes.of(step) for step in range(200)]
    assert found == megatron(*rampup, 16, 200)
    assert [sizes.before(step) for step in range(200)] == [sum(found[:step]) for step in range(200)]


def test_without_rampup_and_parts():
    sizes = BatchSizes(12)
    assert (sizes.of(0), sizes.of(10**9), sizes.before(7)) == (12, 12, 84)
    assert sizes.part(3, (1, 3)) == range(4, 8)
    sizes = BatchSizes(12, (4, 4, 8))
    assert [sizes.part(step, (1, 2)) for step in range(3)] == [range(2, 4), range(4, 8), range(6, 12)]
    with pytest.raises(ValueError, match="global_batch_size = 4: 3 processes"):
        sizes.check_shards(3)


@pytest.mark.parametrize(
    ("rampup", "message"),
    [
        ((0, 4, 8), r"train\.batch_rampup = \(0, 4, 8\): .* at least 1"),
        ((4, 5, 8), "steps of 5 do not lead from 4 to train.global_batch_size = 16"),
        ((16, 4, 8), "do not lead"),
    ],
)
def test_sizes_that_lead_nowhere(rampup, message):
    with pytest.raises(ValueError, match=message):
        BatchSizes(16, rampup)


RAMPUP = (2, 2, 18)


def sources(tmp_path):
    """shard, rampup -> a source, of text and of labelled rows, and what it calls its rows."""
    data = data_of(split(tmp_path / "a", np.split(TOKENS, range(7, 1000, 7))))

    def text(shard=(0, 1), rampup=None):
        return train_batches(data, **SIZES, seed=3, shard=shard, rampup=rampup)

    def rows(shard=(0, 1), rampup=None):
        return RowBatches(ROWS, collate, lengths=(16,), batch_size=8, seed=3, shard=shard, rampup=rampup)

    return (text, "input_ids"), (rows, "labels")


def test_rows_come_in_the_order_that_they_would_have_come_in(tmp_path):
    for make, name in sources(tmp_path):
        whole, grown = make(), make(rampup=RAMPUP)
        batches = [next(grown)[name] for _ in range(8)]
        assert [len(batch) for batch in batches] == [2, 2, 2, 4, 4, 6, 8, 8]
        flat = np.concatenate([next(whole)[name] for _ in range(5)])
        np.testing.assert_array_equal(np.concatenate(batches), flat[:36])
        parts = [make((i, 2), RAMPUP) for i in range(2)]
        for batch in batches:
            assert [row for part in parts for row in part.rows] == list(range(len(batch)))
            np.testing.assert_array_equal(np.concatenate([next(part)[name] for part in parts]), batch)
        again = make(rampup=RAMPUP)
        again.set_state({"step": 4})
        np.testing.assert_array_equal(next(again)[name], batches[4])
