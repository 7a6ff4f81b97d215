"""Guesses of a smaller model, by rejection sampling (Leviathan et al., 2023; Chen et al., 2023, arXiv:2302.01318).

The draft model writes as the model itself would, with the same processors; its every token g, drawn from q, is taken
with probability min(1, p(g) / q(g)), and replaced by one drawn from max(0, p - q) otherwise. What comes out is
distributed as p, whatever q is; without sampling, it is the model's most probable token.

The token after the last guess is made the same way, from what the draft would have guessed next. So a sampled token
depends on the text before it and on its row's key alone: not on how many tokens are guessed at a time, nor on where a
pass begins.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import modelzoo
from inference import sampling
from inference.forward import carried, decode_step, loaded
from inference.generation_config import GenerationConfig
from inference.speculative import Choose, newest

DEFAULT_DRAFT_TOKENS = 4
_DRAWN, _WEIGHED, _REPLACED = range(3)
"""What a row's key of a step is folded with: each is a random number of its own."""


@dataclasses.dataclass(frozen=True)
class Draft:
    """A model that guesses; see `speculative.Guesser`.

    Attributes:
        model, params: the draft's, layers unstacked.
        config: of the generation.
        cross, source_mask: of an encoder-decoder draft.
    """

    model: modelzoo.Model
    params: Any
    config: GenerationConfig
    cross: Any
    source_mask: jax.Array | None

    def knows(self, state: Any, num_guesses: int) -> jax.Array:
        """All rows."""
        return jnp.ones(state.finished.shape, bool)

    def guess(self, state: Any, num_guesses: int) -> tuple[jax.Array, Any, Choose]:
        """Writes on, one token more than is asked for: the draft's cache needs what it has read of the last."""
        config, rows = self.config, ~state.finished
        positions = state.positions

        def write(carry: Any, i: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array | None]]:
            token_B, history, cache = carry
            cache = dataclasses.replace(loaded(cache), cross=self.cross)
            logits, cache = decode_step(
                self.model, self.params, token_B, positions + i, cache, self.source_mask
            )
            processed = sampling.process_logits(logits, history, config)
            rngs = None
            if config.do_sample:
                steps = jax.vmap(jax.random.fold_in)(state.rngs, history.step)
                rngs = _folded(steps, _DRAWN)
            token_B = sampling.choose(processed, rngs, config)
            cache = carried(dataclasses.replace(cache, cross=None))
            return (token_B, history.append(token_B, rows), cache), (
                token_B,
                processed if config.do_sample else None,
            )

        start = (newest(state.history), state.history, state.draft_cache)
        places = jnp.arange(num_guesses + 1, dtype=jnp.int32)
        with jax.named_scope("draft"):
            (_, _, cache), (tokens, drafted) = lax.scan(write, start, places)

        def choose(processed: jax.Array, rngs: jax.Array | None, place: jax.Array) -> jax.Array:
            if not config.do_sample:
                return sampling.choose(processed, rngs, config)
            assert drafted is not None
            assert rngs is not None
            return reject_or_take(tokens[place], drafted[place], processed, rngs)

        return tokens[:num_guesses].T, state.replace(draft_cache=cache), choose


def reject_or_take(guess_B: jax.Array, drafted: jax.Array, wanted: jax.Array, rngs: jax.Array) -> jax.Array:
    """Tokens distributed as one model says, of guesses that were drawn as another does.

    Args:
        guess_B: int32 [B], drawn from the softmax of `drafted`.
        drafted, wanted: float32 [B, V], processed logits of the draft and of the model.
        rngs: keys [B], independent of the guesses.

    Returns:
        int32 [B].
    """
    q, p = jax.nn.softmax(drafted, axis=-1), jax.nn.softmax(wanted, axis=-1)
    q_guess, p_guess = (jnp.take_along_axis(x, guess_B[:, None], axis=1)[:, 0] for x in (q, p))
    takes = jax.vmap(jax.random.uniform)(_folded(rngs, _WEIGHED)) * q_guess < p_guess
    rest = jnp.maximum(p - q, 0.0)
    # Where nothing is left but rounding, the two are one distribution.
    rest = jnp.log(jnp.where(rest.sum(axis=-1, keepdims=True) > 0, rest, p))
    noise = sampling.gumbel(_folded(rngs, _REPLACED), p.shape[1])
    _, highest = lax.top_k(rest + noise, 1)
    return jnp.where(takes, guess_B, highest[:, 0])


def _folded(rngs: jax.Array, number: int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(rngs, number)


def check_draft(model: modelzoo.Model, draft: Any, config: GenerationConfig, length: int) -> GenerationConfig:
    """The config with the number of guesses, or what is wrong with a draft model.

    Args:
        model: the model that is to be helped.
        draft: (model, parameters), or None.
        config: of the generation.
        length: of prompt and new tokens together, as slots.

    Raises:
        ValueError: it is no draft for this model.
    """
    if draft is None:
        if config.num_draft_tokens is not None:
            raise ValueError(
                f"num_draft_tokens = {config.num_draft_tokens}: there is no draft model, pass draft=(model, params)"
            )
        return config
    if not (isinstance(draft, tuple) and len(draft) == 2 and isinstance(draft[0], modelzoo.Model)):
        raise ValueError("draft is (model, params), a model of the zoo and its parameters")
    name, of = type(draft[0]).__name__, draft[0].config
    if config.num_beams > 1:
        raise ValueError(f"num_beams = {config.num_beams}: beams are not guessed, leave draft out")
    if config.prompt_lookup_num_tokens is not None:
        raise ValueError(
            f"prompt_lookup_num_tokens = {config.prompt_lookup_num_tokens}: guesses come from it or from a draft model"
        )
    if draft[0].task != model.task:
        raise ValueError(
            f"the draft is a {name}, whose task is {draft[0].task}: {type(model).__name__} takes one of {model.task}"
        )
    if of.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"the draft has a vocabulary of {of.vocab_size} tokens and the model one of {model.config.vocab_size}: "
            "a draft guesses in the model's own tokens"
        )
    if of.max_positions is not None and length > of.max_positions:
        raise ValueError(
            f"the draft has {of.max_positions} positions, and prompt and new tokens take {length}: "
            "shorten them, or take another draft"
        )
    return dataclasses.replace(config, num_draft_tokens=config.num_draft_tokens or DEFAULT_DRAFT_TOKENS)
