"""Logits processors against plain Python on lists that grow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference import GenerationConfig, processors, sampling
from inference.processors import History

INF, V = float("inf"), 12


def past(rows, **fields):
    """A history whose rows are lists of tokens of one length, in slots from 2 on."""
    tokens = jnp.array([[7, 7, *row, 0, 0, 0] for row in rows], jnp.int32)
    length = len(rows[0])
    defaults = dict(step=jnp.int32(0), min_new=jnp.int32(0), max_new=jnp.int32(10), tokens=tokens)
    return History(**(defaults | dict(first=jnp.int32(2), end=jnp.int32(2 + length)) | fields))


@pytest.fixture
def logits(rng):
    return jax.random.normal(rng, (2, V))


def hidden(logits):
    return [set(np.flatnonzero(np.isneginf(row)).tolist()) for row in np.asarray(logits)]


def banned(row, text, size):
    """Every token that follows, somewhere in `text`, what the last size - 1 tokens of `row` are."""
    tail = row[len(row) - size + 1 :]
    return {text[i + size - 1] for i in range(len(text) - size + 1) if text[i : i + size - 1] == tail}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9])
def test_no_run_of_tokens_occurs_twice(logits, size):
    rows = [[1, 2, 3, 1, 2, 4, 1, 2], [5, 5, 5, 5, 6, 5, 5, 5]]
    out = processors.ban_repeats(logits, past(rows), size)
    assert hidden(out) == [banned(row, row, size) for row in rows]
    kept = np.isfinite(out)
    np.testing.assert_array_equal(np.asarray(out)[kept], np.asarray(logits)[kept])


def test_what_stands_before_the_first_slot_does_not_count(logits):
    assert hidden(processors.ban_repeats(logits, past([[3, 7], [3, 7]]), 2)) == [set(), set()]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_run_of_the_source_is_generated(logits, size):
    rows, sources = [[1, 2], [3, 1]], [[1, 2, 4, 2, 5], [1, 2, 3, 1, 6]]
    real = jnp.array([[True] * 5, [True] * 4 + [False]])
    history = past(rows, source=jnp.array(sources), source_real=real)
    out = processors.ban_source_repeats(logits, history, size)
    texts = [sources[0], sources[1][:4]]
    assert hidden(out) == [banned(row, text, size) for row, text in zip(rows, texts, strict=True)]


def test_biases_of_tokens_and_of_sequences(logits):
    biases = (((3,), 0.5), ((1, 2, 4), 2.0), ((2, 4), -1.0), ((9, 9), 5.0), ((5, 5, 1, 2, 8), -INF))
    out = processors.add_biases(logits, past([[5, 1, 2], [1, 2, 2]]), biases)
    expected = np.array(logits)
    expected[:, 3] += 0.5
    expected[0, 4] += np.float32(1.0)
    expected[1, 4] -= 1.0
    np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_a_sequence_waits_until_the_row_is_as_long_as_it(logits):
    for row, applies in (([1, 2], False), ([5, 1, 2], True)):
        out = processors.add_biases(logits, past([row, row]), (((1, 2, 4), -INF),))
        assert hidden(out) == [{4} if applies else set()] * 2


def test_counts_are_penalised_by_frequency_and_presence():
    out = processors.penalize_counts(jnp.zeros((1, 3)), jnp.array([[0, 1, 3]]), 0.5, jnp.array([[0.25]]))
    assert out.tolist() == [[0.0, -0.75, -1.75]]


def test_invalid_values_become_finite_and_padding_stays_hidden():
    out = processors.make_finite(jnp.array([[jnp.nan, INF, -INF, 1.0, -INF]]), vocab_size=4)
    limits = jnp.finfo(jnp.float32)
    assert out.tolist() == [[0.0, float(limits.max), float(limits.min), 1.0, -INF]]


def test_the_end_is_urged_the_more_the_longer(logits):
    for steps, power in ((-1, 1.0), (0, 1.0), (1, 1.5), (3, 1.5**3)):
        out = processors.urge(logits, (2,), 1.5, jnp.int32(steps))
        expected = logits[:, 2] + jnp.abs(logits[:, 2]) * (power - 1)
        np.testing.assert_allclose(out[:, 2], expected, rtol=1e-6)
    assert hidden(processors.urge(jnp.full((1, V), -INF), (2,), 1.5, jnp.int32(4))) == [set(range(V))]


@pytest.mark.parametrize(
    ("fields", "state", "kept"),
    [
        (dict(forced_bos_token_id=4), dict(prompt_length=1), {4}),
        (dict(forced_bos_token_id=4), dict(prompt_length=2), set(range(V))),
        (dict(begin_suppress_tokens=(4,)), dict(prompt_length=1), set(range(V)) - {4}),
        (dict(begin_suppress_tokens=(4,), forced_bos_token_id=5), dict(prompt_length=1), {5}),
        (
            dict(begin_suppress_tokens=(4,), forced_bos_token_id=5),
            dict(prompt_length=1, step=1),
            set(range(V)) - {4},
        ),
        (dict(bad_words_ids=((3,), (2,)), eos_token_id=2), dict(prompt_length=1), set(range(V)) - {3}),
        (dict(encoder_no_repeat_ngram_size=1), dict(), set(range(V)) - {1, 6}),
    ],
    ids=str,
)
def test_what_the_config_turns_on_is_applied(logits, fields, state, kept):
    arrays = {name: jnp.int32(value) for name, value in state.items()}
    source = jnp.array([[1, 6]] * 2)
    history = past([[5, 1], [5, 1]], source=source, source_real=jnp.ones((2, 2), bool), **arrays)
    out = sampling.process_logits(logits, history, GenerationConfig(**fields))
    assert set(range(V)) - hidden(out)[0] == kept


def test_history_appends_and_takes_rows():
    history = past([[1, 2], [3, 4]], seen=jnp.zeros((2, V), bool), counts=jnp.zeros((2, V), jnp.int32))
    history = history.append(jnp.array([5, 6])).take(jnp.array([1, 1])).append(jnp.array([6, 7]))
    assert history.tokens is not None
    assert history.tokens[:, 2:6].tolist() == [[3, 4, 6, 6], [3, 4, 6, 7]]
    assert (history.step, history.end) == (2, 6)
    assert history.counts is not None
    assert history.counts[:, 6].tolist() == [2, 1]
    assert history.seen is not None
    assert history.seen[1].tolist() == [token in (6, 7) for token in range(V)]


def test_rows_may_end_at_slots_of_their_own():
    history = past([[1, 2, 1], [3, 4, 0]], first=jnp.array([2, 2]), end=jnp.array([5, 4]))
    assert hidden(processors.ban_repeats(jnp.zeros((2, V)), history, 2)) == [{2}, set()]
    history = history.append(jnp.array([2, 3]))
    assert history.tokens is not None
    assert history.tokens[:, 2:6].tolist() == [[1, 2, 1, 2], [3, 4, 3, 0]]
    assert hidden(processors.ban_repeats(jnp.zeros((2, V)), history, 2)) == [{1}, {4}]
