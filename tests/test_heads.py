"""Heads: which positions are scored, by what, and what becomes of padding."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import modelzoo
from modelzoo import heads
from tests.zoo import tiny_gptj


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


def test_summaries_of_a_sequence():
    x = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)
    places = np.array([4, 0, 2])
    wanted = {"first": x[:, 0], "last": x[:, -1], "mean": x.mean(axis=1), "cls_index": x[[0, 1, 2], places]}
    for how, want in wanted.items():
        np.testing.assert_allclose(heads.summarize(jnp.asarray(x), how, jnp.asarray(places)), want, rtol=1e-6)
    np.testing.assert_array_equal(heads.summarize(jnp.asarray(x), "cls_index"), x[:, -1])


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


def lm_head(**options):
    return heads.LMHead(6, 5, **options)


def lm_params(head, num_columns=5, seed=0):
    """Random parameters of a head whose vocabulary a mesh padded to `num_columns`."""
    x, table = jnp.zeros((1, 1, 6)), jnp.zeros((5, 6))
    shapes = jax.eval_shape(lambda: nn.meta.unbox(head.init(jax.random.key(0), x, table)["params"]))
    random = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), jnp.float32), shapes)
    for name in {"kernel", "bias"} & set(params):
        padding = [(0, 0)] * (params[name].ndim - 1) + [(0, num_columns - 5)]
        params[name] = jnp.pad(params[name], padding)
    return params


STATES = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 6)), jnp.float32)
TABLE = jnp.asarray(np.random.default_rng(2).normal(size=(5, 6)), jnp.float32)


def test_lm_head_of_a_padded_vocabulary():
    """The kernel has more columns than the vocabulary: those are minus infinity, and take no part in a softmax."""
    head = lm_head(use_bias=True)
    expected = head.apply({"params": lm_params(head)}, STATES, TABLE)
    logits = head.apply({"params": lm_params(head, 8)}, STATES, TABLE)
    assert expected.shape == (2, 3, 5)
    assert logits.shape == (2, 3, 8)
    np.testing.assert_allclose(logits[..., :5], expected, atol=1e-6)
    assert np.isneginf(logits[..., 5:]).all()
    np.testing.assert_allclose(jax.nn.logsumexp(logits, -1), jax.nn.logsumexp(expected, -1), atol=1e-6)


def test_padded_columns_get_no_gradient_and_give_no_nan():
    head = lm_head(use_bias=True)

    def loss(params):
        return jax.nn.logsumexp(head.apply({"params": params}, STATES, TABLE), axis=-1).sum()

    gradient = jax.grad(loss)(lm_params(head, 8))
    assert np.isfinite(gradient["kernel"]).all()
    assert (gradient["kernel"][:, 5:] == 0).all()
    assert (gradient["bias"][5:] == 0).all()
    assert (gradient["bias"][:5] > 0).all()


def test_a_tied_head_reads_the_table_and_has_no_kernel():
    head = lm_head(use_bias=True, tied=True)
    params = lm_params(head)
    assert set(params) == {"bias"}
    logits = head.apply({"params": params}, STATES, TABLE)
    np.testing.assert_allclose(logits, STATES @ TABLE.T + params["bias"], atol=1e-5)
    gradient = jax.grad(lambda table: head.apply({"params": params}, STATES, table).sum())(TABLE)
    np.testing.assert_allclose(gradient, jnp.broadcast_to(STATES.sum((0, 1)), (5, 6)), atol=1e-5)


def test_a_tied_heads_transposed_copy_stands_in_for_the_table():
    head = lm_head(use_bias=True, tied=True)
    params = {"lm_head": lm_params(head), "trunk": {"embed": {"embedding": TABLE}}}
    decoding = heads.untie(params, ("embed", "embedding"))
    assert decoding["lm_head"]["kernel"].shape == (6, 5)
    assert "kernel" not in params["lm_head"]  # the caller's tree is left as it was
    logits = head.apply({"params": decoding["lm_head"]}, STATES, jnp.full_like(TABLE, jnp.nan))
    np.testing.assert_allclose(logits, head.apply({"params": params["lm_head"]}, STATES, TABLE), atol=1e-6)


def test_an_lm_heads_transform():
    head = lm_head(transform="relu", norm_epsilon=0.1)
    params = lm_params(head)
    assert set(params) == {"dense", "norm", "kernel"}
    x = np.maximum(STATES @ params["dense"]["kernel"] + params["dense"]["bias"], 0)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 0.1)
    x = x * params["norm"]["scale"] + params["norm"]["bias"]
    np.testing.assert_allclose(head.apply({"params": params}, STATES, TABLE), x @ params["kernel"], atol=1e-5)


def test_the_pooler_reads_the_first_token():
    pooler = heads.Pooler(6)
    kernel, bias = jnp.asarray(np.random.default_rng(3).normal(size=(6, 6)), jnp.float32), jnp.arange(6.0)
    out = pooler.apply({"params": {"dense": {"kernel": kernel, "bias": bias}}}, STATES)
    np.testing.assert_allclose(out, np.tanh(STATES[:, 0] @ kernel + bias), atol=1e-6)


def test_a_classification_head_drops_its_input_and_its_middle():
    head = heads.ClassificationHead(6, 3, dropout=0.5)
    params = nn.meta.unbox(head.init(jax.random.key(0), STATES[:, 0]))["params"]
    params = jax.tree.map(lambda leaf: leaf + 0.3, params)
    middle = np.tanh(STATES[:, 0] @ params["dense"]["kernel"] + params["dense"]["bias"])
    expected = middle @ params["out"]["kernel"] + params["out"]["bias"]
    np.testing.assert_allclose(head.apply({"params": params}, STATES[:, 0]), expected, atol=1e-5)
    dropped = head.apply({"params": params}, STATES[:, 0], False, rngs={"dropout": jax.random.key(0)})
    assert not np.allclose(dropped, expected)


@pytest.mark.parametrize("kind", ["lm_head", "classifier"])
def test_heads_carry_their_models_dtypes_and_axes(kind):
    model = modelzoo.GPTJForCausalLM(tiny_gptj(), dtype=jnp.bfloat16, param_dtype=jnp.float16)
    x = jnp.zeros((1, 1, 24), jnp.bfloat16)
    if kind == "lm_head":
        head = model.bind({}).lm_head.clone(parent=None)
        arguments = (x, jnp.zeros((37, 24)))
    else:
        head, arguments = heads.classifier(model, 5), (x,)
    variables = head.init(jax.random.key(0), *arguments)
    assert set(variables["params"]) == {"kernel", "bias"}
    axes = ("embed", "vocab" if kind == "lm_head" else None)
    assert variables["params"]["kernel"].names == axes
    assert variables["params"]["kernel"].value.dtype == jnp.float16
    assert head.apply(variables, *arguments).dtype == jnp.bfloat16
