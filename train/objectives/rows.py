"""Rows of plain text for each objective, and a source of batches of them."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from modelzoo.tokenizing import special_tokens
from train.objectives import corruption
from train.objectives.corruption import IGNORED, Objective, Vocabulary

Batch = dict[str, np.ndarray]
HELD_OUT = 2**32 - 1
"""In place of a seed for what is held out: it is corrupted in one way, whatever the run's seed."""


def vocabulary_of(tokenizer: Tokenizer, special: dict[str, int], end_of_text: int) -> Vocabulary:
    """What corruptions know of a tokenizer's tokens.

    Args:
        tokenizer: of the text.
        special: ids by purpose.
        end_of_text: the id that ends documents.
    """
    vocab = tokenizer.get_vocab()
    size = max(vocab.values()) + 1
    is_special, begins, ends = (np.zeros(size, bool) for _ in range(3))
    prefix = getattr(tokenizer.model, "continuing_subword_prefix", None)
    letters = any(token.startswith(("Ġ", "▁")) for token in vocab)
    for token, number in vocab.items():
        if prefix:
            begins[number] = not token.startswith(prefix)
        else:
            begins[number] = not letters or token.startswith(("Ġ", "▁", "Ċ"))
        ends[number] = token.rstrip("ĠĊ▁ ").endswith((".", "!", "?"))
    added = [number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special]
    is_special[[*added, *special.values(), end_of_text]] = True
    return Vocabulary(size, special["mask_token"], is_special, begins, ends)


class TextRows:
    """How a model's rows are made of plain text.

    Args:
        model: of one of `corruption.TEXT_TASKS`.
        data: `train.data`'s tokens.
        settings: how text is corrupted.
        length: T.

    Raises:
        ValueError: the tokenizer lacks a token that the objective needs, or no document is long enough.
    """

    def __init__(self, model: Any, data: Any, settings: Objective, length: int):
        self.task, self.config, self.data, self.settings, self.length = (
            model.task,
            model.config,
            data,
            settings,
            length,
        )
        file = Path(data.tokenizer_file)
        tokenizer = Tokenizer.from_file(str(file))
        self.special = special_tokens(file.parent, tokenizer)
        needed = {
            "masked_lm": ("mask_token",),
            "pretraining": ("mask_token", "cls_token", "sep_token", "pad_token"),
            "next_sentence": ("cls_token", "sep_token", "pad_token"),
            "seq2seq_lm": ("mask_token", "cls_token", "sep_token", "pad_token"),
        }.get(self.task, ())
        for purpose in needed:
            if purpose not in self.special:
                raise ValueError(
                    f"data.tokenizer: {type(model).__name__} needs a {purpose} such as RoBERTa's or BERT's tokenizers "
                    "have; docs/finetuning.md says how to train one"
                )
        have, wanted = self.special.get("pad_token"), self.config.pad_token_id
        if needed and have is not None and wanted is not None and have != wanted:
            family = type(self.config).__name__.removesuffix("Config")
            raise ValueError(
                f"{family}.pad_token_id = {wanted}: the tokenizer pads with {have}: set it to that"
            )
        self.special.setdefault("mask_token", data.manifest["end_of_text_id"])
        self.vocabulary = vocabulary_of(tokenizer, self.special, data.manifest["end_of_text_id"])
        self.end_of_text = data.manifest["end_of_text_id"]
        self.made_of_windows = self.task in ("masked_lm", "unshifted_lm")

    def corrupt(self, row: Batch, rng: np.random.Generator) -> Batch:
        """A row of `train.data` as the objective wants it."""
        if self.task == "unshifted_lm":  # labels stand at the logits that predict them
            return row | {"labels": np.append(row["labels"][1:], np.int32(IGNORED))}
        ids = row["input_ids"]
        counted = row["labels"] != IGNORED
        if (first := self.special.get("cls_token")) is not None and "segment_ids" not in row:
            ids, counted = np.append(np.int32(first), ids[:-1]), np.append(False, counted[:-1])
        found, labels = corruption.mask(ids, self.vocabulary, self.settings, rng)
        return row | {
            "input_ids": np.where(counted, found, ids),
            "labels": np.where(counted, labels, IGNORED),
        }

    def make(self, splits: Sequence[Any], rng: np.random.Generator) -> Batch:
        """A row made of documents that are drawn."""
        return self._pair(splits, rng) if self.task != "seq2seq_lm" else self._gaps(splits, rng)

    def _document(self, splits: Sequence[Any], rng: np.random.Generator, least: int) -> list[np.ndarray]:
        """Sentences of a document, drawn in proportion to the documents' lengths."""
        # Of a mixture, a part that has nothing held out is left out.
        weights = np.array([w * (s.num_tokens > 0) for w, s in zip(self.data.weights, splits, strict=True)])
        for _ in range(1000):
            split = splits[int(rng.choice(len(splits), p=weights / weights.sum()))]
            at = int(rng.integers(0, split.num_tokens))
            ids = split.document(int(np.searchsorted(split.ends, at, side="right")))
            ids = ids[ids != self.end_of_text]
            found = corruption.sentences_of(ids, self.vocabulary)
            if len(found) < least and len(ids) >= 2 * least:  # no full stops: halves will do
                found = np.array_split(ids, 2)
            if len(found) >= least:
                return found
        raise ValueError(
            f"data.path: hardly any document has {least} sentences, which {self.task} is made of"
        )

    def _pair(self, splits: Sequence[Any], rng: np.random.Generator) -> Batch:
        room, special = self.length - 3, self.special
        first, other = self._document(splits, rng, 2), self._document(splits, rng, 1)
        a, b, label = corruption.pair(first, other, room, self.settings, rng)
        cls, sep = special["cls_token"], special["sep_token"]
        ids = np.concatenate([[cls], a, [sep], b, [sep]]).astype(np.int32)
        types = np.repeat(np.array([0, 1], np.int32), [len(a) + 2, len(b) + 1])
        row: dict[str, Any] = {"attention_mask": np.ones(len(ids), np.int32), "token_type_ids": types}
        if self.task == "pretraining":
            ids, labels = corruption.mask(ids, self.vocabulary, self.settings, rng)
            row |= {"labels": _filled(labels, self.length, IGNORED)}
        row["input_ids"] = ids
        for name, fill in (("input_ids", special["pad_token"]), ("attention_mask", 0), ("token_type_ids", 0)):
            row[name] = _filled(row[name], self.length, fill)
        row["next_sentence_label" if self.task == "pretraining" else "labels"] = np.int32(label)
        return row

    def _gaps(self, splits: Sequence[Any], rng: np.random.Generator) -> Batch:
        first, last = self.special["cls_token"], self.special["sep_token"]
        sentences = self._document(splits, rng, 1)
        text = np.concatenate(sentences[int(rng.integers(0, len(sentences))) :])[: self.length - 2]
        source = corruption.permute(text, self.vocabulary, rng) if self.settings.permute_sentences else text
        source = corruption.make_gaps(source, self.vocabulary, self.settings, rng)[: self.length - 2]
        ids = np.concatenate([[first], source, [last]]).astype(np.int32)
        target = np.concatenate([[first], text, [last]]).astype(np.int32)
        return {
            "input_ids": _filled(ids, self.length, self.special["pad_token"]),
            "attention_mask": _filled(np.ones(len(ids), np.int32), self.length, 0),
            "labels": _filled(target, self.length, IGNORED),
        }

    def held_out(
        self, batches: Iterator[Batch], rows: range, size: int, count: int | None
    ) -> Iterator[Batch]:
        """Batches of held-out text, corrupted in the same way each time.

        Args:
            batches: of `train.data`'s held-out rows.
            rows: this process's of a global batch.
            size: B, of the global batch.
            count: batches at most; None is as many as the text has rows for.
        """
        if self.made_of_windows:
            for step, batch in enumerate(batches):
                yield _each(batch, lambda i, row, step=step: self.corrupt(row, _rng(HELD_OUT, step, rows[i])))
            return
        tokens = sum(split.num_tokens for split in self.data.validation)
        most = -(-tokens // (size * self.length))
        for step in range(most if count is None else min(count, most)):
            made = [self.make(self.data.validation, _rng(HELD_OUT, step, row)) for row in rows]
            yield {name: np.stack([row[name] for row in made]) for name in made[0]}

    @property
    def tokenizer_config(self) -> str:
        """What the special tokens are for, to be laid beside checkpoints."""
        tokenizer = Tokenizer.from_file(str(self.data.tokenizer_file))
        return (
            json.dumps({name: tokenizer.id_to_token(i) for name, i in self.special.items()}, indent=2) + "\n"
        )


class ObjectiveBatches:
    """A `BatchSource` of corrupted rows over one of text.

    Args:
        text: the source that it reads, or whose places it takes.
        make: how rows are made.
        seed: of the corruption.
    """

    def __init__(self, text: Any, make: TextRows, seed: int):
        self._text, self._make, self._seed = text, make, seed
        self._step, self._rows = int(text.step), text.rows_of

    @property
    def step(self) -> int:
        """The number of the batch that comes next, from 0."""
        return self._step

    @property
    def rows(self) -> range:
        """Of that global batch, those that this process gets."""
        return self._rows(self._step)

    def __iter__(self) -> "ObjectiveBatches":
        return self

    def __next__(self) -> Batch:
        step, make, rows = self._step, self._make, self.rows
        self._step += 1
        if make.made_of_windows:
            return _each(next(self._text), lambda i, row: make.corrupt(row, _rng(self._seed, step, rows[i])))
        made = [make.make(make.data.train, _rng(self._seed, step, row)) for row in rows]
        return {name: np.stack([row[name] for row in made]) for name in made[0]}

    def get_state(self) -> dict[str, Any]:
        """How far it is."""
        return {"step": self._step}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where `get_state` was called."""
        self._step = int(state["step"])
        self._text.set_state(state)


def _rng(seed: int, step: int, row: int) -> np.random.Generator:
    return np.random.default_rng((seed, step, row))


def _filled(values: np.ndarray, length: int, fill: int) -> np.ndarray:
    array = np.full(length, fill, np.int32)
    array[: len(values)] = values
    return array


def _each(batch: Batch, change: Callable[[int, Batch], Batch]) -> Batch:
    """A batch with each of its rows changed."""
    count = len(batch["input_ids"])
    rows = [change(i, {name: values[i] for name, values in batch.items()}) for i in range(count)]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
