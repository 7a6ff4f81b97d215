"""Classes of sequences, numbers for sequences, sentences that follow, and choices between continuations."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from train.losses import IGNORED
from train.tasks import scores
from train.tasks.classes import MULTI, REGRESSION, Classes
from train.tasks.examples import Example
from train.tasks.head import Head, Measured, Row


class Sequences(Head):
    """Labels of texts, or of pairs of texts: columns `text`, `text_pair` (where there is one), `label`."""

    libraries = ("sklearn", "scipy")

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.classes = Classes(self.config)
        self.kind = self.config.problem_type

    def rows(self, examples: Sequence[Example]) -> list[Row]:
        first = [self.prompt(one) for one in examples]
        paired = [one.has("text_pair") for one in examples]
        if any(paired):
            second = [one.text("text_pair") for one in examples]
            encodings = self.encode(first, second)
        else:
            encodings = self.encode(first)
        labels = [self.classes.sequence(one, self.kind) for one in examples]
        return [
            Row(i, one.ids, one.type_ids, {"labels": label})
            for i, (one, label) in enumerate(zip(encodings, labels, strict=True))
        ]

    @property
    def metrics(self) -> tuple[str, ...]:
        kinds = {REGRESSION: scores.REGRESSION, MULTI: scores.SEVERAL_CLASSES}
        return kinds.get(self.kind, scores.ONE_CLASS)

    def measure(
        self, examples: Sequence[Example], rows: Sequence[Row], outputs: Mapping[str, Any]
    ) -> Measured:
        logits = np.asarray(outputs["logits"], np.float64)
        labels = np.array([row.labels["labels"] for row in rows])
        if self.kind == REGRESSION:
            metrics = scores.regression(labels, logits)
            return metrics, [
                {"prediction": _scalar(value), "label": _scalar(label)}
                for value, label in zip(logits.tolist(), labels.tolist(), strict=True)
            ]
        if self.kind == MULTI:
            chosen = logits > 0
            name = self.classes.name
            return scores.several_classes(labels > 0.5, chosen, logits), [
                {
                    "prediction": [name(i) for i in np.flatnonzero(row).tolist()],
                    "label": [name(i) for i in np.flatnonzero(label).tolist()],
                }
                for row, label in zip(chosen, labels, strict=True)
            ]
        predicted, probs = logits.argmax(axis=1), softmax(logits)
        return scores.one_class(labels, predicted), [
            {
                "prediction": self.classes.name(guess),
                "label": self.classes.name(label),
                "score": float(probs[i, guess]),
            }
            for i, (guess, label) in enumerate(zip(predicted.tolist(), labels.tolist(), strict=True))
        ]


class NextSentence(Sequences):
    """Whether `text_pair` follows `text`: label 0 where it does, 1 where it is of elsewhere."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.classes.count, self.classes.names, self.kind = 2, {}, None


class Choices(Head):
    """Which of `choices` goes on from `text`; `label` is its number, from 0."""

    libraries = ("sklearn",)

    def rows(self, examples: Sequence[Example]) -> list[Row]:
        found, count = [], None
        for i, example in enumerate(examples):
            choices, text = example.words("choices"), self.prompt(example)
            count = count or len(choices)
            if len(choices) != count or count < 2:
                raise ValueError(
                    f"{example.where}: {len(choices)} choices, where {examples[0].where} has {count}: all have "
                    "as many, two or more"
                )
            label = example.value("label")
            label = int(label) if isinstance(label, str) and label.strip().isdigit() else label
            if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < count:
                raise ValueError(
                    f"{example.where}: label {label!r} is the number of no choice: 0 to {count - 1}"
                )
            encodings = self.encode([text] * count, choices)
            ids, types = [one.ids for one in encodings], [one.type_ids for one in encodings]
            found.append(Row(i, ids, types, {"labels": label}, choices))
        return found

    @property
    def metrics(self) -> tuple[str, ...]:
        return scores.CHOICES

    def measure(
        self, examples: Sequence[Example], rows: Sequence[Row], outputs: Mapping[str, Any]
    ) -> Measured:
        logits = np.asarray(outputs[self.fields[0]], np.float64)
        labels, predicted = np.array([row.labels["labels"] for row in rows]), logits.argmax(axis=1)
        probs = softmax(logits)
        return scores.choices(labels, predicted), [
            {"prediction": guess, "choice": row.about[guess], "label": label, "score": float(probs[i, guess])}
            for i, (row, guess, label) in enumerate(
                zip(rows, predicted.tolist(), labels.tolist(), strict=True)
            )
        ]


class TwoHeads(Choices):
    """The same for a model with two heads, which also learns to write the right choice; a last token scores each."""

    fields = ("mc_logits",)

    def batch(self, rows: Sequence[Row], length: int, counted: int | None = None) -> dict[str, np.ndarray]:
        batch = super().batch(rows, length, counted)
        right, ids, real = batch["labels"], batch["input_ids"], batch["attention_mask"] == 1
        is_right = np.arange(ids.shape[1]) == right[:, None]
        words = np.where(is_right[..., None] & real, ids, IGNORED).astype(np.int32)
        last = real.sum(axis=-1, dtype=np.int32) - 1
        return batch | {"labels": words, "mc_labels": right, "mc_token_ids": last}


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities along the last dimension."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def _scalar(value: list[float] | float) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value
