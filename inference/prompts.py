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
        sequences: int32 [R, T], prompt and new tokens, cut to the longest row; of an encoder-decoder its start token
            and the new ones. R is B x num_return_sequences. For left-padded (or unpadded) prompts exactly what
            transformers returns: the prompt as it was passed, then the new tokens, then padding. For right-padded
            ones each row's tokens without a gap, padding on the right.
        lengths: int32 [R], one past the last generated token of each row, its end-of-sequence token included.
        scores: float32 [steps, rows, V], the processed logits that each new token was chosen from (of beams
            log-probabilities); rows are R, of beams B x num_beams. None unless `output_scores`.
        logits: the same as the model gave them. None unless `output_logits`.
        sequences_scores: float32 [R], beams alone: a hypothesis' log-probability over its length to the power
            length_penalty.
        beam_indices: int32 [R, steps], beams alone: the row of `scores` that each new token was taken from, -1 after
            the last.
        logprobs: float32 [R, steps], the model's own log-probability of each new token, 0 after the last. None unless
            `output_logprobs`.
        prompt_logprobs: float32 [B, T], of each token of the prompts as passed in; NaN at padding and at a row's first
            token. None unless `output_prompt_logprobs`.
        num_passes: of the model after the prefill, where tokens were guessed (`inference.speculative`); else None.
        num_guessed, num_accepted: int32 [R], guesses that were checked, and of these the right ones; None as above.
    """

    sequences: np.ndarray
    lengths: np.ndarray
    scores: np.ndarray | None = None
    logits: np.ndarray | None = None
    sequences_scores: np.ndarray | None = None
    beam_indices: np.ndarray | None = None
    logprobs: np.ndarray | None = None
    prompt_logprobs: np.ndarray | None = None
    num_passes: int | None = None
    num_guessed: np.ndarray | None = None
    num_accepted: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Prompts:
    """A checked batch, ready for the device.

    Attributes:
        given: int32 [B, T], as passed in; of an encoder-decoder what its output begins with.
        given_mask: bool [B, T].
        right_padded: some row's last slot is padding.
        input_ids: int32 [B, bucket], every row ending at the last slot.
        attention_mask: bool [B, bucket].
        source_ids, source_mask: [B, P], what was passed in, in a bucket, and which slots were: an encoder's input, or
            the prompt again for processors that ask for it.
        source_real: bool [B, P], which of those are no padding.
        min_new, max_new: tokens to generate.
        num_slots: of the cache, bucketed too.
    """

    given: np.ndarray
    given_mask: np.ndarray
    right_padded: bool
    input_ids: np.ndarray
    attention_mask: np.ndarray
    source_ids: np.ndarray
    source_mask: np.ndarray
    source_real: np.ndarray
    min_new: int
    max_new: int
    num_slots: int

    def seen(self, vocab_size: int) -> np.ndarray:
        """bool [B, vocab_size], the ids that occur in each row as passed in, padding included."""
        seen = np.zeros((len(self.given), vocab_size), bool)
        np.put_along_axis(seen, self.given, True, axis=1)
        return seen

    @property
    def num_tokens(self) -> int:
        """The slots that prompt and new tokens take, without a bucket's padding."""
        return self.input_ids.shape[1] - int(self.first.min()) + self.max_new

    @property
    def first(self) -> np.ndarray:
        """int32 [B], the slot of `input_ids` where each row begins: with its own padding if that is on the left."""
        bucket = self.input_ids.shape[1]
        if self.right_padded:
            return (bucket - self.given_mask.sum(axis=1)).astype(np.int32)
        # Columns that are padding in every row were dropped.
        width = self.given.shape[1] - self.given_mask.any(axis=0).argmax()
        return np.full(len(self.given), bucket - width, np.int32)

    def sequences(
        self, new_tokens: np.ndarray, num_new: np.ndarray, fill_id: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Joins prompts and new tokens.

        Args:
            new_tokens: int32 [R, steps], results of a prompt in neighbouring rows.
            num_new: int32 [R], how many of them count.
            fill_id: stands after the others.

        Returns:
            (int32 [R, T], their lengths int32 [R]).
        """
        copies = len(num_new) // len(self.given)
        given, mask = (np.repeat(rows, copies, axis=0) for rows in (self.given, self.given_mask))
        steps = int(num_new.max())
        new_tokens = np.where(np.arange(steps) < num_new[:, None], new_tokens[:, :steps], fill_id)
        if not self.right_padded:
            sequences = np.concatenate([given, new_tokens], axis=1)
            lengths = given.shape[1] + num_new
        else:
            num_prompt = mask.sum(axis=1)
            lengths = num_prompt + num_new
            sequences = np.full((len(num_new), lengths.max()), fill_id, np.int32)
            for row in range(len(num_new)):
                sequences[row, : num_prompt[row]] = given[row, mask[row]]
                sequences[row, num_prompt[row] : lengths[row]] = new_tokens[row, : num_new[row]]
        return sequences.astype(np.int32), lengths.astype(np.int32)

    def as_given(self, values: np.ndarray) -> np.ndarray:
        """Puts what was computed for the tokens after each row's first where those stand in `given`.

        Args:
            values: float32 [B, bucket - 1].

        Returns:
            float32 [B, T], NaN at padding and at each row's first token.
        """
        out = np.full(self.given.shape, np.nan, np.float32)
        for row, real in enumerate(self.given_mask):
            places = np.flatnonzero(real)[1:]
            from_end = places - places[-1] - 1 if len(places) else places
            if not self.right_padded:
                from_end = places - len(real)
            out[row, places] = values[row, from_end]
        return out


def prepare_prompts(
    input_ids: Any,
    attention_mask: Any,
    config: GenerationConfig,
    vocab_size: int,
    max_positions: int | None,
    in_place: bool = False,
) -> Prompts:
    """Checks a batch of prompts and lays it out for the compiled loop.

    Args:
        input_ids: integers [B, T].
        attention_mask: [B, T], non-zero where a token is real, or None: then, as in transformers, slots that
            hold pad_token_id are padding if that is set and is no eos_token_id, and otherwise all are real.
        config: of the generation.
        vocab_size: ids must be below it.
        max_positions: the model's window, or None.
        in_place: the model's positions are slots, so that no row may be moved: no bucket then.

    Raises:
        ValueError: no batch of integers, an empty prompt, an id outside the vocabulary, a mask of another
            shape or with gaps, a prompt whose new tokens do not fit the window, or one that would have to be moved.
    """
    ids, mask = _checked(input_ids, attention_mask, config, vocab_size)
    right_padded = not mask[:, -1].all()
    if right_padded and in_place:
        raise ValueError(
            f"attention_mask[{(~mask[:, -1]).argmax()}] pads on the right: this model counts positions from a row's "
            "first slot, so pad on the left"
        )
    flush_ids, flush_mask = _align_right(ids, mask) if right_padded else (ids, mask)
    # Columns that are padding in every row need no slots.
    first = 0 if in_place else flush_mask.any(axis=0).argmax()
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
    bucket = length if in_place else bucket
    num_slots = bucket_length(bucket + max_new, max_positions)
    pad = ((0, 0), (bucket - length, 0))
    flush_ids, flush_mask = np.pad(flush_ids, pad), np.pad(flush_mask, pad)
    source = _bucketed(ids, mask, None)
    return Prompts(ids, mask, right_padded, flush_ids, flush_mask, *source, min_new, max_new, num_slots)


def prepare_sources(
    input_ids: Any,
    attention_mask: Any,
    config: GenerationConfig,
    vocab_size: int,
    max_positions: int | None,
    decoder_input_ids: Any = None,
) -> Prompts:
    """Checks an encoder-decoder's input, and lays it and what the output begins with out for the compiled loop.

    A row keeps its place in the encoder: positions count from its first slot, padding or not, as in transformers.

    Args:
        input_ids, attention_mask, config, vocab_size, max_positions: as of `prepare_prompts`.
        decoder_input_ids: integers [B, T], what the output begins with, or None: the start token. Where no row begins
            with the start token, it is put before all, as in transformers.

    Raises:
        ValueError: as `prepare_prompts`; beginnings of another number of rows.
    """
    ids, mask = _checked(input_ids, attention_mask, config, vocab_size)
    if max_positions is not None and ids.shape[1] > max_positions:
        raise ValueError(
            f"an input of {ids.shape[1]} tokens is past the encoder's {max_positions} positions: shorten it"
        )
    if config.output_prompt_logprobs:
        raise ValueError(
            "output_prompt_logprobs: an encoder-decoder has no prompt that it could have predicted"
        )
    start = np.full((len(ids), 1), config.decoder_start_token_id, np.int64)
    if decoder_input_ids is not None:
        begun = _as_ids(decoder_input_ids, "decoder_input_ids")
        _check_ids(begun, vocab_size, "decoder_input_ids")
        if len(begun) != len(ids):
            raise ValueError(f"decoder_input_ids has {len(begun)} rows, but input_ids has {len(ids)}")
        start = np.concatenate([start, begun], axis=1) if (begun[:, 0] != start[:, 0]).all() else begun
    num_start = start.shape[1]
    if max_positions is not None and num_start >= max_positions:
        raise ValueError(
            f"decoder_input_ids of {num_start} tokens, the start token among them, leave no room for a new one: "
            f"the model has {max_positions} positions"
        )
    min_new, max_new = config.new_tokens(num_start, max_positions)
    if max_positions is not None and num_start + max_new > max_positions:
        what = "the start token" if num_start == 1 else f"decoder_input_ids of {num_start} tokens"
        raise ValueError(
            f"{what} and {max_new} new ones are past the model's {max_positions} positions: "
            f"set max_new_tokens to {max_positions - num_start} or less"
        )
    real = np.ones(start.shape, bool)
    source = _bucketed(ids, mask, max_positions)
    num_slots = bucket_length(num_start + max_new, max_positions)
    return Prompts(start, real, False, start, real, *source, min_new, max_new, num_slots)


def _checked(
    input_ids: Any, attention_mask: Any, config: GenerationConfig, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """(ids int64 [B, T], which are real), or what is wrong with them."""
    ids = _as_ids(input_ids)
    _check_ids(ids, vocab_size)
    config.check_vocabulary(vocab_size)
    mask = _as_mask(attention_mask, ids, config)
    empty = np.flatnonzero(~mask.any(axis=1))
    if len(empty):
        raise ValueError(f"prompt {empty[0]} is empty: attention_mask hides all of its tokens")
    return ids, mask


def _bucketed(
    ids: np.ndarray, mask: np.ndarray, at_most: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, which slots were passed in, which are real) with slots on the right up to a bucket's length."""
    length = ids.shape[1]
    pad = ((0, 0), (0, bucket_length(length, at_most) - length))
    given = np.ones(ids.shape, bool)
    return np.pad(ids, pad), np.pad(given, pad), np.pad(mask, pad)


def bucket_length(length: int, at_most: int | None = None) -> int:
    """Rounds a length up: to 16, 32, 64, and from there to multiples of 64, but not past `at_most`."""
    rounded = next((size for size in (16, 32, 64) if length <= size), -(-length // 64) * 64)
    return rounded if at_most is None else max(length, min(rounded, at_most))


def _as_ids(given: Any, name: str = "input_ids") -> np.ndarray:
    try:
        ids = np.asarray(given)
    except ValueError:
        mend = (
            "pad them and pass an attention_mask" if name == "input_ids" else "they begin with equally many"
        )
        raise ValueError(f"{name} has rows of different lengths: {mend}") from None
    if ids.dtype.kind in "US":
        raise ValueError(
            f"{name} is text: it is token ids [batch, length], such as tokenizer.encode(text).ids in a list"
        )
    if ids.ndim != 2:
        raise ValueError(f"{name} has shape {ids.shape}: it is [batch, length]")
    if ids.size == 0:
        raise ValueError(f"{name} of shape {ids.shape} is an empty prompt: generation starts from a token")
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{name} has dtype {ids.dtype}: token ids are integers")
    return ids.astype(np.int64)


def _check_ids(ids: np.ndarray, vocab_size: int, name: str = "input_ids") -> None:
    outside = np.argwhere((ids < 0) | (ids >= vocab_size))
    if len(outside):
        row, column = outside[0]
        raise ValueError(
            f"{name}[{row}, {column}] = {ids[row, column]}: "
            f"the model's vocabulary has ids 0 to {vocab_size - 1}"
        )


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
