"""What all heads have in common: texts cut to a length, and batches laid out."""

import pytest

from tests import labelled
from train.tasks.head import Head, Row


def test_texts_that_do_not_fit_are_cut_and_counted():
    head = labelled.head(Head, "RobertaModel", labelled.roberta_words(), 6)
    first, second = head.encode(["the fox", "the quick brown fox jumps over the lazy dog"])
    assert len(second.ids) == 6
    assert second.ids[-1] == 2  # the end stays
    assert len(first.ids) <= 6
    assert head.num_cut == 1
    pair, _ = head.encode(["the fox"] * 2, ["the quick brown fox jumps over the lazy dog", "dog"])
    assert len(pair.ids) == 6


def test_only_models_with_types_get_them():
    row = Row(0, [5, 6], [0, 1], {"labels": 1})
    bert = labelled.head(Head, "MegatronBertForSequenceClassification", labelled.bert_words())
    roberta = labelled.head(Head, "RobertaForSequenceClassification", labelled.roberta_words())
    assert bert.batch([row], 4)["token_type_ids"].tolist() == [[0, 1, 0, 0]]
    assert "token_type_ids" not in roberta.batch([row], 4)
    assert roberta.batch([row], 4)["input_ids"].tolist() == [[5, 6, 1, 1]]
    assert roberta.batch([row], 4)["attention_mask"].tolist() == [[1, 1, 0, 0]]


def test_a_span_that_fills_a_batch_up_lies_past_the_end():
    head = labelled.head(Head, "RobertaForQuestionAnswering", labelled.roberta_words())
    row = Row(0, [5, 6], [0, 0], {"start_positions": 1, "end_positions": 1})
    batch = head.batch([row, row], 4, counted=1)
    assert batch["start_positions"].tolist() == [1, 4]  # which no loss counts


def test_the_base_measures_nothing():
    head = labelled.head(Head, "RobertaModel", labelled.roberta_words())
    with pytest.raises(NotImplementedError):
        head.rows([])
    with pytest.raises(NotImplementedError):
        head.measure([], [], {})
    with pytest.raises(NotImplementedError):
        _ = head.metrics
