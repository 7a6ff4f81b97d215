"""Scores of passages and perplexities by strides, against the model's logits taken one text at a time."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import inference
import modelzoo
import parallel
from inference.scoring import Passage, Perplexity, check_strides, perplexity, score, strides
from tests import zoo

MODEL = modelzoo.GPTJForCausalLM(zoo.tiny_gptj(n_embd=32, n_head=4, n_inner=36))


@pytest.fixture(scope="module")
def params():
    return inference.prepare(MODEL, zoo.random_params(MODEL))


@pytest.fixture(scope="module")
def logprobs(params):
    """ids [T] -> log-probabilities of each token after the first, and what was most probable."""
    apply = jax.jit(lambda ids: MODEL.apply({"params": params}, input_ids=ids).logits)

    def of(ids):
        logits = np.asarray(apply(jnp.asarray([[*ids, *[0] * (32 - len(ids))]])), np.float64)[0]
        found = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
        return np.array([found[i, token] for i, token in enumerate(ids[1:])]), logits.argmax(-1)

    return of


def drawn(*lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 37, length).tolist() for length in lengths]


@pytest.mark.parametrize("mesh", [None, dict(data=2, tensor=4)], ids=str)
def test_passages_of_many_lengths(params, logprobs, mesh):
    rules = mesh and parallel.make_rules(parallel.make_mesh(**mesh))
    placed = inference.prepare(MODEL, params, rules) if rules else params
    passages = [
        Passage(ids, first) for ids, first in zip(drawn(5, 33, 17, 2, 9), (1, 20, 16, 1, 3), strict=True)
    ]
    done = []
    scores = score(MODEL, placed, passages, 2, rules, done.append)
    assert sum(done) == len(passages)
    for passage, one in zip(passages, scores, strict=True):
        wanted, greedy = logprobs(passage.ids[:32])
        if len(passage.ids) == 33:  # the window's last token predicts one more
            assert len(one.logprobs) == 13
            wanted = wanted[passage.first - 1 :]
            np.testing.assert_allclose(one.logprobs[:-1], wanted, atol=2e-5)
            continue
        np.testing.assert_allclose(one.logprobs, wanted[passage.first - 1 :], atol=2e-5)
        expected = np.array(passage.ids[passage.first :]) == greedy[passage.first - 1 : len(passage.ids) - 1]
        np.testing.assert_array_equal(one.is_greedy, expected)


@pytest.mark.parametrize(
    ("length", "window", "stride"), [(70, 32, 16), (70, 32, 32), (20, 32, 5), (33, 32, 1), (64, 8, 3)]
)
def test_every_token_is_scored_once(length, window, stride):
    found = strides(length, window, stride)
    scored = [i for _, end, first in found for i in range(first, end)]
    missing = sorted(set(range(length)) - set(scored))
    assert scored == sorted(scored)
    # Where windows do not overlap, the first of each has nothing before it.
    assert missing == ([0] if stride < window else list(range(0, length, window)))
    assert all(end - begin <= window for begin, end, _ in found)
    assert all(first - begin >= min(window - stride, begin + 1) for begin, _, first in found)


def test_perplexity_is_the_mean_of_its_windows(params, logprobs):
    (ids,) = drawn(70)
    for window, stride in ((32, 16), (20, 20)):
        nll = count = 0
        for begin, end, first in strides(70, window, stride):
            part = logprobs(ids[begin:end])[0][first - begin - 1 :]
            nll, count = nll - part.sum(), count + len(part)
        found = perplexity(MODEL, params, ids, window, stride, batch_size=3)
        assert found.num_tokens == count
        assert found.perplexity == pytest.approx(math.exp(nll / count), rel=1e-6)


def test_texts_add_up():
    both = Perplexity(2.0, 4, 10) + Perplexity(1.0, 2)
    assert (both.nll, both.num_tokens, both.per_token) == (3.0, 6, 0.5)
    assert both.bits_per_byte == pytest.approx(3 / math.log(2) / 10)
    assert Perplexity(1.0, 2).bits_per_byte is None
    assert check_strides(MODEL, None, None) == (32, 16)
    assert check_strides(modelzoo.BloomForCausalLM(modelzoo.get_config("tiny-bloom")), None, 3) == (2048, 3)


@pytest.mark.parametrize(
    ("passage", "error"),
    [
        (Passage([1, 2], 0), "passage 0 of 2 tokens is scored from token 0"),
        (Passage([1], 1), "passage 0 of 1 tokens"),
        (Passage([1] * 34, 1), "passage 0 has 34 tokens, but the model reads 32"),
        (Passage([1, 37], 1), "outside the model's vocabulary of 37"),
    ],
)
def test_what_cannot_be_scored(params, passage, error):
    with pytest.raises(ValueError, match=error):
        score(MODEL, params, [passage])


def test_bad_strides_and_models(params):
    with pytest.raises(ValueError, match="window = 33: it is 2 to 32 tokens"):
        perplexity(MODEL, params, [1, 2, 3], window=33)
    with pytest.raises(ValueError, match="stride = 9: it is 1 to the window's 8 tokens"):
        perplexity(MODEL, params, [1, 2, 3], window=8, stride=9)
    with pytest.raises(ValueError, match="a text of 1 tokens"):
        perplexity(MODEL, params, [1])
    classifier = modelzoo.GPTJForSequenceClassification(MODEL.config)
    with pytest.raises(ValueError, match="GPTJForSequenceClassification does not score text"):
        score(classifier, params, [])
