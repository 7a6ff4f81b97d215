"""The host's side of a generation: checks a batch of prompts, aligns and buckets it, cuts the results out.

Inside, every row ends at the same slot (left padding) and the prompt has a bucket's length, so that one
compiled program serves prompts of many lengths. Outside, sequences look as the caller's own padding would
have it.
"""

import dataclasses
from typing import Any

import numpy as np

from inference.generation_config import GenerationConfig


@dataclasses.dataclass(frozen=True)
class GenerateOutput:
    """What `generate` returns; numpy arrays.

    Attributes:
        sequences: int32 [B, T], prompt and new tokens, cut to the longest row. For left-padded (or unpadded)
            prompts exactly what transformers returns: the prompt as it was passed, then the new tokens, then
            pad_token_id. For right-padded ones each row's tokens without a gap, padding on the right.
        lengths: int32 [B], one past the last generated token of each row, its end-of-sequence token included.
        scores: float32 [steps, B, V], the processed logits that each new token was chosen from; None unless
            `output_scores`.
    """

    sequences: np.ndarray
    lengths: np.ndarray
    scores: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Prompts:
    """A checked batch, ready for the device.

    Attributes:
        given: int32 [B, T], as passed in, repeated for num_return_sequences.
        given_mask: bool [B, T].
        right_padded: some row's last slot is padding.
        input_ids: int32 [B, bucket], every row ending at the last slot.
        attention_mask: bool [B, bucket].
        min_new, max_new: tokens to generate.
        num_slots: of the cache, bucketed too.
    """

    given: np.ndarray
    given_mask: np.ndarray
    right_padded: bool
    input_ids: np.ndarray
    attention_mask: np.ndarray
    min_new: int
    max_new: int
    num_slots: int

    def seen(self, vocab_size: int) -> np.ndarray:
        """bool [B, vocab_size], the ids that occur in each row as passed in, padding included."""
        seen = np.zeros((len(self.given), vocab_size), bool)
        np.put_along_axis(seen, self.given, True, axis=1)
        return seen

    def output(
        self, new_tokens: np.ndarray, scores: np.ndarray | None, config: GenerationConfig
    ) -> GenerateOutput:
        """Joins prompts and new tokens.

        Args:
            new_tokens: int32 [B, steps].
            scores: float32 [steps, B, V] or None.
            config: of the generation.
        """
        num_rows, steps = new_tokens.shape
        ends = np.isin(new_tokens, config.eos_ids)
        num_new = np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, steps)
        if not self.right_padded:
            sequences = np.concatenate([self.given, new_tokens], axis=1)
            lengths = self.given.shape[1] + num_new
        else:
            num_prompt = self.given_mask.sum(axis=1)
            lengths = num_prompt + num_new
            sequences = np.full((num_rows, lengths.max()), config.fill_id, np.int32)
            for row in range(num_rows):
                sequences[row, : num_prompt[row]] = self.given[row, self.given_mask[row]]
                sequences[row, num_prompt[row] : lengths[row]] = new_tokens[row, : num_new[row]]
        return GenerateOutput(sequences.astype(np.int32), lengths.astype(np.int32), scores)


def prepare_prompts(
    input_ids: Any, attention_mask: Any, config: GenerationConfig, vocab_size: int, max_positions: int | None
) -> Prompts:
    """Checks a batch of prompts and lays it out for the compiled loop.

    Args:
        input_ids: integers [B, T].
        attention_mask: [B, T], non-zero where a token is real, or None: then, as in transformers, slots that
            hold pad_token_id are padding if that is set and is no eos_token_id, and otherwise all are real.
        config: of the generation.
        vocab_size: ids must be below it.
        max_positions: the model's window, or None.

    Raises:
        ValueError: no batch of integers, an empty prompt, an id outside the vocabulary, a mask of another
            shape or with gaps, or a prompt whose new tokens do not fit the window.
    """
    ids = _as_ids(input_ids)
    outside = np.argwhere((ids < 0) | (ids >= vocab_size))
    if len(outside):
        row, column = outside[0]
        raise ValueError(
            f"input_ids[{row}, {column}] = {ids[row, column]}: "
            f"the model's vocabulary has ids 0 to {vocab_size - 1}"
        )
    config.check_vocabulary(vocab_size)
    mask = _as_mask(attention_mask, ids, config)
    empty = np.flatnonzero(~mask.any(axis=1))
    if len(empty):
        raise ValueError(f"prompt {empty[0]} is empty: attention_mask hides all of its tokens")

    ids, mask = (np.repeat(a, config.num_return_sequences, axis=0) for a in (ids, mask))
    right_padded = not mask[:, -1].all()
    flush_ids, flush_mask = _align_right(ids, mask) if right_padded else (ids, mask)
    first = flush_mask.any(axis=0).argmax()  # columns that are padding in every row need no slots
    flush_ids, flush_mask = flush_ids[:, first:], flush_mask[:, first:]
    length = flush_ids.shape[1]
    if max_positions is not None and length >= max_positions:
        raise ValueError(
            f"a prompt of {length} tokens leaves no room for a new one: "
            f"the model has {max_positions} positions"
        )
    min_new, max_new = config.new_tokens(ids.shape[1], max_positions)
    if max_positions is not None and length + max_new > max_positions:
        raise ValueError(
            f"a prompt of {length} tokens and {max_new} new ones are past the model's {max_positions} "
            f"positions: shorten the prompt, or set max_new_tokens to {max_positions - length} or less"
        )
    bucket = bucket_length(length, None if max_positions is None else max_positions - max_new)
    num_slots = bucket_length(bucket + max_new, max_positions)
    pad = ((0, 0), (bucket - length, 0))
    flush_ids, flush_mask = np.pad(flush_ids, pad), np.pad(flush_mask, pad)
    return Prompts(ids, mask, right_padded, flush_ids, flush_mask, min_new, max_new, num_slots)


def bucket_length(length: int, at_most: int | None = None) -> int:
    """Rounds a length up: to 16, 32, 64, and from there to multiples of 64, but not past `at_most`."""
    rounded = next((size for size in (16, 32, 64) if length <= size), -(-length // 64) * 64)
    return rounded if at_most is None else max(length, min(rounded, at_most))


def _as_ids(input_ids: Any) -> np.ndarray:
    try:
        ids = np.asarray(input_ids)
    except ValueError:
        raise ValueError(
            "input_ids has rows of different lengths: pad them and pass an attention_mask"
        ) from None
    if ids.ndim != 2:
        raise ValueError(f"input_ids has shape {ids.shape}: it is [batch, length]")
    if ids.size == 0:
        raise ValueError(f"input_ids of shape {ids.shape} is an empty prompt: generation starts from a token")
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"input_ids has dtype {ids.dtype}: token ids are integers")
    return ids.astype(np.int64)


def _as_mask(attention_mask: Any, ids: np.ndarray, config: GenerationConfig) -> np.ndarray:
    if attention_mask is None:
        if config.pad_token_id is None or config.pad_token_id in config.eos_ids:
            return np.ones(ids.shape, bool)
        return ids != config.pad_token_id
    mask = np.asarray(attention_mask)
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask has shape {mask.shape}, but input_ids has {ids.shape}")
    return mask.astype(bool)


def _align_right(ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rolls each row so that its last real token stands in the last slot."""
    last = mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)
    gaps = np.flatnonzero(last - mask.argmax(axis=1) + 1 != mask.sum(axis=1))
    if len(gaps):
        raise ValueError(
            f"attention_mask[{gaps[0]}] has a gap: "
            "in a right-padded batch the real tokens of a row stand together"
        )
    source = (np.arange(ids.shape[1]) + last[:, None] + 1) % ids.shape[1]
    return np.take_along_axis(ids, source, axis=1), np.take_along_axis(mask, source, axis=1)
