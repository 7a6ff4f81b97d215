"""Diverse beam search (Vijayakumar et al., 2016, arXiv:1610.02424): groups of beams that avoid each other's tokens.

The groups of a prompt take their turns at each step. A group is a beam search of its own, but for the penalty on
tokens that groups before it chose in this step. Hypotheses end, are weighed and are closed as in the BeamSearchScorer
of transformers 4.57.6; an ended hypothesis ends with the first eos_token_id, and a group that is done counts as
choosing padding.
"""

import jax
import jax.numpy as jnp
from jax import lax

from inference import beam, sampling
from inference.beam import NEVER, Beams, Hypotheses, Moves, take
from inference.generation_config import GenerationConfig
from inference.processors import History


def advance(
    beams: Beams, history: History, logits: jax.Array, config: GenerationConfig
) -> tuple[Beams, Moves, jax.Array]:
    """Continues every prompt's hypotheses by a token, group after group; see `beam.advance`."""
    num_prompts, num_beams = beams.scores.shape
    size, vocab = num_beams // config.num_beam_groups, logits.shape[1]
    own = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    chosen = jnp.zeros((num_prompts, vocab), jnp.int32)
    results: list[tuple[Beams, Moves, jax.Array]] = []
    for group in range(config.num_beam_groups):
        members = jnp.arange(group * size, (group + 1) * size)
        rows = (jnp.arange(num_prompts)[:, None] * num_beams + members).reshape(-1)
        past = history.take(rows)
        if group:
            past = past.replace(rivals=jnp.repeat(chosen, size, axis=0))
        processed = sampling.process_logits(own[rows], past, config)
        result = _advance_group(beams, history, own, processed, group, config)
        results.append((*result, processed.reshape(num_prompts, size, vocab)))
        tokens = result[1].tokens
        chosen = chosen.at[jnp.arange(num_prompts)[:, None], tokens].add(1)
    parts, moves, processed = zip(*results, strict=True)
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *parts)
    moves = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *moves)
    joined = joined.replace(goes_on=joined.is_open.any())
    return joined, moves, jnp.concatenate(processed, axis=1).reshape(-1, vocab)


def _advance_group(
    beams: Beams,
    history: History,
    own: jax.Array,
    processed: jax.Array,
    group: int,
    config: GenerationConfig,
) -> tuple[Beams, Moves]:
    """One group's part of the search and of the moves; `goes_on` is [p, 1], to be joined like the rest."""
    num_prompts, num_beams = beams.scores.shape
    size, vocab = num_beams // config.num_beam_groups, own.shape[1]
    mine = slice(group * size, (group + 1) * size)
    is_open = beams.is_open[:, group : group + 1]
    total = processed.reshape(num_prompts, size, vocab) + beams.scores[:, mine, None]
    num_kept = max(2, 1 + len(config.eos_ids)) * size
    scores, places = lax.top_k(total.reshape(num_prompts, -1), num_kept)
    parents, tokens = group * size + places // vocab, (places % vocab).astype(jnp.int32)
    ends = beam.is_end(history, parents, tokens, None, config)

    rank = jnp.arange(num_kept)
    going = jnp.argsort(jnp.where(ends, num_kept, 0) + rank, axis=1)[:, :size]
    candidates = beam.continued(beams, history, own, parents, tokens, scores)
    running = candidates.take(going)

    new_length = history.step + 1
    just_ended = ends & (rank < size) & is_open
    last = jnp.int32(config.eos_ids[0] if config.eos_ids else 0)
    assert history.end is not None
    text = lax.dynamic_update_slice_in_dim(
        candidates.tokens, jnp.full((*tokens.shape, 1), last), history.end, axis=2
    )
    weighed = jnp.where(just_ended, scores / beam.length_factor(new_length, config), NEVER)
    ended, is_ended = beam.merge(
        jax.tree.map(lambda leaf: leaf[:, mine], beams.ended),
        beams.is_ended[:, mine],
        candidates.replace(scores=weighed, tokens=text),
        just_ended,
    )
    full = is_ended.all(axis=1, keepdims=True)
    if config.early_stopping is not True:
        longest = config.early_stopping == "never" and config.length_penalty > 0.0
        best = scores.max(axis=1, keepdims=True)
        best = best / beam.length_factor(history.max_new if longest else new_length, config)
        full = full & (ended.scores.min(axis=1, keepdims=True) >= best)
    limit, still_open = new_length == history.max_new, is_open & ~full
    ended, is_ended = _add_running(ended, is_ended, running, still_open & limit, new_length, config)
    part = Beams(
        jnp.where(is_open, running.scores, 0.0),
        running.indices,
        running.logprobs,
        ended,
        is_ended,
        still_open & ~limit,
        is_open,
    )
    fill = jnp.where(is_open, take(tokens, going), config.fill_id)
    return part, Moves(take(parents, going), fill)


def _add_running(
    ended: Hypotheses,
    is_ended: jax.Array,
    running: Hypotheses,
    applies: jax.Array,
    length: jax.Array,
    config: GenerationConfig,
) -> tuple[Hypotheses, jax.Array]:
    """At the limit, running hypotheses count as ended."""
    weighed = jnp.where(applies, running.scores / beam.length_factor(length, config), NEVER)
    return beam.merge(
        ended, is_ended, running.replace(scores=weighed), jnp.broadcast_to(applies, weighed.shape)
    )
