"""Embedding tables: rows by id, ids that are none, vocabularies that a mesh padded."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modelzoo.layers import embed
from modelzoo.layers.embed import embed_inputs, mask_padded_vocab

Embed: Any = embed.Embed  # flax types what init and apply return as unions
TABLE = np.arange(15.0, dtype=np.float32).reshape(5, 3)


def look_up(ids, padding=0, **fields):
    params = {"embedding": jnp.pad(jnp.asarray(TABLE), ((0, padding), (0, 0)))}
    return Embed(5, 3, **fields).apply({"params": params}, jnp.asarray(ids))


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("dtype", [np.int32, np.uint8])
def test_rows_by_id(padding, dtype):
    ids = np.array([[0, 4, 1], [3, 3, 2]], dtype)
    np.testing.assert_array_equal(look_up(ids, padding), TABLE[ids])


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("bad", [-1, -5, -100, 5, 7, 8, 1000])
def test_an_id_outside_the_vocabulary_gives_nan(padding, bad):
    """Also a negative one, which indexing takes from the end, and one of a row that only pads the table."""
    rows = look_up([1, bad, 4], padding)
    assert np.isnan(rows[1]).all()
    np.testing.assert_array_equal(rows[jnp.array([0, 2])], TABLE[[1, 4]])


def test_gradient_adds_up_over_repeated_ids_and_spares_padding():
    params = {"embedding": jnp.pad(jnp.asarray(TABLE), ((0, 3), (0, 0)))}

    def loss(params):
        return Embed(5, 3).apply({"params": params}, jnp.array([1, 1, 4])).sum()

    gradient = jax.grad(loss)(params)["embedding"]
    np.testing.assert_array_equal(gradient[:, 0], [0, 2, 0, 0, 1, 0, 0, 0])


def test_dtype_and_axes():
    assert look_up([1], dtype=jnp.bfloat16).dtype == jnp.bfloat16
    for row_axis in ("vocab", None):
        params = Embed(5, 3, row_axis, param_dtype=jnp.float16).init(jax.random.key(0), jnp.array([0]))[
            "params"
        ]
        assert params["embedding"].names == (row_axis, "embed")
        assert params["embedding"].value.dtype == jnp.float16


def test_only_a_vocabulary_may_have_more_rows():
    with pytest.raises(
        ValueError, match=r"parameter embedding has shape \(8, 3\), but the config makes it \(5, 3\)"
    ):
        look_up([0], padding=3, row_axis=None)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_mask_padded_vocab(dtype):
    logits = jnp.ones((2, 3, 8), dtype)
    masked = mask_padded_vocab(logits, 5)
    assert masked.dtype == dtype
    assert (masked[..., :5] == 1).all()
    assert jnp.isneginf(masked[..., 5:]).all()
    assert mask_padded_vocab(logits, 8) is logits


def test_embed_inputs_takes_exactly_one():
    class Holder(Embed):
        def __call__(self, **kwargs):
            return embed_inputs(self, **kwargs)

    model, params = Holder(5, 3, dtype=jnp.bfloat16), {"params": {"embedding": jnp.asarray(TABLE)}}
    ids, embeds = jnp.array([[1, 2]]), jnp.ones((1, 2, 3))
    for both in (dict(input_ids=None, inputs_embeds=None), dict(input_ids=ids, inputs_embeds=embeds)):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model.apply(params, **both)
    passed = model.apply(params, input_ids=None, inputs_embeds=embeds)
    assert passed.dtype == jnp.bfloat16
    assert (passed == 1).all()
