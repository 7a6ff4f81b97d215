"""Guessing tokens and checking them in one pass (Leviathan et al., 2023, arXiv:2211.17192).

One pass of the model over a row's newest token and the guesses after it gives the logits of every one of them. Tokens
are then chosen from these one after another, by the processors that would have chosen them anyway, for as long as they
are what was guessed. A row of a batch goes on as far as its own guesses are right, whatever the others do: it has a
step, an end and a place in the cache of its own.

Prompt lookup (Saxena, 2023) guesses that what followed the newest tokens before, in the prompt, the output or an
encoder's input, follows them again. The noise is that of the plain loop, so the tokens are too, greedy or sampled: a
guess is taken with the probability that the model gives it, and in its place comes a token of the rest of the
distribution. `inference.drafting` guesses by a smaller model.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

import modelzoo
from inference import sampling
from inference.forward import carried, loaded, read_tokens
from inference.generation_config import GenerationConfig
from inference.processors import History

DEFAULT_NGRAM = 2
"""transformers' default of max_matching_ngram_size."""
Choose = Callable[[jax.Array, jax.Array | None, jax.Array], jax.Array]
"""(processed logits [B, V], keys [B] of each row's step, which guess is checked) -> tokens [B]."""


class Tally(struct.PyTreeNode):
    """What guessing was good for.

    Attributes:
        passes: int32 [], of the model over the batch, those without guesses included.
        checked: int32 [B], guesses of each row that were held against the model.
        accepted: int32 [B], of these, how many were right.
    """

    passes: jax.Array
    checked: jax.Array
    accepted: jax.Array

    @classmethod
    def empty(cls, num_rows: int) -> "Tally":
        """Before the first guess."""
        return cls(jnp.int32(0), jnp.zeros(num_rows, jnp.int32), jnp.zeros(num_rows, jnp.int32))


class Guesser(Protocol):
    """Where guesses come from."""

    def knows(self, state: Any, num_guesses: int) -> jax.Array:
        """bool [B], the rows that have a guess."""
        ...

    def guess(self, state: Any, num_guesses: int) -> tuple[jax.Array, Any, Choose]:
        """(guesses int32 [B, num_guesses], -1 where there is none; the state; how tokens are chosen)."""
        ...


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Prompt lookup.

    Attributes:
        config: of the generation.
    """

    config: GenerationConfig

    def knows(self, state: Any, num_guesses: int) -> jax.Array:
        """Rows whose newest token has occurred before."""
        return self._look_up(state, num_guesses)[1]

    def guess(self, state: Any, num_guesses: int) -> tuple[jax.Array, Any, Choose]:
        """What followed it."""

        def choose(processed: jax.Array, rngs: jax.Array | None, place: jax.Array) -> jax.Array:
            return sampling.choose(processed, rngs, self.config)

        if not num_guesses:
            return jnp.zeros((len(state.finished), 0), jnp.int32), state, choose
        found, known = self._look_up(state, num_guesses)
        return jnp.where(known[:, None], found, -1), state, choose

    def _look_up(self, state: Any, num_guesses: int) -> tuple[jax.Array, jax.Array]:
        return look_up(state.history, num_guesses, self.config.max_matching_ngram_size or DEFAULT_NGRAM)


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
    slots, text = jnp.arange(history.tokens.shape[1]), history.tokens
    first, end = history.first.reshape(-1, 1), history.end.reshape(-1, 1)
    real = (slots >= first) & (slots < end)
    newest = end
    if history.source is not None:
        assert history.source_real is not None
        text = jnp.concatenate([history.source, text], axis=1)
        real = jnp.concatenate([history.source_real, real], axis=1)
        newest = end + history.source.shape[1]
    num_rows, length = text.shape
    ends = jnp.cumsum(~real, axis=1)  # equal where only real tokens stand between
    places = jnp.arange(length)
    best = jnp.full((num_rows,), -1)
    for size in range(1, max_ngram + 1):  # longer ones overrule
        at = jnp.broadcast_to(newest - size + jnp.arange(size), (num_rows, size))
        tail = jnp.take_along_axis(text, jnp.maximum(at, 0), axis=1)
        matches = end - first > size
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


def newest(history: History) -> jax.Array:
    """int32 [B], each row's newest token."""
    assert history.tokens is not None
    assert history.end is not None
    at = jnp.broadcast_to(history.end.reshape(-1, 1) - 1, (history.tokens.shape[0], 1))
    return jnp.take_along_axis(history.tokens, at, axis=1)[:, 0]


def by_row(state: Any) -> Any:
    """A state whose rows have all come equally far, made ready for rows that do not."""
    num_rows = len(state.finished)

    def spread(number: jax.Array) -> jax.Array:
        return jnp.broadcast_to(number, (num_rows,))

    history = state.history.replace(step=spread(state.history.step), end=spread(state.history.end))
    caches = (state.cache, state.draft_cache)
    cache, draft_cache = (
        None if c is None else dataclasses.replace(c, index=spread(c.index)) for c in caches
    )
    return state.replace(history=history, cache=cache, draft_cache=draft_cache, tally=Tally.empty(num_rows))


def kept(cache: modelzoo.Cache, before: jax.Array, num_taken: jax.Array) -> modelzoo.Cache:
    """A cache that has read guesses, without those that were not taken.

    Args:
        cache: after reading.
        before: int32 [B], its index before.
        num_taken: int32 [B], tokens that stay.
    """
    index = before + num_taken
    mask = cache.mask & (jnp.arange(cache.mask.shape[1]) < index[:, None])
    return dataclasses.replace(cache, index=index, mask=mask, cross=None)


def proceed(
    model: modelzoo.Model,
    params: Any,
    state: Any,
    until: jax.Array,
    *,
    guesser: Guesser,
    num_guesses: int,
    append: Callable[..., Any],
    cross: Any,
    source_mask: jax.Array | None,
) -> Any:
    """The decode loop with guesses; traced by `loop.proceed`.

    Args:
        model, params: of the generation.
        state: the loop's, `by_row`, its caches as `carried`.
        until: new tokens at which a row waits for the caller.
        guesser: guesses.
        num_guesses: K, at a time.
        append: of the loop: (state, logits [B, V], rows that take a token, how it is chosen) -> state.
        cross: an encoder-decoder's part of the cache, which the loop does not carry.
        source_mask: of its encoder.
    """

    def goes_on(state: Any) -> jax.Array:
        return ~state.finished & (state.history.step < until)

    def pays(state: Any) -> jax.Array:
        """Whether half of the rows have a guess, and no row that will be read again would be written past its end."""
        rows = goes_on(state)
        known = guesser.knows(state, num_guesses) & rows
        fits = state.history.end + num_guesses <= state.history.tokens.shape[1]
        return (2 * known.sum() >= rows.sum()) & (fits | state.finished).all()

    def check(state: Any, num: int) -> Any:
        """One pass: each row's newest token, `num` guesses after it, and the tokens that follow from them."""
        before = state
        guesses, state, choose = guesser.guess(state, num)
        tokens = jnp.concatenate([newest(state.history)[:, None], jnp.maximum(guesses, 0)], axis=1)
        positions = state.positions[:, None] + jnp.arange(num + 1)
        cache = dataclasses.replace(loaded(state.cache), cross=cross)
        with jax.named_scope("check_guesses"):
            logits, read = read_tokens(model, params, tokens, positions, cache, source_mask)
        guessed = jnp.pad(guesses, ((0, 0), (0, 1)), constant_values=-1)

        def accept(carry: tuple[jax.Array, jax.Array, Any]) -> tuple[jax.Array, jax.Array, Any]:
            place, rows, state = carry
            here = lax.dynamic_index_in_dim(guessed, place, axis=1, keepdims=False)
            state = append(
                state,
                lax.dynamic_index_in_dim(logits, place, axis=1, keepdims=False),
                rows,
                lambda processed, rngs: choose(processed, rngs, place),
            )
            right = rows & (newest(state.history) == here)
            checked = state.tally.checked + (rows & (here >= 0)).astype(jnp.int32)
            accepted = state.tally.accepted + right.astype(jnp.int32)
            tally = state.tally.replace(checked=checked, accepted=accepted)
            return place + 1, right & goes_on(state), state.replace(tally=tally)

        start = (jnp.int32(0), goes_on(state), state.replace(cache=None, draft_cache=None))
        _, _, chosen = lax.while_loop(lambda carry: carry[1].any(), accept, start)
        num_taken = chosen.history.step - before.history.step
        draft_cache = state.draft_cache
        if draft_cache is not None:
            draft_cache = kept(draft_cache, before.draft_cache.index, num_taken)
        return chosen.replace(
            cache=carried(kept(read, cache.index, num_taken)),
            draft_cache=draft_cache,
            positions=state.positions + num_taken,
            tally=chosen.tally.replace(passes=chosen.tally.passes + 1),
        )

    def body(state: Any) -> Any:
        # Loops rather than a condition: they update the cache in place.
        state = lax.while_loop(lambda s: goes_on(s).any() & ~pays(s), lambda s: check(s, 0), state)
        return lax.while_loop(lambda s: goes_on(s).any() & pays(s), lambda s: check(s, num_guesses), state)

    return lax.while_loop(lambda s: goes_on(s).any(), body, state)
