"""Guessing tokens from earlier text and checking them in one pass (Leviathan et al., 2023, arXiv:2211.17192).

Prompt lookup (Saxena, 2023): where the newest tokens have stood before, in the prompt, the output or an encoder's
input, what followed them there is guessed to follow again. One pass of the model over the guesses gives the logits of
every one of them; tokens are then chosen from these one after another, by the processors and the noise that would have
chosen them anyway, for as long as they are what was guessed. So the tokens are those of the plain loop, greedy or
sampled: a guess is taken with the probability that the model gives it, and in its place comes a token of the rest of
the distribution. Rows of a batch go on together, as far as the guesses of all are right; one row gains the most.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import modelzoo
from inference.forward import carried, loaded, read_tokens
from inference.processors import History

DEFAULT_NGRAM = 2
"""transformers' default of max_matching_ngram_size."""


def look_up(history: History, num_guesses: int, max_ngram: int) -> tuple[jax.Array, jax.Array]:
    """Guesses the next tokens of each row.

    The longest run of newest tokens that has occurred counts; of its places the last that as many tokens follow as are
    wanted, or else the first.

    Args:
        history: with tokens; with a source, that is text too.
        num_guesses: K.
        max_ngram: of the newest tokens, how many are looked for at most.

    Returns:
        (int32 [B, K], anything where nothing is known; bool [B], whether something is).
    """
    assert history.tokens is not None
    assert history.first is not None
    assert history.end is not None
    slots = jnp.arange(history.tokens.shape[1])
    text = history.tokens
    real = (slots >= history.first.reshape(-1, 1)) & (slots < history.end)
    offset = 0
    if history.source is not None:
        assert history.source_real is not None
        text = jnp.concatenate([history.source, text], axis=1)
        real = jnp.concatenate([history.source_real, real], axis=1)
        offset = history.source.shape[1]
    num_rows, length = text.shape
    ends = jnp.cumsum(~real, axis=1)  # equal where only real tokens stand between
    places = jnp.arange(length)
    best = jnp.full((num_rows,), -1)
    for size in range(1, max_ngram + 1):  # longer ones overrule
        tail = lax.dynamic_slice_in_dim(text, offset + history.end - size, size, axis=1)
        matches = history.end - history.first.reshape(-1, 1) > size
        for i in range(size):
            # A match ends before `place`, where what follows it begins.
            matches = matches & (_shifted(text, size - i) == tail[:, i : i + 1]) & _shifted(real, size - i)
        matches = matches & real & (places >= size)
        last = jnp.minimum(places + num_guesses - 1, length - 1)
        whole = real[:, last] & (ends[:, last] == ends) & (places + num_guesses <= length)
        rank = jnp.where(matches, jnp.where(whole, length + places, length - places), 0)
        found = jnp.argmax(rank, axis=1)
        best = jnp.where(rank.max(axis=1) > 0, found, best)
    at = jnp.minimum(jnp.maximum(best, 0)[:, None] + jnp.arange(num_guesses), length - 1)
    return jnp.take_along_axis(text, at, axis=1), best >= 0


def _shifted(array: jax.Array, by: int) -> jax.Array:
    """What stood `by` slots before each slot."""
    return jnp.roll(array, by, axis=1)


def proceed(
    model: modelzoo.Model,
    params: Any,
    state: Any,
    *,
    num_guesses: int,
    max_ngram: int,
    unfinished: Callable[[Any], jax.Array],
    plain_step: Callable[[Any], Any],
    choose: Callable[[Any, jax.Array], Any],
    newest: Callable[[History], jax.Array],
    cross: Any,
    source_mask: jax.Array | None,
) -> Any:
    """The decode loop with guesses; traced by `loop.proceed`, whose parts it is given.

    Args:
        model, params: of the generation.
        state: the loop's, its cache as `carried`.
        num_guesses, max_ngram: as `look_up`.
        unfinished: whether the loop goes on.
        plain_step: one token, where there is nothing to guess or no room in the cache for guesses.
        choose: appends the tokens chosen from logits [B, V] to a state.
        newest: each row's newest token.
        cross: an encoder-decoder's part of the cache, which the loop does not carry.
        source_mask: of its encoder.
    """

    def has_guess(state: Any) -> jax.Array:
        # A finished row needs no guess.
        known = look_up(state.history, num_guesses, max_ngram)[1] | state.finished
        return known.all() & (state.history.end + num_guesses <= state.history.tokens.shape[1])

    def guess(state: Any) -> Any:
        guesses, _ = look_up(state.history, num_guesses, max_ngram)
        tokens = jnp.concatenate([newest(state.history)[:, None], guesses], axis=1)
        positions = state.positions[:, None] + jnp.arange(num_guesses + 1)
        cache = dataclasses.replace(loaded(state.cache), cross=cross)
        with jax.named_scope("check_guesses"):
            logits, read = read_tokens(model, params, tokens, positions, cache, source_mask)

        def agrees(carry: tuple[jax.Array, jax.Array, Any]) -> jax.Array:
            _, right, chosen = carry
            return right & unfinished(chosen)

        def accept(carry: tuple[jax.Array, jax.Array, Any]) -> tuple[jax.Array, jax.Array, Any]:
            place, _, chosen = carry
            open_rows = ~chosen.finished
            chosen = choose(chosen, lax.dynamic_index_in_dim(logits, place, axis=1, keepdims=False))
            guessed = lax.dynamic_index_in_dim(guesses, place, axis=1, keepdims=False)
            same = jnp.where(open_rows, newest(chosen.history) == guessed, True).all()
            return place + 1, same & (place < num_guesses), chosen

        start = (jnp.int32(0), jnp.array(True), state.replace(cache=None))
        num_taken, _, chosen = lax.while_loop(agrees, accept, start)
        index = cache.index + num_taken
        mask = read.mask & (jnp.arange(read.mask.shape[1]) < index)
        read = dataclasses.replace(read, index=index, mask=mask, cross=None)
        return chosen.replace(cache=carried(read), positions=state.positions + num_taken)

    def body(state: Any) -> Any:
        # Loops rather than a condition: they update the cache in place.
        state = lax.while_loop(lambda s: unfinished(s) & ~has_guess(s), plain_step, state)
        return lax.while_loop(lambda s: unfinished(s) & has_guess(s), guess, state)

    return lax.while_loop(unfinished, body, state)
