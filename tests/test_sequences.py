"""Classes of texts, numbers for them, and choices: rows and what is measured of them."""

import dataclasses

import numpy as np
import pytest

import modelzoo
from tests import labelled
from tests.test_targets import gpt2_words
from train.tasks.sequences import Choices, NextSentence, Sequences, TwoHeads

TEXTS = labelled.examples({"text": "the fox", "label": 1}, {"text": "the lazy dog jumps", "label": 0})


def classifier(model="MegatronBertForSequenceClassification", words=None, **fields):
    fields = dict(problem_type="single_label_classification") | fields
    return labelled.head(Sequences, model, words or labelled.bert_words(), **fields)


def test_pairs_are_read_as_the_tokenizer_joins_them():
    head = classifier()
    pair = labelled.examples({"text": "the fox", "text_pair": "the dog", "label": 1})
    (row,) = head.rows(pair)
    encoding = labelled.bert_words().tokenizer.encode("the fox", "the dog")
    assert (row.ids, row.types) == (encoding.ids, encoding.type_ids)
    with pytest.raises(ValueError, match="a.jsonl:2: no 'text_pair'"):
        head.rows([*pair, TEXTS[1]])


def test_prefix_and_suffix_stand_around_a_text():
    head = classifier(task=dict(prefix="over ", suffix=" dog"))
    assert head.rows(TEXTS)[0].ids == labelled.bert_words().tokenizer.encode("over the fox dog").ids


def test_one_class():
    head = classifier()
    rows = head.rows(TEXTS)
    metrics, found = head.measure(TEXTS, rows, {"logits": [[0.0, 2.0], [0.0, 1.0]]})
    assert metrics["accuracy"] == 0.5
    assert tuple(metrics) == head.metrics
    assert [(one["prediction"], one["label"]) for one in found] == [("LABEL_1",) * 2, ("LABEL_1", "LABEL_0")]
    assert found[0]["score"] == pytest.approx(1 / (1 + np.exp(-2)))
    batch = head.batch(rows, 24, counted=1)
    assert batch["labels"].tolist() == [1, -100]
    assert batch["labels"].dtype == np.int32


def test_several_classes():
    names = {0: "a", 1: "b"}
    head = classifier(problem_type="multi_label_classification", id2label=names)
    several = [
        dataclasses.replace(one, fields=one.fields | {"label": label})
        for one, label in zip(TEXTS, (["b"], []), strict=True)
    ]
    rows = head.rows(several)
    assert head.batch(rows, 24, counted=1)["labels"].tolist() == [[0.0, 1.0], [0.0, 0.0]]
    metrics, found = head.measure(several, rows, {"logits": [[-1.0, 1.0], [1.0, -1.0]]})
    assert [one["prediction"] for one in found] == [["b"], ["a"]]
    assert metrics["accuracy"] == 0.5
    assert tuple(metrics) == ("loss", *head.metrics)


def test_a_number():
    head = classifier(problem_type="regression", num_labels=1)
    metrics, found = head.measure(TEXTS, head.rows(TEXTS), {"logits": [[0.5], [0.0]]})
    assert metrics["mse"] == 0.125
    assert tuple(metrics) == ("loss", *head.metrics)
    assert [one["prediction"] for one in found] == [0.5, 0.0]
    assert head.batch(head.rows(TEXTS), 24)["labels"].tolist() == [[1.0], [0.0]]


def test_sentences_that_follow():
    head = labelled.head(NextSentence, "MegatronBertForNextSentencePrediction", labelled.bert_words())
    pair = labelled.examples({"text": "the fox", "text_pair": "the dog", "label": 1})
    assert head.rows(pair)[0].labels == {"labels": 1}
    with pytest.raises(ValueError, match="label 2 is outside the 2 classes"):
        head.rows(labelled.examples({"text": "the fox", "text_pair": "the dog", "label": 2}))


CHOICES = {"text": "the fox", "choices": ["jumps", "the lazy dog"], "label": 1}


def test_choices():
    head = labelled.head(Choices, "MegatronBertForMultipleChoice", labelled.bert_words())
    asked = labelled.examples(CHOICES, CHOICES | {"label": "0"})
    rows = head.rows(asked)
    batch = head.batch(rows, 16)
    assert batch["input_ids"].shape == batch["token_type_ids"].shape == (2, 2, 16)
    assert batch["labels"].tolist() == [1, 0]
    encoding = labelled.bert_words().tokenizer.encode("the fox", "the lazy dog")
    assert batch["input_ids"][0, 1, : len(encoding.ids)].tolist() == encoding.ids
    assert batch["attention_mask"][0, 1].sum() == len(encoding.ids)
    metrics, found = head.measure(asked, rows, {"logits": [[0.0, 1.0], [0.0, 1.0]]})
    assert metrics == {"accuracy": 0.5}
    assert found[0]["choice"] == "the lazy dog"


def test_two_heads():
    """Of two heads, one learns the right choice's tokens and the other its number."""
    words = gpt2_words()
    head = labelled.head(TwoHeads, "GPT2DoubleHeadsModel", words, pad_token_id=1)
    rows = head.rows(asked := labelled.examples(CHOICES, CHOICES | {"label": "0"}, CHOICES))
    batch = head.batch(rows, 16, counted=2)
    ids = words.tokenizer.encode("the fox", "the lazy dog").ids
    assert batch["input_ids"].shape == batch["labels"].shape == (3, 2, 16)
    assert batch["labels"][0, 1].tolist() == ids + [-100] * (16 - len(ids))
    assert (batch["labels"][0, 0] == -100).all()
    assert batch["mc_labels"].tolist() == [1, 0, -100]
    assert (batch["labels"][2] == -100).all()
    assert batch["mc_token_ids"][0, 1] == len(ids) - 1
    assert set(batch) <= modelzoo.input_names(head.model) | {"labels", "mc_labels"}
    metrics, _ = head.measure(asked, rows, {"mc_logits": [[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]})
    assert metrics == {"accuracy": 2 / 3}
    assert tuple(metrics) == head.metrics


@pytest.mark.parametrize(
    ("second", "error"),
    [
        (CHOICES | {"label": 2}, "a.jsonl:2: label 2 is the number of no choice: 0 to 1"),
        (CHOICES | {"label": "jumps"}, "a.jsonl:2: label 'jumps' is the number of no choice"),
        (CHOICES | {"choices": ["a", "b", "c"]}, "a.jsonl:2: 3 choices, where a.jsonl:1 has 2"),
    ],
)
def test_slips_in_choices_are_named(second, error):
    head = labelled.head(Choices, "MegatronBertForMultipleChoice", labelled.bert_words())
    with pytest.raises(ValueError, match=error):
        head.rows(labelled.examples(CHOICES, second))
