"""Generation of every family and configuration against transformers' `generate` (torch, eager): token for token."""

from typing import Any

import numpy as np
import pytest

import modelzoo
from tests.parity.generation import EOS, WRITERS, assert_same, both, every_kind, titles

ENDS = [EOS, 7, 33]
"""Ids that end rows of these models at different steps."""
MODES: dict[str, dict[str, Any]] = {
    "greedy": dict(max_new_tokens=24, eos_token_id=ENDS),
    "beam": dict(max_new_tokens=20, num_beams=4, eos_token_id=ENDS, num_return_sequences=2),
    "group beam": dict(
        max_new_tokens=16,
        num_beams=4,
        num_beam_groups=2,
        diversity_penalty=0.7,
        eos_token_id=ENDS,
        num_return_sequences=3,
    ),
}


CELLS = [(cls.__name__, title) for cls in WRITERS for title in titles(cls)]
FIRST_CELLS = [(cls.__name__, title) for cls in WRITERS for title in titles(cls)[:2]]


def test_every_class_that_writes_has_configs():
    assert {modelzoo.GPT2LMHeadModel, modelzoo.RobertaForCausalLM, modelzoo.MvpForCausalLM} <= set(WRITERS)
    assert all(titles(cls) for cls in WRITERS)


@pytest.mark.parametrize(("name", "title"), CELLS)
def test_greedy_tokens_of_every_configuration(name, title):
    out, want = both(name, title, **MODES["greedy"])
    assert_same(out, want)


@pytest.mark.parametrize("mode", ["beam", "group beam"])
@pytest.mark.parametrize(("name", "title"), FIRST_CELLS)
def test_beams_of_every_class(name, title, mode):
    out, want = both(name, title, **MODES[mode])
    assert_same(out, want)


BEAMS: list[dict[str, Any]] = [
    dict(),
    dict(eos_token_id=ENDS),
    dict(eos_token_id=ENDS, length_penalty=2.0),
    dict(eos_token_id=ENDS, length_penalty=-1.0),
    dict(eos_token_id=ENDS, length_penalty=0.0, early_stopping=True),
    dict(eos_token_id=ENDS, early_stopping=True, num_return_sequences=4),
    dict(eos_token_id=ENDS, early_stopping="never", length_penalty=1.5),
    dict(eos_token_id=ENDS, early_stopping="never", length_penalty=-0.5, num_return_sequences=2),
    dict(eos_token_id=ENDS, num_beams=7, pad_token_id=5),
    dict(eos_token_id=ENDS, num_beams=2, repetition_penalty=1.3, no_repeat_ngram_size=2),
    dict(eos_token_id=ENDS, min_new_tokens=8, renormalize_logits=True),
    dict(eos_token_id=EOS, forced_eos_token_id=EOS, bad_words_ids=[[5], [6, 7]]),
    dict(max_length=30, eos_token_id=ENDS),
]


@pytest.mark.parametrize("fields", BEAMS, ids=str)
@every_kind()
def test_beams(name, fields):
    out, want = both(name, **{"max_new_tokens": 18, "num_beams": 4, **fields})
    assert_same(out, want)
    rows = len(want.sequences)
    steps = want.beam_indices.shape[1] if want.beam_indices is not None else 0
    assert out.beam_indices.shape[0] == rows
    if steps:
        np.testing.assert_array_equal(out.beam_indices, want.beam_indices.numpy())


GROUPS: list[dict[str, Any]] = [
    dict(),
    dict(eos_token_id=ENDS, length_penalty=2.0, num_return_sequences=6),
    dict(
        eos_token_id=ENDS,
        early_stopping=True,
        num_return_sequences=2,
        pad_token_id=7,
        num_beam_groups=2,
        repetition_penalty=1.3,
        no_repeat_ngram_size=2,
    ),
    dict(eos_token_id=ENDS, early_stopping="never", length_penalty=0.5),
    dict(eos_token_id=ENDS, num_beam_groups=6, diversity_penalty=3.0, num_return_sequences=6),
]


@pytest.mark.parametrize("fields", GROUPS, ids=str)
@every_kind()
def test_groups_of_beams(name, fields):
    out, want = both(
        name,
        **{"max_new_tokens": 16, "num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 0.6, **fields},
    )
    assert_same(out, want)
