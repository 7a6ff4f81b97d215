"""The host's side of a generation: what is refused, how rows are aligned and bucketed, how results are
cut."""

from typing import Any

import numpy as np
import pytest

from inference import GenerationConfig
from inference.prompts import bucket_length, prepare_prompts, prepare_sources

VOCAB, WINDOW = 50, 64


def prepare(ids, mask=None, max_positions: int | None = WINDOW, **fields: Any):
    config = GenerationConfig(**{"max_new_tokens": 8, **fields})
    return prepare_prompts(ids, mask, config, VOCAB, max_positions)


@pytest.mark.parametrize(
    ("ids", "mask", "fields", "error"),
    [
        ([[]], None, {}, "empty prompt"),
        ([[1, 2]], [[0, 0]], {}, "prompt 0 is empty"),
        ([1, 2, 3], None, {}, r"shape \(3,\)"),
        ("the end", None, {}, r"input_ids is text: it is token ids"),
        ([[1, 2], [3]], None, {}, "rows of different lengths"),
        ([[1.0, 2.0]], None, {}, "dtype float64"),
        ([[1, 50]], None, {}, r"input_ids\[0, 1\] = 50: .* ids 0 to 49"),
        ([[-1, 5]], None, {}, r"input_ids\[0, 0\] = -1"),
        ([[1, 2]], [[1, 1, 1]], {}, r"attention_mask has shape \(1, 3\)"),
        ([[1, 2, 3, 4]], [[1, 0, 1, 0]], {}, r"attention_mask\[0\] has a gap"),
        ([[1] * 64], None, {}, "64 tokens leaves no room"),
        ([[1] * 57], None, {}, "57 tokens and 8 new ones are past the model's 64 .* max_new_tokens to 7"),
        ([[1, 2]], None, {"eos_token_id": 50}, "eos_token_id = 50"),
    ],
)
def test_bad_prompts_are_refused(ids, mask, fields, error):
    with pytest.raises(ValueError, match=error):
        prepare(ids, mask, **fields)


def test_the_window_counts_real_tokens_not_padding():
    ids, mask = np.ones((2, 70), int), np.zeros((2, 70), int)
    mask[:, -20:] = 1
    assert prepare(ids, mask).num_slots <= WINDOW
    assert prepare([[1] * 56]).num_slots == WINDOW


def test_left_and_right_padding_are_the_same_inside():
    left = prepare([[0, 0, 5, 6], [1, 2, 3, 4]], [[0, 0, 1, 1], [1, 1, 1, 1]])
    right = prepare([[5, 6, 0, 0], [1, 2, 3, 4]], [[1, 1, 0, 0], [1, 1, 1, 1]])
    assert not left.right_padded
    assert right.right_padded
    np.testing.assert_array_equal(left.input_ids, right.input_ids)
    np.testing.assert_array_equal(left.attention_mask, right.attention_mask)
    assert left.attention_mask[:, -4:].tolist() == [[False, False, True, True], [True] * 4]


def test_mask_is_inferred_from_pad_as_transformers_does():
    assert prepare([[9, 9, 5]], pad_token_id=9).given_mask.tolist() == [[False, False, True]]
    assert prepare([[9, 9, 5]], pad_token_id=9, eos_token_id=9).given_mask.all()
    assert prepare([[9, 9, 5]]).given_mask.all()


def test_lengths_fall_into_few_buckets():
    buckets = {1: 16, 16: 16, 17: 32, 33: 64, 64: 64, 65: 128, 128: 128, 129: 192}
    assert {length: bucket_length(length) for length in buckets} == buckets
    assert bucket_length(17, at_most=20) == 20
    shapes = {(p.input_ids.shape, p.num_slots) for p in (prepare([[1] * n]) for n in range(1, 17))}
    assert len(shapes) == 1


def test_no_window_no_limit():
    prompts = prepare([[1] * 500], max_positions=None)
    assert prompts.input_ids.shape == (1, 512)
    assert prompts.num_slots == 576


def test_seen_holds_the_row_as_passed_in():
    prompts = prepare([[0, 5, 6], [1, 2, 1]], [[0, 1, 1], [1, 1, 1]])
    assert [np.flatnonzero(row).tolist() for row in prompts.seen(VOCAB)] == [[0, 5, 6], [1, 2]]


def test_output_keeps_left_padding_and_closes_right_padding():
    new = np.array([[7, 9, 3, 3], [7, 8, 7, 3]])

    def output(ids, mask):
        return prepare(ids, mask).sequences(new, np.array([2, 3]), fill_id=0)

    left, lengths = output([[0, 5], [3, 4]], [[0, 1], [1, 1]])
    assert left.tolist() == [[0, 5, 7, 9, 0], [3, 4, 7, 8, 7]]
    assert lengths.tolist() == [4, 5]
    right, lengths = output([[5, 0], [3, 4]], [[1, 0], [1, 1]])
    assert right.tolist() == [[5, 7, 9, 0, 0], [3, 4, 7, 8, 7]]
    assert lengths.tolist() == [3, 5]
    assert right.dtype == lengths.dtype == np.int32


def test_several_results_of_a_prompt_stand_together():
    sequences, lengths = prepare([[5, 6]]).sequences(np.array([[7, 8], [9, 3]]), np.array([2, 1]), fill_id=0)
    assert sequences.tolist() == [[5, 6, 7, 8], [5, 6, 9, 0]]
    assert lengths.tolist() == [4, 3]


def sources(ids=((5, 6), (3, 4)), **fields: Any):
    begun = fields.pop("begun", None)
    config = GenerationConfig(**{"max_new_tokens": 4, "decoder_start_token_id": 9} | fields)
    return prepare_sources(ids, None, config, VOCAB, WINDOW, begun)


def test_an_output_begins_with_the_start_token_and_what_is_given():
    assert sources().given.tolist() == [[9], [9]]
    assert sources(begun=[[1, 2], [3, 4]]).given.tolist() == [[9, 1, 2], [9, 3, 4]]
    begun = sources(begun=[[9, 2], [9, 4]], max_new_tokens=None, max_length=7)
    assert begun.given.tolist() == [[9, 2], [9, 4]]
    assert (begun.max_new, begun.num_tokens) == (5, 7)
    # As transformers: only where no row has it.
    assert sources(begun=[[9, 2], [3, 4]]).given.tolist() == [[9, 2], [3, 4]]


@pytest.mark.parametrize(
    ("begun", "error"),
    [
        ([[1]], "decoder_input_ids has 1 rows, but input_ids has 2"),
        ([[1], [VOCAB]], rf"decoder_input_ids\[1, 0\] = {VOCAB}: the model's vocabulary"),
        ([[1], [2, 3]], "decoder_input_ids has rows of different lengths: they begin with equally many"),
        (
            [[1] * WINDOW] * 2,
            rf"decoder_input_ids of {WINDOW + 1} tokens, the start token among them, leave no room",
        ),
        (
            [[1] * (WINDOW - 3)] * 2,
            rf"decoder_input_ids of {WINDOW - 2} tokens and 4 new ones .* to 2 or less",
        ),
    ],
)
def test_outputs_that_cannot_begin_so_are_refused(begun, error):
    with pytest.raises(ValueError, match=error):
        sources(begun=begun)


def test_rows_whose_positions_are_slots_stay_in_place():
    config = GenerationConfig(max_new_tokens=4)
    ids, mask = [[0, 0, 5], [0, 3, 4]], [[0, 0, 1], [0, 1, 1]]
    prompts = prepare_prompts(ids, mask, config, VOCAB, WINDOW, in_place=True)
    assert prompts.input_ids.tolist() == ids
    assert prompts.attention_mask.tolist() == np.array(mask, bool).tolist()
    with pytest.raises(ValueError, match=r"attention_mask\[1\] pads on the right: .* so pad on the left"):
        prepare_prompts([[1, 2], [3, 0]], [[1, 1], [1, 0]], config, VOCAB, WINDOW, in_place=True)
