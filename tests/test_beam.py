"""Beam search over a table of transitions, against plain Python and against every sequence there is."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference import GenerationConfig, beam, group_beam
from inference.processors import History

V, START = 5, 3


@pytest.fixture(scope="module")
def table():
    """float32 [V, V]: logits of the token after each token."""
    return np.random.default_rng(4).normal(size=(V, V)).astype(np.float32) * 2


def search(table, steps, seed=0, **fields: Any):
    """[(weighed score, new tokens)] of one prompt, best first."""
    config = GenerationConfig(**fields)
    n = config.num_beams
    tokens = jnp.full((n, 1 + steps), START, jnp.int32)
    zero = jnp.int32(0)
    history = History(zero, zero, jnp.int32(steps), tokens=tokens, first=zero, end=jnp.int32(1))
    beams = beam.start(history, 1, steps, config)

    @jax.jit
    def step(beams, history, rngs):
        logits = jnp.asarray(table)[history.tokens[:, history.end - 1]]
        if config.num_beam_groups > 1:
            beams, moves, _ = group_beam.advance(beams, history, logits, config)
        else:
            beams, moves, _ = beam.advance(beams, history, logits, rngs, None, config)
        return beams, history.take(moves.parents[0]).append(moves.tokens[0])

    while int(history.step) < steps and bool(beams.goes_on):
        rngs = jax.random.fold_in(jax.random.key(seed), history.step)[None] if config.do_sample else None
        beams, history = step(beams, history, rngs)
    found = [
        (float(score), tuple(row[1 : 1 + length].tolist()))
        for score, row, length in zip(
            beams.ended.scores[0],
            np.asarray(beams.ended.tokens[0]),
            beams.ended.lengths[0].tolist(),
            strict=True,
        )
    ]
    return sorted(found, reverse=True), beams


def score(table, tokens, penalty):
    own = jax.nn.log_softmax(jnp.asarray(table), axis=-1)
    total = sum(float(own[a, b]) for a, b in zip((START, *tokens), tokens))  # noqa: B905
    return total / len(tokens) ** penalty


def every_sequence(steps, ends):
    """All that end at their first end, or at the limit."""
    for length in range(1, steps + 1):
        for tokens in itertools.product(range(V), repeat=length):
            open_until_last = not any(token in ends for token in tokens[:-1])
            if open_until_last and (length == steps or tokens[-1] in ends):
                yield tokens


@pytest.mark.parametrize("penalty", [0.0, 1.0, -1.0])
def test_enough_beams_find_the_best_of_all(table, penalty):
    # At 16 = 4 x 4 beams nothing that has not ended is lost in three steps.
    found, beams = search(table, 3, num_beams=16, eos_token_id=1, length_penalty=penalty)
    ranked = sorted(((score(table, t, penalty), t) for t in every_sequence(3, (1,))), reverse=True)
    assert [tokens for _, tokens in found[:4]] == [tokens for _, tokens in ranked[:4]]
    np.testing.assert_allclose([s for s, _ in found[:4]], [s for s, _ in ranked[:4]], rtol=1e-5)
    summed = np.asarray(beams.ended.logprobs[0, 0]).sum() / int(beams.ended.lengths[0, 0]) ** penalty
    np.testing.assert_allclose(summed, found[0][0], rtol=1e-5)


def plain_beams(table, steps, num_beams):
    """Beam search that nothing ends."""
    rows = [(0.0, ())]
    for _ in range(steps):
        longer = [(score(table, (*t, v), 0.0), (*t, v)) for _, t in rows for v in range(V)]
        rows = sorted(longer, reverse=True)[:num_beams]
    return rows


@pytest.mark.parametrize("num_beams", [2, 3])
def test_without_an_end_the_best_running_ones_are_kept(table, num_beams):
    found, beams = search(table, 6, num_beams=num_beams, length_penalty=0.0)
    assert [tokens for _, tokens in found] == [tokens for _, tokens in plain_beams(table, 6, num_beams)]
    assert np.asarray(beams.ended.indices[0]).min() >= 0


def test_early_stopping_stops_once_enough_have_ended(table):
    ends = (0, 1, 2)
    _, eager = search(table, 12, num_beams=2, eos_token_id=ends, early_stopping=True)
    _, patient = search(table, 12, num_beams=2, eos_token_id=ends, early_stopping="never")
    assert bool(eager.is_ended.all())
    assert not bool(eager.goes_on)
    assert float(patient.ended.scores.max()) >= float(eager.ended.scores.max())


def test_beams_that_are_sampled_follow_the_seed(table):
    runs = {
        tuple(search(table, 5, seed, num_beams=2, do_sample=True, top_k=0)[0][0][1])
        for seed in (0, 0, 1, 2, 3)
    }
    assert 1 < len(runs) <= 4
