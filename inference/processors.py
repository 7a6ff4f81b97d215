"""What changes the logits before a token is chosen from them: pure functions on [B, V], and what they know of the past.

Each computes what transformers 4.57.6 computes, from arrays of fixed shape in place of lists that grow, so that one
compiled program serves every step. A penalty may be a number or an array [B, 1], one a row.
`inference.sampling.process_logits` puts them in order. Departure: where there are several rows of a prompt, each is
held against that prompt's encoder input; transformers takes rows of other prompts for encoder_repetition_penalty.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

HIDDEN = float("-inf")
Biases = Sequence[tuple[Sequence[int], float]]


class History(struct.PyTreeNode):
    """What the processors know of a batch's generation so far.

    Attributes:
        step: int32 [], tokens generated so far, the same for all rows; or [B], where each goes at its own pace.
        min_new: int32 [], no end-of-sequence token before so many.
        max_new: int32 [], the limit.
        seen: bool [B, V], the ids that a row's prompt (its padding included, as in transformers) or output
            holds; None where no penalty reads it.
        counts: int32 [B, V], how often a row has generated each id; None where no penalty reads it.
        prompt_length: int32 [], of the prompt as passed in, padding included: processors that act at the first token
            of a sequence ask for it. None where none does.
        tokens: int32 [B, S], prompt and output; None where no processor looks for sequences of tokens.
        first, end: int32 [] or [B], the slots of `tokens` that count: from `first` on, before `end`. A prompt's own
            padding counts, as in transformers.
        source: int32 [B, P], the encoder's input, or the prompt where there is no encoder; None where none reads it.
        source_real: bool [B, P], the slots of `source` that were passed in.
        rivals: int32 [B, V], how many beams of earlier groups took each id at this step; None outside of groups.
        stop_states: int32 [B], how far each row is in a stop string (`inference.stopping`); None without any.
        vocab_size: without the columns that pad it; None where no processor asks.
    """

    step: jax.Array
    min_new: jax.Array
    max_new: jax.Array
    seen: jax.Array | None = None
    counts: jax.Array | None = None
    prompt_length: jax.Array | None = None
    tokens: jax.Array | None = None
    first: jax.Array | None = None
    end: jax.Array | None = None
    source: jax.Array | None = None
    source_real: jax.Array | None = None
    rivals: jax.Array | None = None
    stop_states: jax.Array | None = None
    vocab_size: int | None = struct.field(pytree_node=False, default=None)

    def append(self, token_B: jax.Array, active: jax.Array | None = None) -> "History":
        """The history after one more token per row.

        Args:
            token_B: int32 [B].
            active: bool [B], the rows that take theirs, where step and end are of each row; None is all.
        """
        rows = jnp.arange(token_B.shape[0])
        seen, counts, tokens, end = self.seen, self.counts, self.tokens, self.end
        more = jnp.int32(1) if active is None else active.astype(jnp.int32)

        def place(at: jax.Array, past: int) -> jax.Array:
            return at if active is None else jnp.where(active, at, past)  # what is past the end is dropped

        if seen is not None:
            seen = seen.at[rows, place(token_B, seen.shape[1])].set(True, mode="drop")
        if counts is not None:
            counts = counts.at[rows, place(token_B, counts.shape[1])].add(1, mode="drop")
        if tokens is not None:
            assert end is not None
            if end.ndim:
                tokens = tokens.at[rows, place(end, tokens.shape[1])].set(token_B, mode="drop")
            else:
                tokens = lax.dynamic_update_slice(tokens, token_B[:, None], (0, end))
        end = None if end is None else end + more
        return self.replace(step=self.step + more, seen=seen, counts=counts, tokens=tokens, end=end)

    def take(self, rows: jax.Array) -> "History":
        """The history of other rows [B]: what a beam search goes on with."""
        names = ("seen", "counts", "tokens", "source", "source_real", "stop_states")
        by_row = {name: getattr(self, name) for name in names}
        taken = {name: value[rows] for name, value in by_row.items() if value is not None}
        for name in ("step", "first", "end"):
            value = getattr(self, name)
            if value is not None and value.ndim:
                taken[name] = value[rows]
        return self.replace(**taken)


def penalize(logits: jax.Array, seen: jax.Array, penalty: Any) -> jax.Array:
    """Makes seen tokens less probable (Keskar et al., 2019, arXiv:1909.05858), or more, with a penalty below 1."""
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def penalize_counts(logits: jax.Array, counts: jax.Array, frequency: Any, presence: Any) -> jax.Array:
    """Lowers tokens by `frequency` for each time that they were generated, and once by `presence`: OpenAI's penalties.

    Args:
        logits: [B, V].
        counts: int32 [B, V], in the output alone.
        frequency, presence: subtracted from logits; below 0 they reward.
    """
    times = counts.astype(logits.dtype)
    return logits - times * frequency - (times > 0).astype(logits.dtype) * presence


def suppress(logits: jax.Array, ids: Sequence[int]) -> jax.Array:
    """Rules the ids out."""
    return jnp.where(among(ids, logits), HIDDEN, logits)


def force(logits: jax.Array, ids: Sequence[int]) -> jax.Array:
    """Rules all but the ids out, and makes those equally probable."""
    return jnp.where(among(ids, logits), 0.0, HIDDEN).astype(logits.dtype)


def make_finite(logits: jax.Array, vocab_size: int) -> jax.Array:
    """NaN becomes 0 and infinities the largest numbers there are; columns that pad the vocabulary stay hidden."""
    limits = jnp.finfo(logits.dtype)
    finite = jnp.nan_to_num(logits, nan=0.0, posinf=float(limits.max), neginf=float(limits.min))
    return jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, finite, HIDDEN)


def urge(logits: jax.Array, ids: Sequence[int], factor: float, steps: jax.Array) -> jax.Array:
    """Raises the ids by |logit| x (factor ^ steps - 1) once `steps` is above 0: the longer, the more."""
    power = jnp.float32(factor) ** steps.astype(jnp.float32)
    raised = logits + jnp.abs(logits) * (power - 1.0)
    # Where a token is ruled out, infinity less infinity would be NaN.
    acts = among(ids, logits) & (steps > 0) & jnp.isfinite(logits)
    return jnp.where(acts, raised, logits)


def ban_repeats(logits: jax.Array, history: History, size: int) -> jax.Array:
    """Rules out each token that would end a run of `size` tokens which the row already holds."""
    assert history.tokens is not None
    return _ban(logits, history, size, history.tokens, _counted(history))


def ban_source_repeats(logits: jax.Array, history: History, size: int) -> jax.Array:
    """Rules out each token that would end a run of `size` tokens which the row's source holds."""
    assert history.source is not None
    assert history.source_real is not None
    return _ban(logits, history, size, history.source, history.source_real)


def add_biases(logits: jax.Array, history: History, biases: Biases) -> jax.Array:
    """Adds each bias to the last token of its sequence where the tokens before that have just been generated.

    As in transformers, a sequence counts only once the row, its prompt included, is at least as long as it.

    Args:
        logits: [B, V].
        history: holds tokens if a sequence has more than one.
        biases: (sequence, bias) pairs; minus infinity rules a token out.
    """
    single = np.zeros(logits.shape[-1], np.float32)
    longer = []
    for sequence, bias in biases:
        if len(sequence) == 1:
            single[sequence[0]] = bias
        else:
            longer.append((sequence, bias))
    bias_BV = jnp.broadcast_to(jnp.asarray(single), logits.shape)
    if longer:
        width = max(len(sequence) for sequence, _ in longer) - 1
        prefix = np.zeros((len(longer), width), np.int32)
        length = np.array([len(sequence) for sequence, _ in longer], np.int32)
        for row, (sequence, _) in enumerate(longer):
            prefix[row, width - len(sequence) + 1 :] = sequence[:-1]
        unread = np.arange(width) < width + 1 - length[:, None]
        same = (_tail(history, width)[:, None, :] == prefix) | unread
        assert history.end is not None
        assert history.first is not None
        counted = jnp.broadcast_to(history.end - history.first, logits.shape[:1])
        applies = same.all(axis=2) & (counted[:, None] >= length)
        values = jnp.where(applies, jnp.asarray([bias for _, bias in longer], jnp.float32), 0.0)
        bias_BV = bias_BV.at[:, np.array([sequence[-1] for sequence, _ in longer])].add(values)
    return logits + bias_BV


def among(ids: Sequence[int], logits: jax.Array) -> jax.Array:
    """bool [V], True at the ids."""
    return jnp.isin(jnp.arange(logits.shape[-1]), jnp.asarray(ids))


def _counted(history: History) -> jax.Array:
    """bool [B, S], the slots of the history's tokens that count."""
    assert history.tokens is not None
    assert history.first is not None
    assert history.end is not None
    slots = jnp.arange(history.tokens.shape[1])
    return (slots >= history.first.reshape(-1, 1)) & (slots < history.end.reshape(-1, 1))


def _tail(history: History, width: int) -> jax.Array:
    """int32 [B, width], the newest tokens; -1 where there are fewer."""
    assert history.tokens is not None
    assert history.first is not None
    assert history.end is not None
    slots = history.end.reshape(-1, 1) - width + jnp.arange(width)
    slots = jnp.broadcast_to(slots, (history.tokens.shape[0], width))
    tokens = jnp.take_along_axis(history.tokens, jnp.maximum(slots, 0), axis=1)
    return jnp.where(slots >= history.first.reshape(-1, 1), tokens, -1)


def _ban(logits: jax.Array, history: History, size: int, text: jax.Array, real: jax.Array) -> jax.Array:
    """Rules out what follows the newest size - 1 tokens wherever they stand in `text` [B, P]."""
    num_starts = text.shape[1] - size + 1
    if num_starts <= 0:
        return logits
    follows = real[:, size - 1 :]
    if size > 1:
        tail = _tail(history, size - 1)
        for i in range(size - 1):
            here = lax.slice_in_dim(text, i, i + num_starts, axis=1)
            follows = follows & real[:, i : i + num_starts] & (here == tail[:, i : i + 1])
    rows = jnp.arange(text.shape[0])[:, None]
    banned = jnp.zeros(logits.shape, bool).at[rows, text[:, size - 1 :]].max(follows)
    return jnp.where(banned, HIDDEN, logits)
