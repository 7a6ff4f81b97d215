"""Tensors that are read when they are written: joined, cut, turned and taken apart."""

import numpy as np
import pytest

from modelzoo.convert.checkpoint import Tensor, find_misfit, joined, part_of_rows, stored, summed
from modelzoo.tensor_files import TensorRef, contiguous_strides

DATA = np.arange(96, dtype=np.float32).reshape(24, 4)


@pytest.fixture
def ref(tmp_path):
    (tmp_path / "data").write_bytes(b"12345678" + DATA.tobytes())
    return TensorRef(tmp_path / "data", 8, DATA.dtype, DATA.shape, contiguous_strides(DATA.shape))


def test_views_are_read_when_asked(ref):
    tensor = stored("w", ref)
    assert (tensor.shape, tensor.nbytes) == ((24, 4), 384)
    for have, want in [
        (tensor, DATA),
        (tensor.transposed, DATA.T),
        (tensor.reshaped((4, 24)), DATA.reshape(4, 24)),
        (tensor.first_rows(5), DATA[:5]),
        (tensor.first_rows(99), DATA),
        (joined([tensor, tensor.first_rows(2)], 0), np.concatenate([DATA, DATA[:2]])),
        (joined([tensor, tensor], 1).transposed, np.concatenate([DATA, DATA], 1).T),
    ]:
        assert have.shape == want.shape
        np.testing.assert_array_equal(have.read(), want)


@pytest.mark.parametrize("axis", range(3))
def test_part_of_rows(ref, axis):
    dims = (2, 3, 4)
    for index in range(dims[axis]):
        part = part_of_rows("w", ref, dims, axis, index)
        want = DATA.reshape(*dims, 4).take(index, axis).reshape(-1, 4)
        assert part.shape == want.shape
        np.testing.assert_array_equal(part.read(), want)


def test_a_sum_is_not_rounded_on_the_way():
    halves = [np.float16(2048), np.float16(1), np.float16(1)]
    parts = [Tensor("b", (1,), half.dtype, lambda half=half: np.array([half])) for half in halves]
    total = summed(parts)
    assert total.read().astype(total.dtype) == 2050  # in float16 2048 + 1 is 2048


def test_parts_that_do_not_fit(ref):
    tensor = stored("w", ref)
    with pytest.raises(ValueError, match=r"the parts of w do not fit together: \[24, 4\] float32, \[4, 24\]"):
        joined([tensor, tensor.transposed], 0)


def test_misfit(ref):
    tensor = stored("w", ref)
    assert find_misfit({"w": (24, 4)}, {"w": tensor}) is None
    line = find_misfit({"w": (24, 5), "v": (1,)}, {"w": tensor, "u": tensor})
    assert line is not None
    assert "1 missing, such as v; 1 unexpected, such as u" in line
    assert "w is [24, 4], where the config makes it [24, 5]" in line
