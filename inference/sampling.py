"""Choosing the next token: every processor that a GenerationConfig turns on, in their order, and the choice.

Each computes what transformers 4.57.6 does, in its order. Nothing sorts a vocabulary: top-k selects, and top-p and
typical find their threshold by bisection, in a twentieth of the time of a sort on a CPU. Gumbel noise rather than an
inverse CDF draws the sample, so that a token of probability zero can never come out. Numbers may be Python's, or arrays
[B, 1], one a row.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from inference import processors
from inference.generation_config import GenerationConfig
from inference.processors import HIDDEN, History, force, penalize, suppress
from modelzoo.axes import constrain

__all__ = ["HIDDEN", "History", "choose", "force", "penalize", "process_logits", "suppress"]


def process_logits(logits: jax.Array, history: History, config: GenerationConfig) -> jax.Array:
    """Applies every processor that the config turns on.

    Args:
        logits: [B, V] of the next token; columns that pad the vocabulary are minus infinity and stay so.
        history: what was generated before, with the fields that `config.reads` names.
        config: which processors.

    Returns:
        float32 [B, V]; minus infinity marks tokens that must not be chosen.
    """
    logits = adjust(logits.astype(jnp.float32), history, config)
    if config.do_sample:
        # Thresholds look at the whole vocabulary: on a mesh, gather it once, not at each of their steps.
        logits = warp(constrain(logits, "act_batch", None), config)
    if config.renormalize_logits:
        logits = jax.nn.log_softmax(logits, axis=-1)
    return logits


def adjust(logits: jax.Array, history: History, config: GenerationConfig) -> jax.Array:
    """Penalties, bans and forced tokens: the processors that greedy decoding has too; see `process_logits`."""
    c, step = config, history.step[..., None] if history.step.ndim else history.step
    if c.sequence_bias:
        logits = processors.add_biases(logits, history, c.sequence_bias)
    if history.rivals is not None:
        logits = logits - c.diversity_penalty * history.rivals.astype(logits.dtype)
    if c.encoder_repetition_penalty != 1.0:
        logits = penalize(logits, _source_seen(history, logits), 1 / c.encoder_repetition_penalty)
    if c.repetition_penalty != 1.0:
        assert history.seen is not None
        logits = penalize(logits, history.seen, c.repetition_penalty)
    if c.frequency_penalty or c.presence_penalty:
        assert history.counts is not None
        logits = processors.penalize_counts(logits, history.counts, c.frequency_penalty, c.presence_penalty)
    if c.no_repeat_ngram_size:
        logits = processors.ban_repeats(logits, history, c.no_repeat_ngram_size)
    if c.encoder_no_repeat_ngram_size:
        logits = processors.ban_source_repeats(logits, history, c.encoder_no_repeat_ngram_size)
    if c.banned_sequences:
        logits = processors.add_biases(logits, history, [(ids, HIDDEN) for ids in c.banned_sequences])
    if c.eos_ids and (c.min_new_tokens or c.min_length):
        logits = jnp.where(step < history.min_new, suppress(logits, c.eos_ids), logits)
    if c.forced_bos_token_id is not None:
        assert history.prompt_length is not None
        starts = history.prompt_length + step == 1
        logits = jnp.where(starts, force(logits, (c.forced_bos_token_id,)), logits)
    if c.forced_eos_ids:
        logits = jnp.where(step == history.max_new - 1, force(logits, c.forced_eos_ids), logits)
    if c.remove_invalid_values:
        assert history.vocab_size is not None
        logits = processors.make_finite(logits, history.vocab_size)
    if c.exponential_decay_length_penalty is not None:
        begin, factor = c.exponential_decay_length_penalty
        logits = processors.urge(logits, c.eos_ids, factor, step - begin)
    if c.suppress_tokens:
        logits = suppress(logits, c.suppress_tokens)
    if c.begin_suppress_tokens:
        first = jnp.int32(0)
        if c.forced_bos_token_id is not None:  # which takes the first place after a prompt of one token
            assert history.prompt_length is not None
            first = (history.prompt_length <= 1).astype(jnp.int32)
        logits = jnp.where(step == first, suppress(logits, c.begin_suppress_tokens), logits)
    return logits


def warp(logits: jax.Array, config: GenerationConfig) -> jax.Array:
    """Temperature and the truncations of sampling; see `process_logits`."""
    c, keep = config, config.min_tokens_to_keep
    if c.temperature is not None and c.temperature != 1.0:
        logits = logits / c.temperature
    if c.top_k:
        logits = keep_top_k(logits, max(c.top_k, keep))
    if c.top_p is not None and c.top_p < 1.0:
        logits = keep_top_p(logits, c.top_p, keep)
    if c.min_p is not None:
        logits = keep_min_p(logits, c.min_p, keep)
    if c.typical_p is not None and c.typical_p < 1.0:
        logits = keep_typical(logits, c.typical_p, keep)
    if c.epsilon_cutoff:
        logits = keep_above(logits, c.epsilon_cutoff, keep)
    if c.eta_cutoff:
        logits = keep_eta(logits, c.eta_cutoff, keep)
    return logits


def choose(logits: jax.Array, rngs: jax.Array | None, config: GenerationConfig) -> jax.Array:
    """Takes one token of each row.

    Args:
        logits: float32 [B, V], processed.
        rngs: keys [B] of this step; None when greedy.
        config: do_sample.

    Returns:
        int32 [B].
    """
    if config.do_sample:
        assert rngs is not None
        # An argmax would pull the noise into its loop, one element at a time: 2 to 4 times slower on a CPU.
        _, highest = lax.top_k(logits + gumbel(rngs, logits.shape[1]), 1)
        return highest[:, 0]
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def gumbel(rngs: jax.Array, num: int) -> jax.Array:
    """float32 [B, num], each row's noise from its own key: the highest of logits and noise is a sample."""
    return jax.vmap(lambda rng: jax.random.gumbel(rng, (num,)))(rngs)


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
    """Keeps the k highest logits of each row, and whatever ties with the last of them."""
    return jnp.where(logits < _kth_highest(logits, k), HIDDEN, logits)


def keep_top_p(logits: jax.Array, p: Any, min_keep: int = 1) -> jax.Array:
    """Keeps the smallest set of most probable tokens with total probability p or more (arXiv:1904.09751).

    A token stays if all tokens more probable than it together fall short of p, so tokens that tie stay together.
    """
    probs = jax.nn.softmax(logits, axis=-1)

    def stays(threshold: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(probs > threshold, probs, 0.0), axis=-1, keepdims=True) < p

    return _cut(logits, probs < _lowest(stays, 1.0, logits.shape[0]), min_keep)


def keep_min_p(logits: jax.Array, min_p: Any, min_keep: int = 1) -> jax.Array:
    """Keeps tokens at least min_p times as probable as the most probable one (arXiv:2407.01082)."""
    probs = jax.nn.softmax(logits, axis=-1)
    return _cut(logits, probs < min_p * jnp.max(probs, axis=-1, keepdims=True), min_keep)


def keep_typical(logits: jax.Array, mass: Any, min_keep: int = 1) -> jax.Array:
    """Keeps the tokens whose surprise is nearest to the expected one, up to a total probability (arXiv:2202.00666)."""
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    probs = jnp.exp(log_probs)
    expected = -jnp.sum(jnp.where(probs > 0, probs * log_probs, 0.0), axis=-1, keepdims=True)
    distance = jnp.abs(-log_probs - expected)

    def reaches(threshold: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(distance <= threshold, probs, 0.0), axis=-1, keepdims=True) >= mass

    threshold = _lowest(reaches, float("inf"), logits.shape[0])
    if min_keep > 1:
        threshold = jnp.maximum(threshold, -_kth_highest(-distance, min_keep))
    return jnp.where(distance > threshold, HIDDEN, logits)


def keep_above(logits: jax.Array, epsilon: Any, min_keep: int = 1) -> jax.Array:
    """Keeps tokens of probability epsilon or more, or the most probable one (arXiv:2210.15191)."""
    return _cut(logits, jax.nn.softmax(logits, axis=-1) < epsilon, min_keep)


def keep_eta(logits: jax.Array, eta: Any, min_keep: int = 1) -> jax.Array:
    """As `keep_above`, with a limit that falls where the distribution is flat (arXiv:2210.15191)."""
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    probs = jnp.exp(log_probs)
    entropy = -jnp.sum(jnp.where(probs > 0, probs * log_probs, 0.0), axis=-1, keepdims=True)
    eta = jnp.asarray(eta, jnp.float32)
    return _cut(logits, probs < jnp.minimum(eta, jnp.sqrt(eta) * jnp.exp(-entropy)), min_keep)


def _cut(logits: jax.Array, removed: jax.Array, min_keep: int) -> jax.Array:
    """Hides what is removed, but for the `min_keep` highest logits."""
    highest = jnp.max(logits, axis=-1, keepdims=True) if min_keep == 1 else _kth_highest(logits, min_keep)
    return jnp.where(removed & (logits < highest), HIDDEN, logits)


def _kth_highest(values: jax.Array, k: int) -> jax.Array:
    """[B, 1], the k-th highest value of each row."""
    highest, _ = lax.top_k(values, min(k, values.shape[-1]))
    return highest[:, -1:]


def _lowest(holds: Callable[[jax.Array], jax.Array], highest: float, num_rows: int) -> jax.Array:
    """The lowest threshold that a condition holds for, [B, 1], from 0 to `highest`.

    It is found bit by bit: floats from 0 on are ordered as their bit patterns.

    Args:
        holds: of thresholds [B, 1], bool [B, 1]: true of every threshold above one that it is true of. If it is true
            of none, the result is `highest`.
    """

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        holding = holds(lax.bitcast_convert_type(middle, jnp.float32))
        return jnp.where(holding, low, middle + 1), jnp.where(holding, middle, high)

    top = jnp.full((num_rows, 1), lax.bitcast_convert_type(jnp.float32(highest), jnp.int32))
    _, found = lax.fori_loop(0, 31, halve, (jnp.zeros_like(top), top))
    return lax.bitcast_convert_type(found, jnp.float32)


def _source_seen(history: History, logits: jax.Array) -> jax.Array:
    """bool [B, V], the ids that a row's source holds."""
    assert history.source is not None
    assert history.source_real is not None
    rows = jnp.arange(history.source.shape[0])[:, None]
    return jnp.zeros(logits.shape, bool).at[rows, history.source].max(history.source_real)
