"""Masks against loops over queries and keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modelzoo.layers.masks import LOWEST, causal_bias, layer_head_mask, padding_bias, to_bias

FLOAT32_MIN = np.finfo(np.float32).min


def by_loop(mask, slots, num_keys):
    batch = 1 if mask is None else len(mask)
    bias = np.zeros((batch, 1, len(slots), num_keys), np.float32)
    for b in range(batch):
        for t, slot in enumerate(slots):
            for s in range(num_keys):
                if s > slot or (mask is not None and not mask[b][s]):
                    bias[b, 0, t, s] = FLOAT32_MIN
    return bias


MASKS = {
    "none": None,
    "all": [[1, 1, 1, 1, 1]] * 2,
    "left": [[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]],
    "right": [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]],
    "inside": [[1, 0, 1, 0, 1], [0, 1, 0, 1, 0]],
    "empty row": [[0, 0, 0, 0, 0], [1, 1, 1, 1, 1]],
}


@pytest.mark.parametrize("slots", [range(5), range(2, 5), [3]], ids=str)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("dtype", [np.int32, bool, np.float32])
def test_causal_bias(mask, slots, dtype):
    given = None if mask is None else jnp.asarray(np.array(mask, dtype))
    bias = causal_bias(given, jnp.asarray(slots), 5)
    assert bias.dtype == jnp.float32
    np.testing.assert_array_equal(bias, by_loop(mask, slots, 5))


def test_rows_may_stand_at_slots_of_their_own():
    bias = causal_bias(jnp.array([[1, 0, 1, 1]] * 2), jnp.array([[0, 1], [2, 3]]), 4)
    one, two = (by_loop([[1, 0, 1, 1]], slots, 4) for slots in ([0, 1], [2, 3]))
    np.testing.assert_array_equal(bias, np.concatenate([one, two]))


def test_any_number_but_zero_is_real():
    """As in transformers, where a mask of 2s hides nothing."""
    bias = causal_bias(jnp.array([[2, 0, -1]]), jnp.arange(3), 3)
    np.testing.assert_array_equal(bias, by_loop([[1, 0, 1]], range(3), 3))


def test_a_four_dimensional_mask_is_the_bias():
    """Nothing is added to it: what it lets through that lies ahead is seen."""
    given = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float16)
    bias = causal_bias(jnp.asarray(given), jnp.arange(4), 5)
    assert bias.dtype == jnp.float32
    np.testing.assert_array_equal(bias, given.astype(np.float32))


def test_a_query_that_sees_nothing_attends_evenly():
    """A left-padding position is not NaN, whatever its scores, and is spread over all keys as in transformers."""
    bias = causal_bias(jnp.zeros((1, 4), jnp.int32), jnp.arange(4), 4)
    scores = jnp.asarray(np.random.default_rng(0).normal(0, 30, (1, 1, 4, 4)), jnp.float32)
    np.testing.assert_array_equal(jax.nn.softmax(scores + bias, -1), np.full((1, 1, 4, 4), 0.25))


def test_to_bias():
    bias = to_bias(jnp.array([True, False]))
    np.testing.assert_array_equal(bias, np.array([0.0, FLOAT32_MIN], np.float32))
    assert np.isfinite(LOWEST)


def test_one_head_mask_serves_every_layer():
    np.testing.assert_array_equal(layer_head_mask(jnp.array([1.0, 0.5]), 3), [[1.0, 0.5]] * 3)
    each = np.arange(6.0, dtype=np.float32).reshape(3, 2)
    np.testing.assert_array_equal(layer_head_mask(jnp.asarray(each), 3), each)
    assert layer_head_mask(None, 3) is None


@pytest.mark.parametrize("shape", [(2, 4), (1, 4), (3, 4, 1), ()])
def test_a_head_mask_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"head_mask has shape .*: it is \[heads\] or \[3 layers, heads\]"):
        layer_head_mask(jnp.ones(shape), 3)


def test_padding_bias():
    assert padding_bias(None) is None
    mask = jnp.array([[1, 1, 0], [0, 1, 1]])
    np.testing.assert_array_equal(padding_bias(mask), jnp.where(mask == 1, 0.0, LOWEST)[:, None, None])
    by_query = jnp.arange(12).reshape(2, 2, 3) % 3
    np.testing.assert_array_equal(padding_bias(by_query), jnp.where(by_query > 0, 0.0, LOWEST)[:, None])
    bias = jnp.full((2, 1, 2, 3), 0.5, jnp.bfloat16)
    assert padding_bias(bias).dtype == jnp.float32
    np.testing.assert_array_equal(padding_bias(bias), jnp.full((2, 1, 2, 3), 0.5))
    with pytest.raises(ValueError, match=r"not \(3,\)"):
        padding_bias(jnp.ones(3))
