"""Rows in an order that follows from (seed, step), whatever the number of processes."""

import numpy as np
import pytest

from train.tasks.batches import RowBatches, padded_length
from train.tasks.head import Row

ROWS = [Row(i, [i] * (1 + i % 9), [], {"labels": i}) for i in range(20)]


def collate(rows, length):
    return {"labels": np.array([row.labels["labels"] for row in rows]), "length": np.full(len(rows), length)}


def batches(shard=(0, 1), seed=0, lengths=(4, 16), size=8):
    return RowBatches(ROWS, collate, lengths=lengths, batch_size=size, seed=seed, shard=shard)


def test_every_row_comes_once_in_each_turn_in_a_new_order():
    source = batches(size=10)
    turns = [[*next(source)["labels"], *next(source)["labels"]] for _ in range(2)]
    assert [sorted(turn) for turn in turns] == [list(range(20))] * 2
    assert turns[0] != turns[1]
    assert turns[0] != [*next(batches(seed=1))["labels"]]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_global_batch_does_not_depend_on_the_number_of_processes(count):
    whole, parts = batches(), [batches((i, count)) for i in range(count)]
    for _ in range(5):
        one, pieces = next(whole), [next(part) for part in parts]
        np.testing.assert_array_equal(one["labels"], np.concatenate([piece["labels"] for piece in pieces]))
        assert {*one["length"]} == {length for piece in pieces for length in piece["length"]}
    assert [row for part in parts for row in part.rows] == list(range(8))


def test_a_state_goes_on_where_it_was():
    source = batches()
    next(source)
    state = source.get_state()
    assert state == {"step": source.step} == {"step": 1}
    expected = [next(source)["labels"].tolist() for _ in range(3)]
    again = batches()
    again.set_state(state)
    assert [next(again)["labels"].tolist() for _ in range(3)] == expected


def test_a_batch_takes_the_first_length_that_holds_it():
    assert padded_length(ROWS[:4], (4, 16)) == 4
    assert padded_length(ROWS[:5], (4, 16)) == 16
    assert padded_length([Row(0, [[1], [1, 2, 3]], [], {})], (2, 3)) == 3


def test_what_does_not_divide():
    with pytest.raises(ValueError, match="global_batch_size = 8: 3 processes do not divide it"):
        batches((0, 3))
    with pytest.raises(ValueError, match="no example to train on"):
        RowBatches([], collate, lengths=(4,), batch_size=2, seed=0)
