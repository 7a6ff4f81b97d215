"""Calls of a model with a cache: what they return is what one call without a cache does."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import inference
import modelzoo
import parallel
from inference import forward
from tests import zoo


@pytest.fixture(scope="module")
def gptj():
    """Logits at unit scale."""
    model = modelzoo.GPTJForCausalLM(modelzoo.get_config("tiny-gptj", vocab_size=97, initializer_range=0.12))
    return model, parallel.init_params(model, jax.random.key(7))


def test_cached_logits_equal_uncached(gptj):
    model, params = gptj
    params = inference.prepare(model, params)
    ids = jax.random.randint(jax.random.key(1), (3, 24), 1, 97)
    mask, num_prompt = jnp.ones((3, 24), bool).at[1, :5].set(False).at[2, :9].set(False), 12
    positions = jnp.where(mask, jnp.cumsum(mask, axis=1) - 1, 1)
    whole = model.apply({"params": params}, input_ids=ids, attention_mask=mask, position_ids=positions).logits
    step = jax.jit(forward.decode_step, static_argnums=0)
    logits, position, cache = jax.jit(forward.prefill, static_argnums=(0, 4))(
        model, params, ids[:, :num_prompt], mask[:, :num_prompt], 32
    )
    for slot in range(num_prompt, 24):
        np.testing.assert_allclose(logits, whole[:, slot - 1], atol=2e-6, rtol=0)
        logits, cache = step(model, params, ids[:, slot], position, cache)
        position = position + 1
    np.testing.assert_allclose(logits, whole[:, -1], atol=2e-6, rtol=0)


@pytest.mark.long
def test_an_encoder_is_read_once(rng):
    model = modelzoo.MvpForConditionalGeneration(zoo.tiny_mvp())
    params = inference.prepare(model, zoo.random_params(model))
    source, ids = jax.random.randint(rng, (2, 6), 1, 37), jax.random.randint(rng, (2, 5), 1, 37)
    mask = jnp.ones((2, 6), bool).at[1, 4:].set(False)
    whole: Any = zoo.quick_jit(model.apply)(
        {"params": params}, source, attention_mask=mask, decoder_input_ids=ids
    )
    encode = zoo.quick_jit(forward.encode, static_argnums=(0, 5))
    step, read = (
        zoo.quick_jit(call, static_argnums=0) for call in (forward.decode_step, forward.read_tokens)
    )
    logits, position, cache = encode(model, params, source, mask, ids[:, :1], 8)
    assert position.tolist() == [1, 1]
    np.testing.assert_allclose(logits, whole.logits[:, 0], atol=2e-6, rtol=0)
    logits, cache = step(model, params, ids[:, 1], position, cache, mask)
    np.testing.assert_allclose(logits, whole.logits[:, 1], atol=2e-6, rtol=0)
    logits, _ = read(model, params, ids[:, 2:], jnp.zeros((2, 3), jnp.int32), cache, mask)
    np.testing.assert_allclose(logits, whole.logits[:, 2:], atol=2e-6, rtol=0)


def test_options_are_ones_that_the_compiler_knows():
    options = forward.few_rows_options()
    assert jax.jit(lambda x: x @ x, compiler_options=options)(jnp.eye(2)).tolist() == [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_cache_is_carried_and_loaded_again(gptj, num_rows):
    model, _ = gptj
    cache = modelzoo.unstack_layers(model.init_cache(num_rows, 8))
    carried = forward.carried(cache)
    assert carried.layers[0].key.ndim == (3 if num_rows == 1 else 4)
    assert jax.tree.map(jnp.shape, forward.loaded(carried)) == jax.tree.map(jnp.shape, cache)


def test_rows_of_a_cache_change_places(gptj):
    model, _ = gptj
    cache = modelzoo.unstack_layers(model.init_cache(2, 8))
    cache = jax.tree.map(lambda leaf: leaf.at[1:].set(jnp.ones((), leaf.dtype)) if leaf.ndim else leaf, cache)
    turned = forward.map_rows(cache, lambda rows: rows[::-1])
    for leaf in jax.tree.leaves((turned.layers, turned.mask)):
        assert np.all(leaf[0])
        assert not np.any(leaf[1])
    assert turned.index is cache.index
