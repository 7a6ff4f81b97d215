"""How probable a causal model finds given texts: log-probabilities of tokens, and perplexity by strides.

    scores = inference.scoring.score(model, prepared, [Passage(ids, first=len(context))])
    result = inference.scoring.perplexity(model, prepared, ids, window=1024, stride=512)

Reference for the strides: https://huggingface.co/docs/transformers/v4.57.6/perplexity, but that the mean is over the
tokens that were predicted; its example loses one in each window.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import modelzoo
import parallel
from inference.prompts import bucket_length
from modelzoo import registry


@dataclasses.dataclass(frozen=True)
class Passage:
    """Tokens of which some are scored.

    Attributes:
        ids: context and then what is scored; the model reads all but the last.
        first: the number of the first token that is scored, 1 or more: something stands before it.
    """

    ids: Sequence[int]
    first: int


@dataclasses.dataclass(frozen=True)
class Score:
    """What a model makes of a passage.

    Attributes:
        logprobs: float32, natural, one per scored token.
        is_greedy: bool, likewise: whether no token was more probable.
    """

    logprobs: np.ndarray
    is_greedy: np.ndarray


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """A model's measure of a text.

    Attributes:
        nll: sum of negative log-probabilities, natural.
        num_tokens: that were predicted.
        num_bytes: of the text in UTF-8, where it is known; else 0.
    """

    nll: float
    num_tokens: int
    num_bytes: int = 0

    def __add__(self, other: "Perplexity") -> "Perplexity":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Perplexity(*(one + another for one, another in pairs))

    @property
    def per_token(self) -> float:
        """Mean negative log-probability of a token, in nats."""
        return self.nll / self.num_tokens

    @property
    def perplexity(self) -> float:
        """exp of it."""
        return math.exp(self.per_token)

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable between tokenizers; None where the bytes are unknown."""
        return self.nll / math.log(2) / self.num_bytes if self.num_bytes else None


def score(
    model: modelzoo.Model,
    params: Any,
    passages: Sequence[Passage],
    batch_size: int = 8,
    rules: parallel.Rules | None = None,
    progress: Callable[[int], Any] = lambda done: None,
) -> list[Score]:
    """Scores passages, the longest first, so that those of one length run and compile together.

    Args:
        model: a causal language model.
        params: its parameters, best from `prepare`.
        passages: what to score; none longer than the model's window and the token after it.
        batch_size: passages per call.
        rules: of the mesh that the parameters lie on.
        progress: called with numbers of passages done.

    Returns:
        In the order of the passages.

    Raises:
        ValueError: a passage does not fit the model, or begins with what it scores.
    """
    _check(model, passages)
    if not passages:
        return []
    window = model.config.max_positions
    batch_size += 0 if rules is None else -batch_size % rules.num_shards("act_batch")
    order = sorted(range(len(passages)), key=lambda i: (-len(passages[i].ids), passages[i].first))
    results: dict[int, Score] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        length = bucket_length(len(passages[rows[0]].ids) - 1, window)
        earliest = min(passages[number].first for number in rows)
        keep = bucket_length(length - earliest + 1, length)
        ids, targets = np.zeros((2, batch_size, length), np.int32)
        for row, number in enumerate(rows):
            tokens = passages[number].ids
            ids[row, : len(tokens) - 1], targets[row, : len(tokens) - 1] = tokens[:-1], tokens[1:]
        placed = [jnp.asarray(array) for array in (ids, targets[:, length - keep :])]
        if rules is not None:
            placed = [jax.device_put(array, parallel.batch_sharding(rules)) for array in placed]
        with parallel.use(rules):
            logprobs, greedy = map(np.asarray, _score(model, params, *placed, rules))
        for row, number in enumerate(rows):
            passage = passages[number]
            part = slice(passage.first - 1 - (length - keep), len(passage.ids) - 1 - (length - keep))
            results[number] = Score(logprobs[row, part], greedy[row, part])
        progress(len(rows))
    return [results[number] for number in range(len(passages))]


@functools.partial(jax.jit, static_argnames=("model", "rules"))
def _score(
    model: Any, params: Any, ids_BT: jax.Array, targets_BK: jax.Array, rules: Any
) -> tuple[jax.Array, jax.Array]:
    """Log-probability and greediness of what follows each of the last K tokens, [B, K]."""
    # Padding stands on the right: no token sees it, and what it scores is not looked at.
    out = model.apply({"params": params}, input_ids=ids_BT, logits_to_keep=targets_BK.shape[1])
    logits = out.logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets_BK[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets_BK


def _check(model: modelzoo.Model, passages: Sequence[Passage]) -> None:
    if model.task != "causal_lm":
        others = registry.relatives(type(model), ("causal_lm",))
        raise ValueError(f"{type(model).__name__} does not score text: take {others}")
    window, vocab_size = model.config.max_positions, model.config.vocab_size
    for number, passage in enumerate(passages):
        length = len(passage.ids)
        if not 0 < passage.first < length:
            raise ValueError(
                f"passage {number} of {length} tokens is scored from token {passage.first}: "
                "the first has nothing before it that it could follow from"
            )
        if window is not None and length - 1 > window:
            raise ValueError(
                f"passage {number} has {length} tokens, but the model reads {window} and scores the next"
            )
        if min(passage.ids) < 0 or max(passage.ids) >= vocab_size:
            raise ValueError(f"passage {number}: an id is outside the model's vocabulary of {vocab_size}")


def strides(num_tokens: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """Cuts a text into windows that overlap.

    Args:
        num_tokens: of the text.
        window: tokens that the model sees at a time.
        stride: tokens that the next window begins later.

    Returns:
        (begin, end, the first token that is scored) of each window: every token is scored once, with `window - stride`
        tokens or more before it; but for the text's first, and for that of each window where they do not overlap.
    """
    found, scored = [], 0
    for begin in range(0, num_tokens, stride):
        end = min(begin + window, num_tokens)
        found.append((begin, end, max(scored, begin + 1)))
        scored = end
        if end == num_tokens:
            break
    return [part for part in found if part[2] < part[1]]


def perplexity(
    model: modelzoo.Model,
    params: Any,
    ids: Sequence[int],
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 1,
    rules: parallel.Rules | None = None,
    progress: Callable[[int], Any] = lambda done: None,
) -> Perplexity:
    """The perplexity of one text.

    Args:
        model, params, batch_size, rules, progress: as of `score`; progress counts windows.
        ids: the text's tokens, two or more.
        window: tokens that the model sees at a time; None is all positions it has, or 2048.
        stride: tokens by which windows advance; None is half a window.

    Raises:
        ValueError: the text is too short, or window and stride do not fit the model and each other.
    """
    window, stride = check_strides(model, window, stride)
    if len(ids) < 2:
        raise ValueError(f"a text of {len(ids)} tokens has no token that follows another")
    parts = strides(len(ids), window, stride)
    passages = [Passage(ids[begin:end], first - begin) for begin, end, first in parts]
    scores = score(model, params, passages, batch_size, rules, progress)
    nll = -sum(float(np.sum(one.logprobs, dtype=np.float64)) for one in scores)
    return Perplexity(nll, sum(len(one.logprobs) for one in scores))


def check_strides(model: modelzoo.Model, window: int | None, stride: int | None) -> tuple[int, int]:
    """Window and stride, with defaults.

    Raises:
        ValueError: they do not fit the model, or each other.
    """
    limit: int | None = model.config.max_positions
    window = window if window is not None else limit or 2048
    if window < 2 or (limit is not None and window > limit):
        raise ValueError(f"window = {window}: it is 2 to {limit or 'any number of'} tokens")
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride <= window:
        raise ValueError(f"stride = {stride}: it is 1 to the window's {window} tokens")
    return window, stride
