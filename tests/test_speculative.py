"""Guessed tokens: what is looked up, and that a generation with guesses is the one without."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import inference
import modelzoo
from inference import GenerationConfig, decode, speculative
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


def test_rows_that_have_come_equally_far_or_not_are_looked_up_alike():
    rows = history([1, 2, 3, 4, 5, 1, 2], [7, 8, 9, 7, 8, 0, 0])
    apart = rows.replace(end=jnp.array([7, 5]), step=jnp.array([4, 2]))
    found, known = speculative.look_up(apart, 2, 2)
    assert known.tolist() == [True, True]
    assert found.tolist() == [[3, 4], [9, 7]]
    assert speculative.newest(apart).tolist() == [2, 8]
    assert speculative.newest(rows).tolist() == [2, 0]


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
        pytest.param(
            2, dict(do_sample=True, temperature=0.6, top_k=0, num_return_sequences=2), marks=pytest.mark.long
        ),
        (1, dict(max_new_tokens=90)),  # up to the window's end
        pytest.param(2, dict(max_new_tokens=88, eos_token_id=None), marks=pytest.mark.long),
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


class Echo(modelzoo.GPTJForCausalLM):
    """The most probable token after each is that token again, but 7 for 9 and 3 for 7."""

    def __call__(self, input_ids=None, **inputs):
        out = super().__call__(input_ids, **inputs)
        following = jnp.where(input_ids == 9, 7, jnp.where(input_ids == 7, 3, input_ids))
        logits = 9 * jax.nn.one_hot(following, 37)
        return out.replace(logits=logits[:, -out.logits.shape[1] :])


def test_a_row_goes_on_as_far_as_its_own_guesses_are_right(gptj):
    """The second row's guesses are wrong at first, and hold up nobody."""
    model, params = gptj
    model = Echo(model.config)
    ids = np.array([[5, 5, 5, 5, 5, 5, 5, 5], [9, 4, 9, 4, 9, 4, 4, 9]])
    config = GenerationConfig(max_new_tokens=22, prompt_lookup_num_tokens=4)
    both = inference.generate(model, params, ids, config=config)
    alone = [inference.generate(model, params, ids[i : i + 1], config=config) for i in range(2)]
    assert both.sequences[:, 8:].tolist() == [[5] * 22, [7, *[3] * 21]]
    assert [out.num_passes for out in alone] == [5, 7]  # 21 after the prefill, at most 5 a pass
    assert both.num_passes == 7
    for i, out in enumerate(alone):
        assert (both.num_guessed[i], both.num_accepted[i]) == (out.num_guessed[0], out.num_accepted[0])
    assert both.num_accepted[0] == both.num_guessed[0] == 17
