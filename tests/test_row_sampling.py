"""Rows with parameters of their own choose what a batch of one with a config chooses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference import GenerationConfig, sampling
from inference.processors import History
from inference.requests import SamplingParams
from inference.row_sampling import RowParams, choose_rows, keep_top_k
from tests.zoo import quick_jit

VOCAB = 41
choose = quick_jit(choose_rows)


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(0).normal(0, 2, (6, VOCAB)).astype(np.float32)


def rows(*params):
    made = RowParams.neutral(len(params))
    for row, each in enumerate(params):
        made.set(row, each)
    return made


def nothing(num_rows):
    return (
        np.zeros((num_rows, VOCAB), bool),
        np.zeros((num_rows, VOCAB), np.int32),
        np.zeros(num_rows, np.int32),
    )


def test_keep_top_k_by_rows(logits):
    logits = logits.copy()
    logits[:, 3] = logits[:, 5]  # ties stay together
    k = np.array([[1], [2], [7], [VOCAB], [VOCAB + 5], [0]], np.int32)
    found = np.asarray(quick_jit(keep_top_k)(logits, k))
    for row, count in enumerate(k[:, 0]):
        want = sampling.keep_top_k(jnp.asarray(logits[row : row + 1]), int(count)) if count else logits[row]
        np.testing.assert_array_equal(found[row], np.ravel(want))
    hidden = np.full((1, VOCAB), -np.inf, np.float32)
    hidden[0, 4] = -3.0
    np.testing.assert_array_equal(keep_top_k(hidden, np.array([[5]], np.int32)), hidden)


def test_each_row_draws_as_generate_would(logits):
    config = dict(temperature=1.3, top_k=9, top_p=0.8, min_p=0.05)
    asked = [
        SamplingParams(**config, seed=3),
        SamplingParams(temperature=0.7, seed=2**31 + 5, sample=4),
        SamplingParams(),
        SamplingParams(temperature=9.0, top_k=2, seed=8),
        SamplingParams(temperature=2.0, top_p=0.5, seed=8),
        SamplingParams(temperature=2.0, min_p=0.2, seed=8, sample=1),
    ]
    seen, counts, _ = nothing(6)
    for step in range(4):
        found = choose(logits, rows(*asked), seen, counts, np.full(6, step, np.int32)).token
        for row, params in enumerate(asked):
            fields = dict(
                temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p
            )
            one = GenerationConfig(do_sample=True, **fields) if params.temperature else GenerationConfig()
            history = History(jnp.int32(step), jnp.int32(0), jnp.int32(9))
            processed = sampling.process_logits(jnp.asarray(logits[row : row + 1]), history, one)
            rng = jax.random.fold_in(jax.random.fold_in(jax.random.key(params.seed), params.sample), step)
            assert found[row] == sampling.choose(processed, rng[None], one)[0], (step, row)


def test_penalties_biases_and_stops_act_on_their_own_row(logits):
    best = logits.argmax(-1)
    seen, counts, step = nothing(6)
    for row in (1, 2, 3):
        seen[row, best[row]], counts[row, best[row]] = True, 2
    counts[5, best[5]] = 2  # without a penalty nobody looks
    asked = [
        SamplingParams(logit_bias={int(best[0]): -100.0, 7: 0.0}),
        SamplingParams(repetition_penalty=100.0),
        SamplingParams(frequency_penalty=50.0),
        SamplingParams(presence_penalty=100.0),
        SamplingParams(stop_token_ids=(int(best[4]),), min_new_tokens=2),
        SamplingParams(stop_token_ids=(int(best[5]),)),
    ]
    second = np.argsort(logits)[:, -2]
    found = choose(logits, rows(*asked), seen, counts, step).token
    np.testing.assert_array_equal(found, [*second[:5], best[5]])
    step[4] = 2
    assert choose(logits, rows(*asked), seen, counts, step).token[4] == best[4]


def test_log_probabilities_are_the_models_own(logits):
    asked = [
        SamplingParams(temperature=5.0, logprobs=3),
        *[SamplingParams(logit_bias={0: 90.0}, logprobs=0)] * 5,
    ]
    found = choose(logits, rows(*asked), *nothing(6))
    want = np.asarray(jax.nn.log_softmax(logits))
    np.testing.assert_allclose(found.logprob, want[np.arange(6), found.token], atol=2e-6)
    order = np.argsort(-logits)[:, :20]
    np.testing.assert_array_equal(found.top_ids, order)
    np.testing.assert_allclose(found.top_logprobs, np.take_along_axis(want, order, 1), atol=2e-6)
    plain = choose(logits, rows(*[SamplingParams()] * 6), *nothing(6))
    assert not plain.top_ids.any()
    assert not plain.logprob.any()  # nobody asks, and nothing is computed
