"""Tokens put together to names, from given probabilities."""

import numpy as np
import pytest

import modelzoo
from inference.tagging import Tag
from inference.task_model import Loaded
from tests.small_tokenizers import BERT_PURPOSES, bert

TEXT = "the fox lazy dog"
LABELS = {0: "O", 1: "B-PER", 2: "I-PER"}


@pytest.fixture(scope="module")
def loaded():
    tokenizer = bert(70)
    config = modelzoo.get_config("tiny-roberta", num_labels=3, id2label=LABELS)
    special = {purpose: tokenizer.token_to_id(token) for purpose, token in BERT_PURPOSES.items()}
    return Loaded(None, modelzoo.RobertaForTokenClassification(config), {}, tokenizer, special)


def tag(loaded, monkeypatch, strategy, classes, **options):
    """What a model makes of TEXT that is sure of a class of each token, more and more so."""
    task = Tag(loaded, strategy=strategy, **options)

    def run(encodings, *fields):
        (encoding,) = encodings
        logits = np.zeros((len(encoding.ids), 3), np.float32)
        for i, name in zip(range(1, len(encoding.ids) - 1), classes(encoding.tokens[1:-1]), strict=True):
            logits[i, name] = 1.0 + i
        return [(logits,)]

    monkeypatch.setattr(task, "run", run)
    return task(TEXT)


def test_every_token_is_told_of(loaded, monkeypatch):
    found = tag(loaded, monkeypatch, "none", lambda tokens: [1] * len(tokens), ignore=())
    tokens = loaded.tokenizer.encode(TEXT).tokens[1:-1]
    assert [one["word"] for one in found] == tokens
    assert [one["index"] for one in found] == list(range(1, len(tokens) + 1))
    assert "".join(TEXT[one["start"] : one["end"]] for one in found) == TEXT.replace(" ", "")


def test_neighbours_of_one_class_are_one_name(loaded, monkeypatch):
    (one,) = tag(loaded, monkeypatch, "simple", lambda tokens: [1] + [2] * (len(tokens) - 1))
    assert (one["entity_group"], one["word"], one["start"], one["end"]) == ("PER", TEXT, 0, len(TEXT))
    several = tag(loaded, monkeypatch, "simple", lambda tokens: [1] * len(tokens))
    assert len(several) > 1  # each begins a name
    assert tag(loaded, monkeypatch, "simple", lambda tokens: [0] * len(tokens)) == []


@pytest.mark.parametrize(("strategy", "wins"), [("first", 1), ("max", 2), ("average", 2)])
def test_the_tokens_of_a_word_agree(loaded, monkeypatch, strategy, wins):
    """Of a word of several tokens the first is of class 1 and the others, which are surer, of class 2."""

    def classes(tokens):
        return [2 if token.startswith("##") else 1 for token in tokens]

    assert any(token.startswith("##") for token in loaded.tokenizer.encode(TEXT).tokens)
    found = tag(loaded, monkeypatch, strategy, classes, ignore=())
    words = [word for one in found for word in one["word"].split()]
    assert words == TEXT.split()
    begun = sum(1 for one in found if one["start"] == TEXT.index("lazy"))
    assert begun == (1 if wins == 1 else 0)  # a word whose tokens agree on I- goes on with the name before


def test_unknown_strategies_are_refused(loaded):
    with pytest.raises(ValueError, match="strategy = 'best': choose from none, simple"):
        Tag(loaded, strategy="best")
