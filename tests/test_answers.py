"""Answers in contexts: strides, where they stand in tokens, and the text that is found again."""

import numpy as np
import pytest

from tests import labelled
from train.tasks.answers import Answers, answers_of

CONTEXT = "the lazy dog jumps over the quick fox and the brown dog and the fox over the lazy dog"


def asked(answer="brown dog", start=None, **more):
    start = CONTEXT.index(answer) if start is None else start
    answers = {"text": [answer], "answer_start": [start]}
    return {"question": "the fox", "context": CONTEXT, "answers": answers} | more


def answerer(words=None, length=24, **task):
    words = words or labelled.bert_words()
    return labelled.head(
        Answers,
        "MegatronBertForQuestionAnswering",
        words,
        length,
        task=dict(stride=6, max_answer_length=12) | task,
    )


def text_of(row, start, end):
    return CONTEXT[row.about.offsets[start][0] : row.about.offsets[end][1]]


def test_pieces_overlap_by_the_stride_and_point_at_the_answer_where_they_have_it():
    head = answerer(length=18)
    rows = head.rows(labelled.examples(asked()))
    assert len(rows) > 3
    assert head.num_cut == 1
    inside = [row.about.offsets[row.about.inside].tolist() for row in rows]
    for before, after in zip(inside, inside[1:], strict=False):
        assert before[-6:] == after[:6]
    assert inside[0][0][0] == 0
    assert inside[-1][-1][1] == len(CONTEXT)
    with_answer = 0
    for row in rows:
        start, end = row.labels["start_positions"], row.labels["end_positions"]
        spans = row.about.offsets[row.about.inside]
        whole = spans[0][0] <= CONTEXT.index("brown dog") and spans[-1][1] >= CONTEXT.index("brown dog") + 9
        assert whole == (start != 0)
        assert text_of(row, start, end) == "brown dog" if whole else (start, end) == (0, 0)
        with_answer += whole
    assert with_answer >= 1


def test_no_answer_points_at_the_first_token():
    nothing = {"text": [], "answer_start": []}
    rows = answerer().rows(labelled.examples(asked(answers=nothing)))
    assert {(row.labels["start_positions"], row.labels["end_positions"]) for row in rows} == {(0, 0)}


@pytest.mark.parametrize("words", [labelled.bert_words(), labelled.roberta_words()])
def test_the_right_logits_give_the_text_back(words):
    head = answerer(words)
    examples = labelled.examples(
        asked(), asked("the lazy dog", 0), asked(answers={"text": [], "answer_start": []})
    )
    rows = head.rows(examples)
    starts, ends = np.zeros((len(rows), 24), np.float32), np.zeros((len(rows), 24), np.float32)
    for i, row in enumerate(rows):
        starts[i, row.labels["start_positions"]] = ends[i, row.labels["end_positions"]] = 5
        # longer than the longest answer, or before its start: never found
        starts[i, -1] = 3
    metrics, found = head.measure(examples, rows, {"start_logits": starts, "end_logits": ends})
    assert metrics["exact_match"] >= 2 / 3
    assert tuple(metrics) == head.metrics
    assert [one["prediction"] for one in found[:2]] == ["brown dog", "the lazy dog"]


def test_without_unanswerable_questions_there_is_always_an_answer():
    head = answerer()
    examples = labelled.examples(asked())
    rows = head.rows(examples)
    logits = np.zeros((len(rows), 24), np.float32)
    logits[:, 0] = 9
    _, (found,) = head.measure(examples, rows, {"start_logits": logits, "end_logits": logits})
    assert found["prediction"]


@pytest.mark.parametrize(
    ("row", "error"),
    [
        (asked(start=3), r"a.jsonl:1: the answer 'brown dog' does not stand at 3 of the context"),
        (asked(answers=["x"]), "a.jsonl:1: answers is"),
        (asked(answers={"text": ["fox"], "answer_start": []}), "two lists of one length"),
        ({"question": "the fox", "context": ""}, "a.jsonl:1: context is empty"),
        ({"context": CONTEXT}, "a.jsonl:1: no 'question'"),
        (asked(question="fox " * 30), "a.jsonl:1: the question leaves no room for the context"),
    ],
)
def test_slips_are_named(row, error):
    with pytest.raises(ValueError, match=error):
        answerer().rows(labelled.examples(row))


def test_a_stride_past_the_length():
    with pytest.raises(ValueError, match=r"task.stride = 24: pieces of train.sequence_length = 24"):
        answerer(stride=24)


def test_answer_and_its_start_may_be_columns():
    (one,) = labelled.examples({"answer": "lazy", "answer_start": "4"})
    assert answers_of(one, CONTEXT) == (["lazy"], [4])
