"""The settings of fine-tuning."""

import pytest

from train.tasks.settings import Task


def test_lengths_rise_to_that_of_the_run():
    task = Task(train_file="a.jsonl", buckets=(64, 16, 200))
    assert task.lengths(128) == (16, 64, 128)
    assert Task(train_file="a.jsonl").lengths(128) == (128,)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        (dict(eval_fraction=1.0), "task.eval_fraction = 1.0: a share lies between"),
        (dict(target_length=0), "task.target_length = 0: it is at least 1"),
        (dict(stride=-1), "task.stride = -1: it is at least 0"),
        (dict(buckets=(0, 16)), "task.buckets"),
        (dict(labels=("a", "a")), "a class is named twice"),
    ],
)
def test_values_that_do_not_fit(fields, error):
    with pytest.raises(ValueError, match=error):
        Task(train_file="a.jsonl", **fields)
