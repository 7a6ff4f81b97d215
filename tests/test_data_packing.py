"""train/data/packing.py: which documents share a row."""

import numpy as np
import pytest

from train.data import packing


def rows_of(sizes, length):
    sizes = np.asarray(sizes)
    row = packing.best_fit(sizes, length)
    return [sizes[row == i].tolist() for i in range(row.max() + 1)]


def one_by_one(sizes, length):
    """Best-fit decreasing as it is written in books."""
    rows = []
    for size in sorted(sizes, reverse=True):
        fits = [row for row in rows if sum(row) + size <= length]
        if fits:
            max(fits, key=sum).append(size)
        else:
            rows.append([size])
    return rows


@pytest.mark.parametrize(("seed", "length"), [(0, 10), (1, 100), (2, 1000)])
def test_is_best_fit_decreasing(seed, length):
    sizes = np.random.default_rng(seed).integers(1, length + 1, 400)
    found = rows_of(sizes, length)

    assert sorted(size for row in found for size in row) == sorted(sizes.tolist())
    assert max(map(sum, found)) <= length
    assert sorted(map(sum, found)) == sorted(map(sum, one_by_one(sizes.tolist(), length)))


def test_short_documents_leave_hardly_any_padding():
    sizes = np.random.default_rng(0).geometric(1 / 300, 20_000).clip(1, 2048)
    row = packing.best_fit(sizes, 2048)

    assert sizes.sum() / ((row.max() + 1) * 2048) > 0.999


def test_pieces_of_long_documents():
    document, start, size = packing._cut(np.array([3, 25, 10]), 10)

    assert document.tolist() == [0, 1, 1, 1, 2]
    assert start.tolist() == [0, 0, 10, 20, 0]
    assert size.tolist() == [3, 10, 10, 5, 10]


def test_labels_never_cross_documents():
    ids, segments = np.array([5, 6, 7, 8, 0]), np.array([1, 1, 2, 2, 0])

    assert packing.labels_of(ids, segments, -100).tolist() == [-100, 6, -100, 8, -100]
