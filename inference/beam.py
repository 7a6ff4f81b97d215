"""Beam search and beam sampling, one step at a time: pure functions that the decode loop calls.

Every prompt follows n hypotheses; hypothesis i of prompt p is row p * n + i of the loop's batch. A step scores all
continuations of a prompt's hypotheses together, and keeps more of them than n, so that n can go on when others end.
What is kept, when a prompt is done and how lengths are weighed is as in transformers 4.57.6, including its numbers for
minus infinity. The search in groups is `inference.group_beam`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from inference import sampling, stopping
from inference.generation_config import GenerationConfig
from inference.processors import History
from modelzoo.axes import constrain

NEVER = -1.0e9
"""A log-probability that nothing is chosen with, as transformers has it."""


class Hypotheses(struct.PyTreeNode):
    """Sequences of each prompt; n are running or ended, k are candidates.

    Attributes:
        scores: float32 [p, n], the sum of log-probabilities; of ended ones divided by the length.
        tokens: int32 [p, n, S], prompt and output.
        lengths: int32 [p, n], new tokens.
        indices: int32 [p, n, steps], the row of the loop's batch that each new token continued; -1 where none did.
        logprobs: float32 [p, n, steps], the model's own log-probability of each new token.
    """

    scores: jax.Array
    tokens: jax.Array
    lengths: jax.Array
    indices: jax.Array
    logprobs: jax.Array

    def take(self, places: jax.Array) -> "Hypotheses":
        """Those at `places`, int32 [p, m], of each prompt."""
        return jax.tree.map(lambda leaf: take(leaf, places), self)


class Beams(struct.PyTreeNode):
    """What a beam search knows beside the loop's state.

    Attributes:
        scores: float32 [p, n], of the running hypotheses.
        indices, logprobs: of the running hypotheses; see `Hypotheses`.
        ended: the best of those that have ended, best first (in a search in groups: by group).
        is_ended: bool [p, n], False where `ended` holds none yet.
        is_open: bool [p, groups], whether the hypotheses may still become better.
        goes_on: bool [].
    """

    scores: jax.Array
    indices: jax.Array
    logprobs: jax.Array
    ended: Hypotheses
    is_ended: jax.Array
    is_open: jax.Array
    goes_on: jax.Array


class Moves(struct.PyTreeNode):
    """How the loop's rows go on.

    Attributes:
        parents: int32 [p, n], which of its prompt's rows each row continues.
        tokens: int32 [p, n].
    """

    parents: jax.Array
    tokens: jax.Array


def take(rows: jax.Array, places: jax.Array) -> jax.Array:
    """[p, m, ...] of [p, n, ...]: each prompt's rows at `places` [p, m]."""
    return jax.vmap(lambda own, at: own[at])(rows, places)


def start(history: History, num_prompts: int, num_steps: int, config: GenerationConfig) -> Beams:
    """The search before its first token.

    Args:
        history: of the loop, rows repeated for the beams.
        num_prompts: p.
        num_steps: new tokens at most, or more.
        config: num_beams, groups and fill id.
    """
    num_beams, groups = config.num_beams, config.num_beam_groups
    # All beams are equal before the first token: only the first of each group counts.
    first = jnp.arange(num_beams) % (num_beams // groups) == 0
    none = jnp.full((num_prompts, num_beams, num_steps), -1, jnp.int32)
    assert history.tokens is not None
    shape = (num_prompts, num_beams)
    return Beams(
        scores=jnp.broadcast_to(jnp.where(first, 0.0, NEVER).astype(jnp.float32), shape),
        indices=none,
        logprobs=jnp.zeros(none.shape, jnp.float32),
        ended=Hypotheses(
            jnp.full(shape, NEVER, jnp.float32),
            history.tokens.reshape(*shape, -1),
            jnp.zeros(shape, jnp.int32),
            none,
            jnp.zeros(none.shape, jnp.float32),
        ),
        is_ended=jnp.zeros(shape, bool),
        is_open=jnp.ones((num_prompts, groups), bool),
        goes_on=jnp.array(True),
    )


def advance(
    beams: Beams,
    history: History,
    logits: jax.Array,
    rngs: jax.Array | None,
    stop_table: jax.Array | None,
    config: GenerationConfig,
) -> tuple[Beams, Moves, jax.Array]:
    """Continues every prompt's hypotheses by a token.

    Args:
        beams: of the search.
        history: of the rows [p * n].
        logits: [p * n, V], the model's.
        rngs: keys [p] of this step for beam sampling, or None.
        stop_table: of stop strings, or None.
        config: how.

    Returns:
        (the search, how the rows go on, the processed log-probabilities [p * n, V]).
    """
    (num_prompts, num_beams), vocab = beams.scores.shape, logits.shape[1]
    own = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    processed = sampling.process_logits(own, history, config)
    total = constrain(processed, "act_batch", None).reshape(num_prompts, num_beams, vocab)
    total = (total + beams.scores[:, :, None]).reshape(num_prompts, -1)

    num_kept = max(2, 1 + len(config.eos_ids)) * num_beams
    if config.do_sample:
        assert rngs is not None
        _, places = lax.top_k(total + sampling.gumbel(rngs, total.shape[1]), num_kept)  # without replacement
        scores = jnp.take_along_axis(total, places, axis=1)
    else:
        scores, places = lax.top_k(total, num_kept)
    parents, tokens = places // vocab, places % vocab
    new_length = history.step + 1
    ends = is_end(history, parents, tokens, stop_table, config) | (new_length == history.max_new)

    candidates = continued(beams, history, own, parents, tokens, scores)
    running_scores, chosen = lax.top_k(scores + ends.astype(jnp.float32) * NEVER, num_beams)
    running = candidates.take(chosen)

    # Only the best n may end: the others were kept to go on.
    just_ended = ends & (jnp.arange(num_kept) < num_beams)
    weighed = scores / length_factor(new_length, config)
    closed = jnp.zeros((num_prompts, 1), bool)
    if config.early_stopping is True:
        closed = beams.is_ended.all(axis=1, keepdims=True)
    for bars in (closed, ~beams.is_open, ~just_ended):
        weighed = weighed + bars.astype(jnp.float32) * NEVER
    ended, is_ended = merge(beams.ended, beams.is_ended, candidates.replace(scores=weighed), just_ended)

    best_length = history.max_new if _may_grow(config) else new_length
    best_possible = running_scores[:, :1] / length_factor(best_length, config)
    worst_ended = jnp.where(is_ended, ended.scores.min(axis=1, keepdims=True), NEVER)
    is_open = beams.is_open & (best_possible > worst_ended).any(axis=1, keepdims=True)
    goes_on = is_open.any() & ~ends.all()
    if config.early_stopping is True:
        goes_on = goes_on & ~is_ended.all()
    beams = Beams(running_scores, running.indices, running.logprobs, ended, is_ended, is_open, goes_on)
    return beams, Moves(take(parents, chosen), take(tokens, chosen)), processed


def is_end(
    history: History,
    parents: jax.Array,
    tokens: jax.Array,
    stop_table: jax.Array | None,
    config: GenerationConfig,
) -> jax.Array:
    """bool [p, k], whether each token ends the hypothesis that it continues, other than by the limit."""
    ends = jnp.isin(tokens, jnp.asarray(config.eos_ids, jnp.int32))
    if stop_table is not None:
        assert history.stop_states is not None
        states = take(history.stop_states.reshape(len(parents), -1), parents)
        ends = ends | stopping.step(stop_table, states, tokens)[1]
    return ends


def continued(
    beams: Beams, history: History, own: jax.Array, parents: jax.Array, tokens: jax.Array, scores: jax.Array
) -> Hypotheses:
    """The hypotheses that `parents` [p, k] become with `tokens` [p, k].

    Args:
        beams, history: before the step.
        own: float32 [rows, V], the model's log-probabilities.
        parents: counted among each prompt's rows.
        tokens: the new ones.
        scores: float32 [p, k], what the candidates are to hold.
    """
    (num_prompts, num_beams), step = beams.scores.shape, history.step
    assert history.tokens is not None
    assert history.end is not None
    rows = parents + jnp.arange(num_prompts, dtype=jnp.int32)[:, None] * num_beams
    text = take(history.tokens.reshape(num_prompts, num_beams, -1), parents)

    def write(array: jax.Array, value: jax.Array, place: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(array, value[..., None].astype(array.dtype), place, axis=2)

    return Hypotheses(
        scores,
        write(text, tokens, history.end),
        jnp.broadcast_to(step + 1, parents.shape),
        write(take(beams.indices, parents), rows, step),
        write(take(beams.logprobs, parents), own[rows, tokens], step),
    )


def merge(
    ended: Hypotheses, is_ended: jax.Array, candidates: Hypotheses, just_ended: jax.Array
) -> tuple[Hypotheses, jax.Array]:
    """The best n of those that had ended and the candidates [p, k], best first, and which of them have ended."""
    both: Any = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), ended, candidates)
    _, best = lax.top_k(both.scores, is_ended.shape[1])
    return both.take(best), take(jnp.concatenate([is_ended, just_ended], axis=1), best)


def length_factor(length: jax.Array, config: GenerationConfig) -> jax.Array:
    """What a hypothesis of so many new tokens has its score divided by (Wu et al., 2016, arXiv:1609.08144)."""
    return length.astype(jnp.float32) ** config.length_penalty


def _may_grow(config: GenerationConfig) -> bool:
    """Whether a running hypothesis is judged by the greatest length that it may reach."""
    return config.early_stopping == "never" and config.length_penalty > 0.0
