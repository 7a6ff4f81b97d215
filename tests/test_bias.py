"""The parts of attention's bias: all of it, and any part of it, against masks written out."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from modelzoo.layers import bias
from modelzoo.layers.bias import as_bias, hides_first_key
from modelzoo.layers.masks import LOWEST
from modelzoo.layers.position import alibi_bias

Bias: Any = bias.Bias  # a dataclass whose dense() is an array wherever these tests look
MASK = jnp.array([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
SLOTS = jnp.arange(6, dtype=jnp.int32)
ALIBI = alibi_bias(MASK, 2)


def visible(causal, mask):
    seen = np.tril(np.ones((6, 6), bool)) if causal else np.ones((6, 6), bool)
    return np.broadcast_to(seen, (2, 1, 6, 6)) & np.asarray(mask, bool)[:, None, None, :]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("alibi", [None, ALIBI])
def test_dense_is_what_is_hidden_and_what_positions_add(causal, alibi):
    expected = np.where(visible(causal, MASK), np.float32(0), np.float32(LOWEST))
    if alibi is not None:
        expected = expected + np.asarray(alibi)
    found = Bias(MASK, SLOTS if causal else None, alibi).dense(6)
    found, expected = np.broadcast_arrays(found, expected)
    np.testing.assert_array_equal(found, expected)


def test_nothing_is_added_where_there_is_nothing():
    assert as_bias(None).dense(6) is None
    np.testing.assert_array_equal(Bias(alibi=ALIBI).dense(6), ALIBI)


def test_a_part_of_the_keys():
    whole = Bias(MASK, SLOTS, ALIBI)
    part = whole.of_keys(jnp.int32(2), 3).dense(3)
    np.testing.assert_array_equal(part, whole.dense(6)[..., 2:5])
    array: Any = as_bias(jnp.arange(36.0).reshape(6, 6))
    np.testing.assert_array_equal(
        array.of_keys(jnp.int32(1), 2).dense(2)[0, 0], np.arange(36.0).reshape(6, 6)[:, 1:3]
    )


def test_segments_hide_each_other():
    segments = jnp.array([[1, 1, 2, 2, 2, 0], [1, 2, 2, 3, 3, 3]])
    whole = Bias(MASK, SLOTS, None, segments, segments)
    same = np.asarray(segments)[:, :, None] == np.asarray(segments)[:, None]
    seen = visible(True, MASK) & same[:, None]

    np.testing.assert_array_equal(whole.dense(6) == 0, seen)
    part = whole.of_queries(jnp.int32(1), 4).replace(query_slots=SLOTS[1:5]).of_keys(jnp.int32(2), 3)
    np.testing.assert_array_equal(part.dense(3) == 0, seen[:, :, 1:5, 2:5])
    np.testing.assert_array_equal(Bias(None, None, None, segments, segments).dense(6) == 0, same[:, None])
    assert bool(hides_first_key(whole))
    assert not bool(hides_first_key(Bias(None, SLOTS, None, segments, segments)))


def test_what_decides():
    assert Bias(MASK, SLOTS).is_causal
    assert not Bias(MASK).is_causal
    assert not Bias(jnp.zeros((2, 1, 6, 6)), SLOTS).is_causal
    assert bool(hides_first_key(Bias(MASK, SLOTS)))
    assert not bool(hides_first_key(Bias(MASK[:1], SLOTS)))
    assert not bool(hides_first_key(Bias(None, SLOTS)))
