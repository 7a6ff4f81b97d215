"""Spans of answers from given scores."""

import numpy as np
import pytest

import modelzoo
from inference.answering import Answer
from inference.task_model import Loaded
from tests.small_tokenizers import BERT_PURPOSES, bert

CONTEXT = "the quick brown fox jumps over the lazy dog"


@pytest.fixture(scope="module")
def loaded():
    tokenizer = bert()
    special = {purpose: tokenizer.token_to_id(token) for purpose, token in BERT_PURPOSES.items()}
    config = modelzoo.get_config("tiny-roberta", max_position_embeddings=66)
    return Loaded(None, modelzoo.RobertaForQuestionAnswering(config), {}, tokenizer, special)


def answer(loaded, monkeypatch, first, last, **options):
    """The answers of a model that is sure that one begins with the word `first` and ends with `last`."""
    task = Answer(loaded, **options)

    def run(encodings, *fields):
        rows = []
        for encoding in encodings:
            logits = np.zeros((2, len(encoding.ids)), np.float32)
            for row, word in enumerate((first, last)):
                for i, (start, end) in enumerate(encoding.offsets):
                    inside = encoding.sequence_ids[i] == 1 and CONTEXT.index(word) <= start
                    if inside and end <= CONTEXT.index(word) + len(word):
                        logits[row, i] = 9.0
            rows.append(tuple(logits))
        return rows

    monkeypatch.setattr(task, "run", run)
    return task("which fox?", CONTEXT)


def test_the_best_span(loaded, monkeypatch):
    (one,) = answer(loaded, monkeypatch, "quick", "fox")
    assert one["answer"] == "quick brown fox" == CONTEXT[one["start"] : one["end"]]
    assert 0 < one["score"] <= 1


def test_an_answer_does_not_end_before_it_begins(loaded, monkeypatch):
    (one,) = answer(loaded, monkeypatch, "fox", "quick")
    assert one["start"] < one["end"]
    assert one["answer"] != "fox jumps over the lazy dog the quick"


def test_no_answer_is_longer_than_asked(loaded, monkeypatch):
    offsets = loaded.tokenizer.encode(CONTEXT).offsets[1:-1]
    for one in answer(loaded, monkeypatch, "the", "dog", top_k=5, max_answer_len=2, whole_words=False):
        tokens = [(start, end) for start, end in offsets if one["start"] <= start and end <= one["end"]]
        assert 1 <= len(tokens) <= 2


def test_pieces_of_a_long_text_add_up(loaded, monkeypatch):
    (whole,) = answer(loaded, monkeypatch, "brown", "fox")
    (cut,) = answer(loaded, monkeypatch, "brown", "fox", max_seq_len=24, doc_stride=8)
    assert cut["answer"] == whole["answer"] == "brown fox"
    nothing = answer(loaded, monkeypatch, "brown", "fox", may_be_empty=True, top_k=40)
    assert any(one["answer"] == "" and (one["start"], one["end"]) == (0, 0) for one in nothing)
