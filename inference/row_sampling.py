"""Choosing the next tokens of a batch whose every row has its own parameters: arrays where `inference.sampling` has a
config's numbers, the same processors in the same order.

What no row asks for costs nothing: each group of processors stands behind a condition on the whole batch.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from inference import sampling
from inference.processors import HIDDEN, penalize, penalize_counts
from inference.requests import MAX_BIASES, MAX_LOGPROBS, SamplingParams
from modelzoo.axes import constrain

MAX_STOPS = 16
"""Stop tokens that `min_new_tokens` can hold back."""


class RowParams(struct.PyTreeNode):
    """Sampling parameters by row: SamplingParams as arrays [R], numpy on the host and traced on the device.

    Attributes:
        temperature, top_p, min_p, repetition, frequency, presence: float32 [R].
        top_k, min_new: int32 [R].
        seed: uint32 [R, 2], the two halves of a 64-bit seed; `sample`: int32 [R].
        stop_ids: int32 [R, E], filled up with -1.
        bias_ids: int32 [R, 300], filled up with -1; `bias`: float32 [R, 300].
        num_logprobs: int32 [R]; -1 where nothing is to be reported.
    """

    temperature: Any
    top_p: Any
    min_p: Any
    repetition: Any
    frequency: Any
    presence: Any
    top_k: Any
    min_new: Any
    seed: Any
    sample: Any
    stop_ids: Any
    bias_ids: Any
    bias: Any
    num_logprobs: Any

    @classmethod
    def neutral(cls, num_rows: int) -> "RowParams":
        """Greedy rows without penalties, as numpy arrays that `set` writes into."""

        def full(value: float, *more: int, dtype: Any = np.float32) -> np.ndarray:
            return np.full((num_rows, *more), value, dtype)

        zero, one = (lambda value=value: full(value) for value in (0, 1))
        whole = np.int32
        return cls(
            temperature=zero(), top_p=one(), min_p=zero(), repetition=one(), frequency=zero(), presence=zero(),
            top_k=full(0, dtype=whole), min_new=full(0, dtype=whole), seed=full(0, 2, dtype=np.uint32),
            sample=full(0, dtype=whole), stop_ids=full(-1, MAX_STOPS, dtype=whole),
            bias_ids=full(-1, MAX_BIASES, dtype=whole), bias=full(0, MAX_BIASES), num_logprobs=full(-1, dtype=whole),
        )  # fmt: skip

    def set(self, row: int, params: SamplingParams) -> None:
        """Writes one request's parameters into its row."""
        biases = params.logit_bias
        values = dict(
            temperature=params.temperature,
            top_p=params.top_p,
            min_p=params.min_p,
            repetition=params.repetition_penalty,
            frequency=params.frequency_penalty,
            presence=params.presence_penalty,
            top_k=min(params.top_k, 2**31 - 1),
            min_new=params.min_new_tokens,
            seed=[params.seed >> 32 & 0xFFFFFFFF, params.seed & 0xFFFFFFFF],
            sample=params.sample,
            stop_ids=_filled(params.stop_token_ids, MAX_STOPS, -1),
            bias_ids=_filled(biases, MAX_BIASES, -1),
            bias=_filled(biases.values(), MAX_BIASES, 0.0),
            num_logprobs=-1 if params.logprobs is None else params.logprobs,
        )
        for name, value in values.items():
            getattr(self, name)[row] = value

    def only(self, row: jax.Array) -> "RowParams":
        """One row, as a batch of one."""
        return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, row, 1, axis=0), self)


def _filled(values: Any, length: int, fill: float) -> list[Any]:
    given = list(values)[:length]
    return given + [fill] * (length - len(given))


class Chosen(struct.PyTreeNode):
    """Tokens and their log-probabilities under the model.

    Attributes:
        token: int32 [R].
        logprob: float32 [R]; zeros where no row asks for it.
        top_ids, top_logprobs: [R, 20], the most probable tokens; zeros where no row asks for any.
    """

    token: jax.Array
    logprob: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array


def choose_rows(
    logits: jax.Array, params: RowParams, seen: jax.Array, counts: jax.Array, step: jax.Array
) -> Chosen:
    """Takes one token of each row.

    Args:
        logits: [R, V]; columns that pad the vocabulary are minus infinity.
        params: of the rows.
        seen: bool [R, V], the tokens of a row's prompt and output.
        counts: int32 [R, V], how often a row has generated each token.
        step: int32 [R], tokens that a row has generated so far.
    """
    # Thresholds look at the whole vocabulary: on a mesh, gather it once, not at each of their steps.
    logits = constrain(logits.astype(jnp.float32), "act_batch" if len(logits) > 1 else None, None)
    p = jax.tree.map(lambda a: a[:, None] if a.ndim == 1 else a, params)

    def penalties(x: jax.Array) -> jax.Array:
        return penalize_counts(penalize(x, seen, p.repetition), counts, p.frequency, p.presence)

    def biases(x: jax.Array) -> jax.Array:
        return jax.vmap(lambda row, ids, bias: row.at[_outside(ids, x)].add(bias, mode="drop"))(
            x, p.bias_ids, p.bias
        )

    def hold_back(x: jax.Array) -> jax.Array:
        ids = jnp.where(step[:, None] < p.min_new, p.stop_ids, -1)
        return jax.vmap(lambda row, ids: row.at[_outside(ids, x)].set(HIDDEN, mode="drop"))(x, ids)

    penalized = (params.repetition != 1.0) | (params.frequency != 0.0) | (params.presence != 0.0)
    processed = _where_any(penalized, penalties, logits)
    processed = _where_any(params.bias_ids[:, 0] >= 0, biases, processed)
    processed = _where_any(step < params.min_new, hold_back, processed)
    samples = params.temperature > 0
    token = lax.cond(
        jnp.any(samples),
        lambda x: jnp.where(samples, _draw(x, p, step), _most_probable(x)),
        _most_probable,
        processed,
    )
    return with_logprobs(logits, token, params.num_logprobs)


def with_logprobs(logits: jax.Array, token: jax.Array, num_logprobs: jax.Array) -> Chosen:
    """What the model gives to tokens already chosen.

    Args:
        logits: float32 [R, V].
        token: int32 [R].
        num_logprobs: int32 [R] or [1]; where none is above 0 there are no alternatives, and where all are below 0
            no log-probabilities at all.
    """
    width = min(MAX_LOGPROBS, logits.shape[-1])

    def own(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        total = jax.nn.logsumexp(x, axis=-1)
        return jnp.take_along_axis(x, token[:, None], axis=-1)[:, 0] - total, total

    def top(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, ids = lax.top_k(x, width)
        return ids.astype(jnp.int32), values - total[:, None]

    def zeros(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
        return jnp.zeros((len(logits), *shape), dtype)

    logprob, total = lax.cond(jnp.any(num_logprobs >= 0), own, lambda _: (zeros(), zeros()), logits)
    none = (zeros(width, dtype=jnp.int32), zeros(width))
    return Chosen(token, logprob, *lax.cond(jnp.any(num_logprobs > 0), top, lambda _: none, logits))


def keep_top_k(logits: jax.Array, k: jax.Array) -> jax.Array:
    """Keeps each row's k highest logits, and whatever ties with the last of them; a k below 1 keeps all.

    The k-th highest logit is found bit by bit, since the rows' k differ: signed integers made of the bits of floats are
    ordered as the floats are.

    Args:
        logits: float32 [R, V].
        k: int32 [R, 1].
    """
    bits = lax.bitcast_convert_type(logits, jnp.int32)
    order = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # at least k logits stand at `low` or above, and fewer at `high` or above
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        enough = jnp.sum(order >= middle, axis=-1, keepdims=True, dtype=jnp.int32) >= k
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    limits = jnp.iinfo(jnp.int32)
    low, high = jnp.full_like(k, limits.min), jnp.full_like(k, limits.max)
    low, _ = lax.fori_loop(0, 32, halve, (low, high))
    return jnp.where((order < low) & (k > 0), HIDDEN, logits)


def _draw(logits: jax.Array, p: RowParams, step: jax.Array) -> jax.Array:
    logits = logits / jnp.where(p.temperature > 0, p.temperature, 1.0)
    logits = _where_any(p.top_k > 0, lambda x: keep_top_k(x, p.top_k), logits)
    logits = _where_any(
        p.top_p < 1.0, lambda x: jnp.where(p.top_p < 1, sampling.keep_top_p(x, p.top_p), x), logits
    )
    logits = _where_any(p.min_p > 0.0, lambda x: sampling.keep_min_p(x, p.min_p), logits)

    def noise(seed: jax.Array, sample: jax.Array, step: jax.Array) -> jax.Array:
        # jax.random.key(seed) of a 64-bit seed, whose halves are the key.
        rng = jax.random.fold_in(jax.random.wrap_key_data(seed), sample)
        return jax.random.gumbel(jax.random.fold_in(rng, step), logits.shape[1:])

    _, highest = lax.top_k(logits + jax.vmap(noise)(p.seed, p.sample[:, 0], step), 1)
    return highest[:, 0]


def _most_probable(logits: jax.Array) -> jax.Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _where_any(condition: jax.Array, change: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """`change(x)` if the condition holds for any row; the others' parameters leave them as they are."""
    return lax.cond(jnp.any(condition), change, lambda x: x, x)


def _outside(ids: jax.Array, logits: jax.Array) -> jax.Array:
    """-1, which would count from the end, past the end."""
    return jnp.where(ids < 0, logits.shape[-1], ids)
