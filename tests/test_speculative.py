"""Guessed tokens: what is looked up, and that a generation with guesses is the one without."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import inference
import modelzoo
from inference import GenerationConfig, decode, loop, speculative
from inference.processors import History
from tests import zoo


def history(*rows, first=0, **fields):
    length = len(rows[0])
    tokens = jnp.pad(jnp.array(rows, jnp.int32), ((0, 0), (0, 6)))
    end = jnp.int32(length)
    zero = jnp.int32(0)
    return History(zero, zero, zero, tokens=tokens, first=jnp.full(len(rows), first), end=end, **fields)


@pytest.mark.parametrize(
    ("row", "guesses"),
    [
        ([1, 2, 3, 4, 5, 1, 2], [3, 4, 5]),
        ([1, 2, 3, 4, 5, 9, 1, 2, 6, 7, 8, 1, 2], [6, 7, 8]),  # the last place that has enough after it
        ([3, 1, 2, 7, 7, 7, 5, 2, 4, 4, 4, 1, 2], [7, 7, 7]),  # two tokens rather than one
        ([6, 2, 4, 5, 6, 1, 2], [4, 5, 6]),  # one where two have not occurred
    ],
)
def test_what_followed_before_is_guessed(row, guesses):
    found, known = speculative.look_up(history(row), 3, 2)
    assert known.tolist() == [True]
    assert found.tolist() == [guesses]


def test_text_that_is_new_has_no_guess():
    _, known = speculative.look_up(history([1, 2, 3, 4], [1, 2, 3, 1]), 3, 2)
    assert known.tolist() == [False, True]
    _, known = speculative.look_up(history([4, 1, 2, 3, 4], first=1), 3, 2)
    assert known.tolist() == [False]


def test_an_encoders_input_is_looked_up_too():
    source = jnp.array([[7, 8, 9, 3, 0]])
    known_source = dict(source=source, source_real=jnp.array([[True, True, True, True, False]]))
    found, known = speculative.look_up(history([5, 8], **known_source), 2, 2)
    assert known.tolist() == [True]
    assert found.tolist() == [[9, 3]]


@pytest.fixture(scope="module")
def gptj():
    model = modelzoo.GPTJForCausalLM(zoo.tiny_gptj(n_positions=96, n_layer=1))
    return model, inference.prepare(model, zoo.random_params(model, scale=0.3))


LEFT = np.array([[3, 4, 5, 6, 3, 4], [0, 0, 9, 8, 9, 8]])


@pytest.mark.parametrize(
    ("rows", "fields"),
    [
        (1, dict()),
        (2, dict(repetition_penalty=1.1, no_repeat_ngram_size=4, output_logprobs=True)),
        (2, dict(do_sample=True, temperature=0.6, top_k=0, num_return_sequences=2)),
        (1, dict(max_new_tokens=90)),  # up to the window's end
    ],
    ids=str,
)
def test_tokens_are_those_of_the_plain_loop(gptj, rows, fields, monkeypatch):
    model, params = gptj
    fields: dict[str, Any] = dict(max_new_tokens=40, eos_token_id=2, pad_token_id=0) | fields

    def run(**more: Any):
        config = GenerationConfig(**fields, **more)
        ids = LEFT[:rows]
        return inference.generate(model, params, ids, ids > 0, config, rng=jax.random.key(5))

    plain = run()
    monkeypatch.setattr(decode, "FIRST_SLOTS", 32)  # a cache that grows on the way
    guessed = run(prompt_lookup_num_tokens=4)
    np.testing.assert_array_equal(guessed.sequences, plain.sequences)
    np.testing.assert_array_equal(guessed.lengths, plain.lengths)
    if plain.logprobs is not None:
        assert guessed.logprobs is not None
        np.testing.assert_allclose(guessed.logprobs, plain.logprobs, atol=2e-6, rtol=0)


def test_guesses_save_passes_of_the_model(gptj, monkeypatch):
    """A model whose every token is the one before it: all guesses are right."""
    model, params = gptj
    passes = []

    def counted(model, params, tokens, positions, cache, source_mask=None):
        jax.debug.callback(lambda: passes.append(tokens.shape[1]))
        logits = jax.nn.one_hot(tokens, 37)
        return logits, cache.admit(None, tokens.shape[1]).advance(cache.layers, tokens.shape[1])

    def plain(model, params, tokens, positions, cache, source_mask=None):
        logits, cache = counted(model, params, tokens[:, None], positions, cache)
        return logits[:, 0], cache

    monkeypatch.setattr(speculative, "read_tokens", counted)
    monkeypatch.setattr(loop, "decode_step", plain)
    loop.proceed_program().clear_cache()
    config = GenerationConfig(max_new_tokens=21, prompt_lookup_num_tokens=4, suppress_tokens=(36,))
    out = inference.generate(model, params, [[5, 5, 5, 5, 5, 5]], config=config)
    jax.effects_barrier()
    loop.proceed_program().clear_cache()
    new = out.sequences[0, 6:].tolist()
    assert new[1:] == new[:-1]
    assert sorted(set(passes)) == [1, 5]
    assert len(passes) <= 8
