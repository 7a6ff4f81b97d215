"""Logits processors against plain numpy, and samples against their distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference import GenerationConfig, sampling

INF = float("inf")


@pytest.fixture
def logits(rng):
    return 3 * jax.random.normal(rng, (4, 40))


def history(step=0, min_new=0, max_new=10, seen=None):
    return sampling.History(jnp.int32(step), jnp.int32(min_new), jnp.int32(max_new), seen)


def kept(logits):
    return [set(np.flatnonzero(row > -INF).tolist()) for row in np.asarray(logits)]


def numpy_softmax(logits):
    e = np.exp(np.asarray(logits, np.float64) - np.asarray(logits).max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_top_k_keeps_the_k_highest_unchanged(logits):
    out = sampling.keep_top_k(logits, 5)
    assert kept(out) == [set(np.argsort(row)[-5:].tolist()) for row in np.asarray(logits)]
    np.testing.assert_array_equal(np.where(np.isinf(out), logits, out), logits)
    assert kept(sampling.keep_top_k(logits, 1000)) == [set(range(40))] * 4


def test_top_k_keeps_ties_with_the_last():
    assert kept(sampling.keep_top_k(jnp.array([[3.0, 1.0, 2.0, 2.0]]), 2)) == [{0, 2, 3}]


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits, p):
    expected = []
    for row in numpy_softmax(logits):
        order = np.argsort(-row)
        expected.append(set(order[: np.searchsorted(np.cumsum(row[order]), p) + 1].tolist()))
    assert kept(sampling.keep_top_p(logits, p)) == expected


def test_top_p_on_a_boundary_hidden_tokens_and_a_certain_one():
    log = jnp.log(jnp.array([[0.5, 0.25, 0.25, 0.0]]))
    assert kept(sampling.keep_top_p(log, 0.5)) == [{0}]
    assert kept(sampling.keep_top_p(log, 0.51)) == [{0, 1, 2}]  # a tie stays together
    assert kept(sampling.keep_top_p(jnp.array([[0.0, -INF, -INF]]), 0.999)) == [{0}]


def test_min_p_is_relative_to_the_most_probable(logits):
    expected = [set(np.flatnonzero(row >= 0.1 * row.max()).tolist()) for row in numpy_softmax(logits)]
    assert kept(sampling.keep_min_p(logits, 0.1)) == expected


def test_repetition_penalty_lowers_seen_tokens_whatever_their_sign():
    out = sampling.penalize(jnp.array([[2.0, -2.0, 2.0, -INF]]), jnp.array([[True, True, False, True]]), 2.0)
    assert out.tolist() == [[1.0, -4.0, 2.0, -INF]]


def test_no_eos_before_the_minimum(logits):
    config = GenerationConfig(eos_token_id=(3, 4), min_new_tokens=2)
    for step, missing in ((0, {3, 4}), (1, {3, 4}), (2, set())):
        out = sampling.process_logits(logits, history(step, min_new=2), config)
        assert set(range(40)) - kept(out)[0] == missing


def test_forced_eos_only_at_the_limit(logits):
    config = GenerationConfig(forced_eos_token_id=[3, 7])
    assert kept(sampling.process_logits(logits, history(8), config))[0] == set(range(40))
    assert kept(sampling.process_logits(logits, history(9), config)) == [{3, 7}] * 4


def test_greedy_ignores_the_warpers(logits):
    config = GenerationConfig(temperature=0.1, top_k=1, suppress_tokens=(5,))
    out = sampling.process_logits(logits, history(), config)
    assert kept(out)[0] == set(range(40)) - {5}
    assert sampling.choose(out, None, config).tolist() == np.argmax(np.asarray(out), axis=-1).tolist()


def test_processors_compute_in_float32_and_renormalize(logits):
    config = GenerationConfig(do_sample=True, top_k=4, renormalize_logits=True)
    out = sampling.process_logits(logits.astype(jnp.bfloat16), history(), config)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(np.exp(np.asarray(out)).sum(-1), 1.0, rtol=1e-6)


def test_seen_grows_with_every_token():
    state = history(seen=jnp.zeros((2, 4), bool)).append(jnp.array([1, 3])).append(jnp.array([1, 0]))
    assert state.seen is not None
    assert state.step == 2
    assert state.seen.tolist() == [[False, True, False, False], [True, False, False, True]]


def chi_square(counts, probs):
    """Pearson's statistic over the outcomes that can occur, and its degrees of freedom."""
    possible = probs > 0
    assert counts[~possible].sum() == 0, "a token of probability zero was drawn"
    expected = counts.sum() * probs[possible]
    return ((counts[possible] - expected) ** 2 / expected).sum(), possible.sum() - 1


@pytest.mark.parametrize(
    "fields",
    [
        dict(top_k=0),
        dict(top_k=0, temperature=0.5),
        dict(top_k=4),
        dict(top_k=0, top_p=0.8),
        dict(top_k=0, min_p=0.2),
        dict(top_k=6, top_p=0.9, min_p=0.05, temperature=1.5),
    ],
)
def test_samples_follow_the_processed_distribution(rng, fields):
    config = GenerationConfig(do_sample=True, **fields)
    row = jnp.concatenate([jax.random.normal(rng, (12,)), jnp.full((4,), -jnp.inf)])  # four padding columns
    logits = sampling.process_logits(row[None], history(), config)
    num = 20_000
    tokens = jax.jit(lambda rngs: sampling.choose(jnp.broadcast_to(logits, (num, 16)), rngs, config))(
        jax.random.split(rng, num)
    )
    statistic, freedom = chi_square(np.bincount(tokens, minlength=16), numpy_softmax(logits)[0])
    # The 99.99% point of chi-square, by Wilson and Hilferty's approximation.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.719 * np.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit


def test_a_row_draws_the_same_whatever_stands_beside_it(rng, logits):
    config = GenerationConfig(do_sample=True)
    rngs = jax.random.split(rng, 4)
    together = sampling.choose(logits, rngs, config)
    alone = [int(sampling.choose(logits[i : i + 1], rngs[i : i + 1], config)[0]) for i in range(4)]
    assert together.tolist() == alone
    padded = jnp.pad(logits, ((0, 0), (0, 8)), constant_values=-jnp.inf)
    assert sampling.choose(padded, rngs, config).tolist() == alone
