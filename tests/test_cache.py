"""The key/value cache as a data structure: slots, what they hold, and which are real."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import modelzoo
from modelzoo import registry
from modelzoo.layers.cache import LayerCache, begin, init_cache
from tests.zoo import TINY, quick_jit, random_params


def fresh(batch=2, slots=6):
    return init_cache(3, batch, slots, 4, 5, jnp.float32)


def marks(cache):
    return np.asarray(cache.mask).astype(int).tolist()


def test_an_empty_cache():
    cache = init_cache(3, 2, 6, 4, 5, jnp.bfloat16)
    assert cache.layers.key.shape == cache.layers.value.shape == (3, 2, 4, 6, 5)
    assert cache.layers.key.dtype == jnp.bfloat16
    assert (cache.index.dtype, int(cache.index)) == (jnp.int32, 0)
    assert cache.mask.dtype == bool
    assert not cache.mask.any()


def test_no_buffer_stands_under_two_names():
    """Donating a cache that holds one buffer twice is an error; every leaf must be its own."""
    cache = jax.block_until_ready(fresh())
    moved = jax.jit(lambda c: jax.tree.map(lambda x: x, c), donate_argnums=0)(cache)
    assert jax.tree.structure(moved) == jax.tree.structure(fresh())
    assert all(leaf.is_deleted() for leaf in (cache.layers.key, cache.layers.value))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("index", [0, 2, 3])
def test_write(index, batch):
    random = np.random.default_rng(0)
    key, value = random.normal(size=(2, batch, 4, 6, 5)).astype(np.float32)
    new_key, new_value = random.normal(size=(2, batch, 4, 3, 5)).astype(np.float32)
    cache = LayerCache(jnp.asarray(key), jnp.asarray(value))
    written = jax.jit(LayerCache.write)(cache, jnp.asarray(new_key), jnp.asarray(new_value), jnp.int32(index))
    key[:, :, index : index + 3], value[:, :, index : index + 3] = new_key, new_value
    np.testing.assert_array_equal(written.key, key)
    np.testing.assert_array_equal(written.value, value)


@pytest.mark.parametrize("indices", [[1], [3, 0, 5]])
def test_every_row_writes_at_an_index_of_its_own(indices):
    random = np.random.default_rng(0)
    key, value = random.normal(size=(2, len(indices), 4, 6, 5)).astype(np.float32)
    new_key, new_value = random.normal(size=(2, len(indices), 4, 2, 5)).astype(np.float32)
    cache = LayerCache(jnp.asarray(key), jnp.asarray(value))
    index = jnp.asarray(indices, jnp.int32)
    written = jax.jit(LayerCache.write)(cache, jnp.asarray(new_key), jnp.asarray(new_value), index)
    for row, first in enumerate(indices):
        first = min(first, 4)  # of what would pass the last slot
        key[row, :, first : first + 2] = new_key[row]
        value[row, :, first : first + 2] = new_value[row]
    np.testing.assert_array_equal(written.key, key)
    np.testing.assert_array_equal(written.value, value)


def test_every_row_admits_and_begins_at_an_index_of_its_own():
    cache = fresh().replace(index=jnp.array([3, 0], jnp.int32))
    slots, mask, num_keys, after = begin(cache, jnp.array([[1, 1], [1, 0]]), 2)
    assert after is not None
    assert slots.tolist() == [[3, 4], [0, 1]]
    assert num_keys == 6
    assert marks(after) == np.asarray(mask).tolist() == [[0, 0, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0]]
    assert after.advance(after.layers, 2).index.tolist() == [5, 2]


DECODERS = {
    cls.__name__: TINY[model_type]
    for model_type, family in registry.FAMILIES.items()
    for cls in family.classes
    if cls.task == "causal_lm"
}
RELATIVE = dict(position_embedding_type="relative_key_query")


@pytest.mark.parametrize("name", DECODERS)
def test_rows_at_slots_of_their_own_compute_what_each_does_alone(name):
    """Two rows read 5 and 2 tokens padded to 5, then two more each, at their own places."""
    config = modelzoo.get_config(DECODERS[name])
    if hasattr(config, "is_decoder"):
        config = dataclasses.replace(config, is_decoder=True, **RELATIVE if "Megatron" in name else {})
    model = getattr(modelzoo, name)(config)
    params = random_params(model, scale=0.1)
    ids = np.random.default_rng(1).integers(3, model.config.vocab_size, (2, 7)).astype(np.int32)
    lengths = np.array([5, 2], np.int32)

    @quick_jit
    def alone(ids):
        return model.apply({"params": params}, input_ids=ids).logits

    @quick_jit
    def read(ids, mask, cache):
        out = model.apply({"params": params}, input_ids=ids, attention_mask=mask, cache=cache)
        return out.logits, out.cache

    cache = model.init_cache(2, 9).replace(index=jnp.zeros(2, jnp.int32))
    first = np.stack([ids[0, :5], np.r_[ids[1, :2], [7, 8, 9]]]).astype(np.int32)
    logits, cache = read(first, np.arange(5) < lengths[:, None], cache)
    found = [[np.asarray(logits[row, : lengths[row]])] for row in range(2)]
    cache = cache.replace(index=jnp.asarray(lengths))
    for step in range(2):
        next_ids = ids[np.arange(2), lengths + step][:, None]
        logits, cache = read(next_ids, np.ones((2, 1), bool), cache)
        for row in range(2):
            found[row].append(np.asarray(logits[row]))
    whole = np.asarray(alone(ids))
    for row in range(2):
        np.testing.assert_allclose(
            np.concatenate(found[row]), whole[row, : lengths[row] + 2], atol=2e-6, rtol=0
        )


def test_write_converts_to_the_caches_dtype():
    slots, new = jnp.zeros((1, 1, 2, 1), jnp.bfloat16), jnp.full((1, 1, 1, 1), 1.001)
    written = LayerCache(slots, slots).write(new, new, jnp.int32(1))
    assert written.key.dtype == jnp.bfloat16
    assert written.key[0, 0, 1, 0] == 1.0


@pytest.mark.parametrize("shape", [(1, 4, 3, 5), (2, 3, 3, 5), (2, 4, 3, 4)])
def test_keys_of_another_batch_or_other_heads_are_refused(shape):
    """XLA would write the corner that fits."""
    slots, new = jnp.zeros((2, 4, 6, 5)), jnp.ones(shape)
    with pytest.raises(
        ValueError, match=r"the cache holds \[batch, heads, width\] = \[2, 4, 5\], but the new keys"
    ):
        LayerCache(slots, slots).write(new, new, jnp.int32(0))


def test_admit_marks_the_next_slots():
    cache = fresh().admit(None, 2)
    assert marks(cache) == [[1, 1, 0, 0, 0, 0]] * 2
    cache = cache.advance(cache.layers, 2)
    assert int(cache.index) == 2
    cache = cache.admit(jnp.array([[1, 0, 1], [0, 1, 2]]), 3)
    assert marks(cache) == [[1, 1, 1, 0, 1, 0], [1, 1, 0, 1, 1, 0]]
    assert int(cache.index) == 2  # marks alone move nothing


def test_admit_a_mask_of_all_slots_so_far():
    """transformers' callers pass the mask of the whole sequence at every step; it says anew what earlier slots are."""
    cache = fresh().admit(None, 3)
    cache = cache.advance(cache.layers, 3).admit(jnp.array([[0, 1, 1, 1], [0, 0, 1, 1]]), 1)
    assert marks(cache) == [[0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0]]


def test_admit_one_row_for_all():
    assert marks(fresh().admit(jnp.array([[0, 1]]), 2)) == [[0, 1, 0, 0, 0, 0]] * 2
    with pytest.raises(ValueError, match="broadcast"):
        fresh().admit(jnp.ones((3, 2)), 2)


def test_admit_under_jit_with_a_traced_index():
    cache = fresh()
    cache = cache.advance(cache.layers, 4)
    admitted = jax.jit(lambda c, m: c.admit(m, 2))(cache, jnp.array([[1, 0], [0, 1]]))
    assert marks(admitted) == [[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]]


@pytest.mark.parametrize("length", [1, 7])
def test_a_mask_of_another_length_is_refused(length):
    with pytest.raises(
        ValueError, match=rf"attention_mask has length {length}: .* new tokens \(2\), .* at most 6"
    ):
        fresh().admit(jnp.ones((2, length)), 2)


def test_more_tokens_than_slots_are_refused():
    with pytest.raises(ValueError, match="7 tokens do not fit a cache of 6 slots"):
        fresh().admit(None, 7)


def test_begin_without_a_cache():
    mask = jnp.ones((2, 4))
    slots, given, num_keys, cache = begin(None, mask, 4)
    assert slots.tolist() == [0, 1, 2, 3]
    assert slots.dtype == jnp.int32
    assert given is mask
    assert (num_keys, cache) == (4, None)
    with pytest.raises(ValueError, match="attention_mask has length 4, but there are 5 tokens"):
        begin(None, mask, 5)


def test_begin_with_a_cache():
    cache = fresh()
    cache = cache.admit(jnp.array([[0, 1, 1], [1, 1, 1]]), 3).advance(cache.layers, 3)
    slots, mask, num_keys, cache = begin(cache, None, 2)
    assert mask is not None
    assert cache is not None
    assert slots.tolist() == [3, 4]
    assert mask.astype(int).tolist() == [[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0]]
    assert num_keys == 6
    assert (cache.mask == mask).all()
    assert int(cache.index) == 3


def test_a_bias_says_what_is_seen_and_not_which_tokens_are_real():
    """A 4-D mask passes as it is, and the slots it goes with count as real in later calls."""
    bias = jnp.zeros((2, 1, 2, 6))
    slots, mask, num_keys, cache = begin(fresh(), bias, 2)
    assert mask is bias
    assert slots.tolist() == [0, 1]
    assert num_keys == 6
    assert marks(cache) == [[1, 1, 0, 0, 0, 0]] * 2


def test_a_cache_unstacks_and_stacks():
    cache = fresh()
    numbers = jnp.arange(3.0).reshape(3, 1, 1, 1, 1)
    cache = cache.advance(jax.tree.map(lambda a: a + numbers, cache.layers), 0)
    apart = modelzoo.unstack_layers(cache)
    assert isinstance(apart.layers, tuple)
    assert [float(layer.value.max()) for layer in apart.layers] == [0.0, 1.0, 2.0]
    assert apart.layers[0].key.shape == (2, 4, 6, 5)
    together = modelzoo.stack_layers(apart)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), cache, together))
