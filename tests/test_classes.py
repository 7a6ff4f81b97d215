"""The classes that examples are of, by name, by number, several at once; labels of no class are named."""

import pytest

from modelzoo import RobertaConfig
from train.tasks.classes import Classes, with_classes
from train.tasks.examples import Example

SEQUENCE, TOKENS = "sequence_classification", "token_classification"


def examples(*labels, name="label"):
    return [Example(f"a.jsonl:{i + 1}", {name: label}, {}) for i, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("labels", "kind", "names"),
    [
        (["pos", "neg", "pos"], "single_label_classification", ["neg", "pos"]),
        ([["b"], [], ["a", "c"]], "multi_label_classification", ["a", "b", "c"]),
        ([0, 1], "single_label_classification", None),
        (["0", "1"], "single_label_classification", None),
        ([0.5, 1.0], "regression", None),
        (["0.5", "1.0"], "regression", None),
    ],
)
def test_the_kind_and_the_names_follow_from_the_labels(labels, kind, names):
    config = with_classes(RobertaConfig(), SEQUENCE, examples(*labels), None)
    assert config.problem_type == kind
    assert (config.id2label and [name for _, name in config.id2label]) == names
    assert config.num_labels == (len(names) if names else 1 if kind == "regression" else 2)
    assert with_classes(config, SEQUENCE, examples(*labels), None, ["num_labels", "id2label"]) == config


def test_o_is_the_first_of_tags():
    tags = examples(["O", "B-X"], ["B-A", "O"], name="tags")
    config = with_classes(RobertaConfig(), TOKENS, tags, None)
    assert config.id2label == ((0, "O"), (1, "B-A"), (2, "B-X"))


def test_names_that_the_user_or_the_model_gives_count():
    pos = examples("pos", "neg")
    assert with_classes(RobertaConfig(), SEQUENCE, pos, ["pos", "neg"]).id2label == ((0, "pos"), (1, "neg"))
    named = RobertaConfig(num_labels=3, id2label={0: "neg", 1: "mid", 2: "pos"})
    assert with_classes(named, SEQUENCE, pos, None).num_labels == 3
    assert with_classes(RobertaConfig(), "question_answering", [], None) == RobertaConfig()
    with pytest.raises(ValueError, match=r"Roberta.num_labels = 3: there are 2 classes: 'neg', 'pos'"):
        with_classes(RobertaConfig(num_labels=3), SEQUENCE, pos, None, ["num_labels"])


def test_numbers_of_labels():
    classes = Classes(RobertaConfig(num_labels=3, id2label={0: "a", 1: "b", 2: "c"}))
    assert classes.sequence(examples("b")[0], None) == 1
    assert classes.sequence(examples(2)[0], None) == 2
    assert classes.sequence(examples(["c", "a"])[0], "multi_label_classification") == [1.0, 0.0, 1.0]
    assert classes.sequence(examples("c|b")[0], "multi_label_classification") == [0.0, 1.0, 1.0]
    assert classes.sequence(examples([1, 2.5, "3"])[0], "regression") == [1.0, 2.5, 3.0]
    assert classes.tags(examples("a b", name="tags")[0], 2) == [0, 1]
    assert classes.name(2) == "c"


@pytest.mark.parametrize(
    ("label", "kind", "error"),
    [
        (3, None, r"a.jsonl:1: label 3 is outside the 3 classes: Roberta.num_labels"),
        (-1, None, "label -1 is outside"),
        ("d", None, r"a.jsonl:1: unknown label 'd': the classes are 0 to 2"),
        (True, None, "unknown label True"),
        ([0, 7], "multi_label_classification", "label 7 is outside"),
        ({}, "multi_label_classification", "a list of the classes that hold"),
        ("high", "regression", "label 'high' is not a number"),
        ([1.0], "regression", "label has 1 numbers: Roberta.num_labels = 3"),
    ],
)
def test_labels_of_no_class_are_named(label, kind, error):
    with pytest.raises(ValueError, match=error):
        Classes(RobertaConfig(num_labels=3)).sequence(examples(label)[0], kind)


def test_as_many_tags_as_tokens():
    with pytest.raises(ValueError, match="a.jsonl:1: 3 tokens and 2 tags"):
        Classes(RobertaConfig()).tags(examples([0, 1], name="tags")[0], 3)
