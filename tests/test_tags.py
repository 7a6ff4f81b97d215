"""Labels of words on the pieces that a tokenizer makes of them."""

import numpy as np
import pytest

from tests import labelled
from train.tasks.tags import Tags, first_pieces, owners_of

NAMES = {0: "O", 1: "B-X", 2: "I-X"}
WORDS = ["the", "quickest", "fox", "jumps"]
TAGS = ["O", "B-X", "I-X", "O"]


def tagger(words, model="MegatronBertForTokenClassification", length=24, **task):
    return labelled.head(Tags, model, words, length, num_labels=3, id2label=NAMES, task=task)


@pytest.mark.parametrize(
    ("words", "model"),
    [
        (labelled.bert_words(), "MegatronBertForTokenClassification"),
        (labelled.roberta_words(), "RobertaForTokenClassification"),
    ],
)
@pytest.mark.parametrize("every", [False, True])
def test_pieces_get_the_label_of_their_word(words, model, every):
    head = tagger(words, model, label_all_pieces=every)
    (row,) = head.rows(labelled.examples({"tokens": WORDS, "tags": TAGS}))
    tokens = [words.tokenizer.id_to_token(number) for number in row.ids]
    labels = row.labels["labels"]
    assert len(labels) == len(tokens)
    assert labels[0] == labels[-1] == -100  # around the text

    # the pieces, put together by hand
    expected, word = [], -1
    joined = " ".join(WORDS)
    place = 0
    for token in tokens[1:-1]:
        plain = token.removeprefix("##").replace("Ġ", "")
        place = joined.index(plain, place)
        starts = place in [joined.index(w) for w in WORDS]
        word += starts
        expected.append([0, 1, 2, 0][word] if starts or every else -100)
        place += len(plain)
    assert labels[1:-1] == expected
    assert sum(label != -100 for label in expected) >= 4
    firsts, _ = row.about
    assert [labels[at] for at in firsts] == [0, 1, 2, 0]


def test_a_lone_space_is_of_the_word_after_it():
    class Encoding:
        offsets = [(0, 0), (0, 2), (2, 3), (3, 5), (5, 7)]
        special_tokens_mask = [1, 0, 0, 0, 0]

    owners = owners_of(["ab", "cd", "e"], Encoding)  # "ab cd e"
    assert owners == [None, 0, 1, 1, 2]
    assert first_pieces(owners, 3) == [1, 2, 4]


def test_words_are_measured_and_those_cut_off_count_as_outside():
    words = labelled.bert_words()
    head = tagger(words, length=4)  # two pieces of text
    (row,) = rows = head.rows(
        labelled.examples({"tokens": ["the", "fox", "dog"], "tags": ["B-X", "O", "B-X"]})
    )
    assert head.num_cut == 1
    logits = np.zeros((4, 3), np.float32)
    logits[row.about[0][0], 1] = 9  # the first word is B-X
    metrics, (found,) = head.measure(
        labelled.examples({"tokens": ["the", "fox", "dog"], "tags": ["B-X", "O", "B-X"]}),
        rows,
        {"logits": [logits]},
    )
    assert tuple(metrics) == head.metrics
    assert found["prediction"] == ["B-X", "O", "O"]
    assert metrics == pytest.approx({"precision": 1.0, "recall": 0.5, "f1": 2 / 3, "accuracy": 2 / 3})


def test_a_batch_is_padded_with_labels_that_no_loss_counts():
    head = tagger(labelled.bert_words())
    rows = head.rows(labelled.examples({"tokens": WORDS, "tags": TAGS}, {"tokens": ["fox"], "tags": ["B-X"]}))
    batch = head.batch(rows, 24, counted=1)
    assert {name: array.shape for name, array in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "token_type_ids", "labels"), (2, 24)
    )
    assert (batch["labels"][0] != -100).sum() == 4
    assert (batch["labels"][1] == -100).all()  # it fills the batch up
    assert batch["attention_mask"][1].sum() == 3
    assert (batch["input_ids"][1, 3:] == 0).all()
