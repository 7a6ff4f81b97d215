"""Labels of every kind that transformers documents: `batches("causal_lm", outputs)` lists what a class is given."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np


class Labelled(NamedTuple):
    """Labels, and what the config says of them.

    Attributes:
        kind: what is particular.
        labels: transformers' keywords.
        num_labels: of the config, where it matters.
        problem_type: of the config.
    """

    kind: str
    labels: dict[str, np.ndarray]
    num_labels: int | None = None
    problem_type: str | None = None


TOKEN_TASKS = ("causal_lm", "masked_lm", "unshifted_lm", "seq2seq_lm", "token_classification")
NONE = "none counts"
"""The kind whose loss is NaN in transformers and 0 here."""


def batches(task: str, outputs: dict[str, Any]) -> list[Labelled]:
    """What a class learns from, in every form.

    Args:
        task: the class's.
        outputs: its output's fields, whose shapes the labels follow.
    """
    makers: dict[str, Callable[..., Iterator[Labelled]]] = dict.fromkeys(TOKEN_TASKS, _tokens)
    makers |= {"sequence_classification": _sequences, "multiple_choice": _classes, "next_sentence": _classes}
    makers |= {"question_answering": _spans, "pretraining": _pretraining, "double_heads": _double_heads}
    return list(makers[task](np.random.default_rng(3), outputs))


def _tokens(random: np.random.Generator, outputs: dict[str, Any]) -> Iterator[Labelled]:
    rows, length, classes = outputs["logits"].shape
    every = random.integers(0, classes, (rows, length))
    some = np.where(random.random(every.shape) < 0.4, -100, every)
    some[1] = -100
    one = np.full_like(every, -100)
    one[2, 3] = every[2, 3]
    yield Labelled("some ignored", {"labels": some})
    yield Labelled("all count", {"labels": every})
    yield Labelled("one counts", {"labels": one})
    yield Labelled(NONE, {"labels": np.full_like(every, -100)})


def _classes(random: np.random.Generator, outputs: dict[str, Any]) -> Iterator[Labelled]:
    rows, classes = outputs["logits"].shape
    labels = random.integers(0, classes, rows)
    some = labels.copy()
    some[0] = -100
    yield Labelled("all count", {"labels": labels})
    yield Labelled("some ignored", {"labels": some})
    yield Labelled("a column, some ignored", {"labels": some[:, None]})
    yield Labelled(NONE, {"labels": np.full_like(labels, -100)})


def _sequences(random: np.random.Generator, outputs: dict[str, Any]) -> Iterator[Labelled]:
    rows = len(outputs["logits"])
    for problem in (None, "single_label_classification"):
        for kind in _classes(random, {"logits": np.zeros((rows, 5))}):
            yield Labelled(f"{kind.kind}, {problem}", kind.labels, 5, problem)
    floats = random.normal(size=(rows, 5)).astype(np.float32)
    hits = (floats > 0).astype(np.float32)
    yield Labelled("several of five", {"labels": hits}, 5)
    yield Labelled("several, named so", {"labels": hits}, 5, "multi_label_classification")
    yield Labelled("five numbers", {"labels": floats}, 5, "regression")
    yield Labelled("a number", {"labels": floats[:, 0]}, 1)
    yield Labelled("a column of numbers", {"labels": floats[:, :1]}, 1, "regression")


def _spans(random: np.random.Generator, outputs: dict[str, Any]) -> Iterator[Labelled]:
    rows, length = outputs["start_logits"].shape
    starts, ends = random.integers(0, length, (2, rows))

    def spans(kind: str, starts: np.ndarray, ends: np.ndarray) -> Labelled:
        return Labelled(kind, {"start_positions": starts, "end_positions": ends})

    yield spans("inside", starts, ends)
    outside = np.array([length, -4, 3, length + 40])
    yield spans("some outside", outside, ends)
    yield spans("a column", starts[:, None], outside[:, None])
    yield spans(NONE, np.full(rows, length), np.full(rows, length + 9))


def _pretraining(random: np.random.Generator, outputs: dict[str, Any]) -> Iterator[Labelled]:
    yield from _two(
        random, outputs["prediction_logits"], outputs["seq_relationship_logits"], "next_sentence_label"
    )


def _double_heads(random: np.random.Generator, outputs: dict[str, Any]) -> Iterator[Labelled]:
    logits = np.asarray(outputs["logits"])
    rows = logits.reshape(-1, *logits.shape[2:])
    for given in _two(random, rows, outputs["mc_logits"], "mc_labels"):
        labels = given.labels["labels"].reshape(logits.shape[:-1])
        yield given._replace(labels=given.labels | {"labels": labels})


def _two(random: np.random.Generator, of_tokens: Any, of_sequences: Any, second: str) -> Iterator[Labelled]:
    """Labels of tokens, and classes of sequences under the name `second`."""
    for words in _tokens(random, {"logits": np.asarray(of_tokens)}):
        for order in _classes(random, {"logits": np.asarray(of_sequences)}):
            if (words.kind == NONE) == (order.kind == NONE):
                labels = words.labels | {second: order.labels["labels"]}
                kind = NONE if order.kind == NONE else f"{words.kind}, {order.kind}"
                yield Labelled(kind, labels)
