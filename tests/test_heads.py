"""Heads: which positions are scored, by what, and what becomes of padding."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import modelzoo
from modelzoo import heads
from tests.zoo import tiny_gptj

NORMAL = jax.nn.initializers.normal(0.5)


@pytest.mark.parametrize(
    "keep",
    [0, 1, 3, 5, 9, -2, np.int64(2), np.array([4, 0, 0]), np.array([-1]), np.array([], np.int32)],
    ids=str,
)
def test_keep_last_is_slicing_by_the_last_positions(keep):
    """transformers: hidden_states[:, slice(-keep, None) if int else keep]."""
    x = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    expected = x[:, slice(-int(keep), None)] if np.ndim(keep) == 0 else x[:, keep]
    kept = heads.keep_last(jnp.asarray(x), jnp.asarray(keep) if np.ndim(keep) else keep)
    np.testing.assert_array_equal(kept, expected)


def last_token_by_loop(values, ids, pad):
    rows = []
    for row, tokens in zip(values, ids, strict=True):
        real = [i for i, token in enumerate(tokens) if token != pad]
        rows.append(row[real[-1] if real else 0])
    return np.stack(rows)


@pytest.mark.parametrize(
    "ids",
    [
        [[5, 4, 3, 2], [1, 1, 1, 1]],  # none
        [[5, 4, 9, 9], [1, 9, 9, 9]],  # right
        [[9, 9, 5, 4], [9, 9, 9, 1]],  # left
        [[9, 5, 9, 4], [5, 9, 4, 9]],  # inside, where it is a token like others
        [[9, 9, 9, 9], [9, 2, 9, 9]],  # nothing but padding: the first position, as in transformers
    ],
)
def test_last_token_is_the_rightmost_that_is_not_padding(ids):
    values = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    ids = np.array(ids, np.int32)
    found = heads.last_token(jnp.asarray(values), jnp.asarray(ids), 9)
    np.testing.assert_array_equal(found, last_token_by_loop(values, ids, 9))


def test_last_token_without_ids_or_padding_token_is_the_last():
    values = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 3)))
    ids = jnp.full((2, 4), 9)
    np.testing.assert_array_equal(heads.last_token(values, None, 9), values[:, -1])
    np.testing.assert_array_equal(heads.last_token(values[:1], ids[:1], None), values[:1, -1])


def test_last_token_of_a_batch_needs_a_padding_token():
    values = jnp.zeros((2, 4, 3))
    for ids in (None, jnp.zeros((2, 4), jnp.int32)):
        with pytest.raises(
            ValueError, match="batch of 2 sequences without a padding token: set pad_token_id"
        ):
            heads.last_token(values, ids, None)


def test_last_token_under_jit_and_gradient():
    """The gradient reaches the classified position and no other."""
    ids = jnp.array([[5, 9, 9], [9, 4, 3]])
    gradient = jax.jit(jax.grad(lambda v: heads.last_token(v, ids, 9).sum()))(jnp.zeros((2, 3, 2)))
    np.testing.assert_array_equal(gradient[..., 0], [[1, 0, 0], [0, 0, 1]])


def test_span_logits():
    logits = np.random.default_rng(0).normal(size=(2, 4, 2))
    start, end = heads.span_logits(jnp.asarray(logits))
    np.testing.assert_array_equal(start, logits[..., 0].astype(np.float32))
    np.testing.assert_array_equal(end, logits[..., 1].astype(np.float32))


def test_lm_head_of_a_padded_vocabulary():
    """The table has more columns than the vocabulary: those are minus infinity, and take no part in a softmax."""
    model = modelzoo.GPTJForCausalLM(tiny_gptj())
    head: Any = heads.lm_head(model, 6, 5, True, NORMAL)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 6)), jnp.float32)
    params = head.init(jax.random.key(0), x)["params"]
    params = {"kernel": params["kernel"].value, "bias": params["bias"].value + 1.0}
    padded = {"kernel": jnp.pad(params["kernel"], ((0, 0), (0, 3))), "bias": jnp.pad(params["bias"], (0, 3))}
    expected = heads.lm_logits(head.apply({"params": params}, x), 5)
    logits = heads.lm_logits(head.apply({"params": padded}, x), 5)
    assert expected.shape == (2, 3, 5)
    assert logits.shape == (2, 3, 8)
    np.testing.assert_allclose(logits[..., :5], expected, atol=1e-6)
    assert np.isneginf(logits[..., 5:]).all()
    np.testing.assert_allclose(jax.nn.logsumexp(logits, -1), jax.nn.logsumexp(expected, -1), atol=1e-6)


def test_padded_columns_get_no_gradient_and_give_no_nan():
    def loss(logits):
        return jax.nn.logsumexp(heads.lm_logits(logits, 5), axis=-1).sum()

    gradient = jax.grad(loss)(jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8)), jnp.float32))
    assert np.isfinite(gradient).all()
    assert (gradient[..., 5:] == 0).all()
    assert (gradient[..., :5] > 0).all()


@pytest.mark.parametrize(
    ("make", "axes"), [(heads.lm_head, ("embed", "vocab")), (heads.classifier, ("embed", None))]
)
def test_heads_carry_their_models_dtypes_and_axes(make, axes):
    model = modelzoo.GPTJForCausalLM(tiny_gptj(), dtype=jnp.bfloat16, param_dtype=jnp.float16)
    head = make(model, 6, 5, False, NORMAL)
    variables = head.init(jax.random.key(0), jnp.zeros((1, 6), jnp.bfloat16))
    assert set(variables["params"]) == {"kernel"}
    assert variables["params"]["kernel"].names == axes
    assert variables["params"]["kernel"].value.dtype == jnp.float16
    assert head.apply(variables, jnp.zeros((1, 6), jnp.bfloat16)).dtype == jnp.bfloat16
