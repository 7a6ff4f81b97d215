"""Choosing the next token: pure functions on logits [B, V], assembled from a GenerationConfig when traced.

Each processor computes what transformers 4.57.6 does, in its order. Nothing sorts a vocabulary: top-k
selects, and top-p finds its threshold by bisection, in a twentieth of the time of a sort on a CPU. Gumbel
noise rather than an inverse CDF draws the sample, so that a token of probability zero can never come out.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from inference.generation_config import GenerationConfig
from modelzoo.axes import constrain

HIDDEN = float("-inf")


class History(struct.PyTreeNode):
    """What the processors know of a batch's generation so far.

    Attributes:
        step: int32 [], tokens generated so far, the same for all rows.
        min_new: int32 [], no end-of-sequence token before so many.
        max_new: int32 [], the limit.
        seen: bool [B, V], the ids that a row's prompt (its padding included, as in transformers) or output
            holds; None where no penalty reads it.
    """

    step: jax.Array
    min_new: jax.Array
    max_new: jax.Array
    seen: jax.Array | None = None

    def append(self, token_B: jax.Array) -> "History":
        """The history after one more token per row."""
        seen = self.seen
        if seen is not None:
            seen = seen.at[jnp.arange(seen.shape[0]), token_B].set(True)
        return self.replace(step=self.step + 1, seen=seen)


def process_logits(logits: jax.Array, history: History, config: GenerationConfig) -> jax.Array:
    """Applies every processor that the config turns on.

    Args:
        logits: [B, V] of the next token; columns that pad the vocabulary are minus infinity and stay so.
        history: what was generated before.
        config: which processors.

    Returns:
        float32 [B, V]; minus infinity marks tokens that must not be chosen.
    """
    logits = logits.astype(jnp.float32)
    if config.repetition_penalty != 1.0:
        assert history.seen is not None
        logits = penalize(logits, history.seen, config.repetition_penalty)
    if config.eos_ids and (config.min_new_tokens or config.min_length):
        logits = jnp.where(history.step < history.min_new, suppress(logits, config.eos_ids), logits)
    if config.forced_eos_ids:
        logits = jnp.where(history.step == history.max_new - 1, force(logits, config.forced_eos_ids), logits)
    if config.suppress_tokens:
        logits = suppress(logits, config.suppress_tokens)
    if config.do_sample:
        # Thresholds look at the whole vocabulary: on a mesh, gather it once, not at each of their steps.
        logits = constrain(logits, "act_batch", None)
        if config.temperature != 1.0:
            logits = logits / config.temperature
        if config.top_k:
            logits = keep_top_k(logits, config.top_k)
        if config.top_p is not None and config.top_p < 1.0:
            logits = keep_top_p(logits, config.top_p)
        if config.min_p is not None:
            logits = keep_min_p(logits, config.min_p)
    if config.renormalize_logits:
        logits = jax.nn.log_softmax(logits, axis=-1)
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
        noise = jax.vmap(lambda rng: jax.random.gumbel(rng, logits.shape[1:]))(rngs)
        # An argmax would pull the noise into its loop, one element at a time: 2 to 4 times slower on a CPU.
        _, highest = lax.top_k(logits + noise, 1)
        return highest[:, 0]
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def penalize(logits: jax.Array, seen: jax.Array, penalty: float) -> jax.Array:
    """Makes seen tokens less probable (Keskar et al., 2019, arXiv:1909.05858)."""
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def suppress(logits: jax.Array, ids: Sequence[int]) -> jax.Array:
    """Rules the ids out."""
    return jnp.where(_among(ids, logits), HIDDEN, logits)


def force(logits: jax.Array, ids: Sequence[int]) -> jax.Array:
    """Rules all but the ids out, and makes those equally probable."""
    return jnp.where(_among(ids, logits), 0.0, HIDDEN).astype(logits.dtype)


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
    """Keeps the k highest logits of each row, and whatever ties with the last of them."""
    highest, _ = lax.top_k(logits, min(k, logits.shape[-1]))
    return jnp.where(logits < highest[:, -1:], HIDDEN, logits)


def keep_top_p(logits: jax.Array, p: float) -> jax.Array:
    """Keeps the smallest set of most probable tokens with total probability p or more (arXiv:1904.09751).

    A token stays if all tokens more probable than it together fall short of p, so tokens that tie stay
    together.
    The lowest probability that stays is found bit by bit: floats from 0 to 1 are ordered as their bit
    patterns.
    """
    probs = jax.nn.softmax(logits, axis=-1)

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) // 2
        threshold = lax.bitcast_convert_type(middle, jnp.float32)
        above = jnp.sum(jnp.where(probs > threshold, probs, 0.0), axis=-1, keepdims=True)
        stays = above < p
        return jnp.where(stays, low, middle + 1), jnp.where(stays, middle, high)

    one = jnp.full((logits.shape[0], 1), lax.bitcast_convert_type(jnp.float32(1.0), jnp.int32))
    _, lowest = lax.fori_loop(0, 30, halve, (jnp.zeros_like(one), one))
    return jnp.where(probs < lax.bitcast_convert_type(lowest, jnp.float32), HIDDEN, logits)


def keep_min_p(logits: jax.Array, min_p: float) -> jax.Array:
    """Keeps tokens at least min_p times as probable as the most probable one (arXiv:2407.01082)."""
    probs = jax.nn.softmax(logits, axis=-1)
    return jnp.where(probs < min_p * jnp.max(probs, axis=-1, keepdims=True), HIDDEN, logits)


def _among(ids: Sequence[int], logits: jax.Array) -> jax.Array:
    """bool [V], True at the ids."""
    return jnp.isin(jnp.arange(logits.shape[-1]), jnp.asarray(ids))
