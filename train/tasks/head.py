"""What every head has in common: rows of tokens with labels, and how a batch of them is laid out."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

import modelzoo
from train.losses import IGNORED
from train.tasks.examples import Example
from train.tasks.settings import Task
from train.tasks.words import Words


@dataclasses.dataclass(frozen=True)
class Row:
    """What the model reads at once.

    Attributes:
        example: the number of its example; a long context has several rows.
        ids: token ids; of a multiple choice a list for each choice.
        types: token_type_ids, as ids.
        labels: under transformers' names: a number, or a list for the tokens.
        about: what measuring needs besides.
    """

    example: int
    ids: list[Any]
    types: list[Any]
    labels: Mapping[str, Any]
    about: Any = None

    @property
    def length(self) -> int:
        """Tokens, of the longest choice."""
        return max(len(choice) for choice in self.ids) if isinstance(self.ids[0], list) else len(self.ids)


Measured = tuple[dict[str, float], list[dict[str, Any]]]
"""Metrics by name, and a prediction for every example."""


class Head:
    """Base of the heads' ways with examples.

    Args:
        model: of a class with the head.
        words: its tokenizer.
        settings: of the run.
        length: T, tokens of a row at most.

    Attributes:
        num_cut: texts that did not fit and were cut.
    """

    fields: ClassVar[tuple[str, ...]] = ("logits",)
    """Of the model's output, what measuring reads."""
    target_is_apart: ClassVar[bool] = False
    """Whether labels have a length of their own, rather than that of the input."""
    libraries: ClassVar[tuple[str, ...]] = ()
    """That its metrics need."""
    writes: ClassVar[bool] = False
    """Whether it measures what the model writes."""

    def __init__(self, model: modelzoo.Model, words: Words, settings: Task, length: int):
        self.model, self.config, self.words, self.settings = model, model.config, words, settings
        self.length, self.num_cut = length, 0
        self.pad_id = self.config.pad_token_id
        self.takes_types = getattr(self.config, "type_vocab_size", 1) > 1
        self._cutter = words.cutter(length)

    def rows(self, examples: Sequence[Example]) -> list[Row]:
        """What the model reads of examples.

        Raises:
            ValueError: an example lacks something, or has a label of no class.
        """
        raise NotImplementedError

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what `measure` finds, the loss aside."""
        raise NotImplementedError

    def measure(
        self, examples: Sequence[Example], rows: Sequence[Row], outputs: Mapping[str, Any]
    ) -> Measured:
        """How well the model does.

        Args:
            examples: all of an evaluation.
            rows: of them, in order.
            outputs: for each of `fields` an array [rows, ...] float32 (a list where rows differ in length); "written"
                holds a text for each row.
        """
        raise NotImplementedError

    def encode(self, first: Sequence[str], second: Sequence[str] | None = None) -> list[Any]:
        """Encodings of texts, or of pairs, cut to the length."""
        inputs = list(first) if second is None else list(zip(first, second, strict=True))
        found = self._cutter.encode_batch(inputs)
        self.num_cut += sum(bool(one.overflowing) for one in found)
        return found

    def prompt(self, example: Example, name: str = "text") -> str:
        """A text with what the settings put around it."""
        return f"{self.settings.prefix}{example.text(name)}{self.settings.suffix}"

    def batch(self, rows: Sequence[Row], length: int, counted: int | None = None) -> dict[str, np.ndarray]:
        """Arrays [rows, ...], padded on the right.

        Args:
            rows: of the batch.
            length: T.
            counted: rows of which the loss counts; what comes after fills the batch up.
        """
        batch = {
            "input_ids": _padded([row.ids for row in rows], length, self.pad_id or 0),
            "attention_mask": _padded([_ones(row.ids) for row in rows], length, 0),
        }
        if self.takes_types:
            batch["token_type_ids"] = _padded([row.types for row in rows], length, 0)
        width = self.settings.target_length if self.target_is_apart else length
        for name in rows[0].labels:
            values = [row.labels[name] for row in rows]
            if self.per_token:
                array = _padded(values, width, IGNORED)
            else:
                array = np.array(values, np.float32 if isinstance(values[0], list) else np.int32)
            if counted is not None and array.dtype != np.float32:
                array[counted:] = IGNORED if self.model.task != "question_answering" else length
            batch[name] = array
        return batch

    @property
    def per_token(self) -> bool:
        """Whether a row's label is one for every token."""
        return False


def _ones(ids: list[Any]) -> list[Any]:
    return [_ones(choice) if isinstance(choice, list) else 1 for choice in ids]


def _padded(rows: Sequence[list[Any]], length: int, fill: int) -> np.ndarray:
    """int32 [rows, length], or [rows, choices, length]."""
    if rows and rows[0] and isinstance(rows[0][0], list):
        return np.stack([_padded(choices, length, fill) for choices in rows])
    array = np.full((len(rows), length), fill, np.int32)
    for row, values in zip(array, rows, strict=True):
        row[: len(values)] = values
    return array
