"""Labels of words, aligned with the pieces that a tokenizer makes of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from train.losses import IGNORED
from train.tasks import scores
from train.tasks.classes import Classes
from train.tasks.examples import Example
from train.tasks.head import Head, Measured, Row

OUTSIDE = "O"


class Tags(Head):
    """Labels of words: columns `tokens` and `tags`, lists of one length (in a .csv, words with spaces between).

    The words are read as the text that they make with spaces between, so that pieces are those of plain text; a piece
    is of the word that it overlaps first. A word that the length cuts off counts as predicted "O".
    """

    libraries = ("seqeval",)

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.classes = Classes(self.config)

    @property
    def per_token(self) -> bool:
        return True

    def rows(self, examples: Sequence[Example]) -> list[Row]:
        words = [one.words("tokens") for one in examples]
        tags = [self.classes.tags(one, len(each)) for one, each in zip(examples, words, strict=True)]
        encodings = self.encode([" ".join(each) for each in words])
        found = []
        for i, encoding in enumerate(encodings):
            owners = owners_of(words[i], encoding)
            firsts = first_pieces(owners, len(words[i]))
            labels = []
            for piece, owner in enumerate(owners):
                learned = owner is not None and (self.settings.label_all_pieces or firsts[owner] == piece)
                labels.append(tags[i][owner] if learned and owner is not None else IGNORED)
            found.append(Row(i, encoding.ids, encoding.type_ids, {"labels": labels}, (firsts, tags[i])))
        return found

    @property
    def metrics(self) -> tuple[str, ...]:
        return scores.TAGGING

    def measure(
        self, examples: Sequence[Example], rows: Sequence[Row], outputs: Mapping[str, Any]
    ) -> Measured:
        wanted, found = [], []
        for row, logits in zip(rows, outputs["logits"], strict=True):
            firsts, tags = row.about
            best = np.asarray(logits).argmax(axis=-1)
            found.append([OUTSIDE if at is None else self.classes.name(int(best[at])) for at in firsts])
            wanted.append([self.classes.name(tag) for tag in tags])
        predictions = [
            {"tokens": one.words("tokens"), "prediction": guess, "label": label}
            for one, guess, label in zip(examples, found, wanted, strict=True)
        ]
        return scores.tagging(wanted, found), predictions


def owners_of(words: Sequence[str], encoding: Any) -> list[int | None]:
    """The word that each piece of a text is of, None for special tokens.

    Args:
        words: of the text, which they make with single spaces between.
        encoding: of the text.
    """
    ends = np.cumsum([len(word) + 1 for word in words])  # one past the space after each word
    owners: list[int | None] = []
    for (start, end), special in zip(encoding.offsets, encoding.special_tokens_mask, strict=True):
        if special or end <= start:
            owners.append(None)
            continue
        word = int(np.searchsorted(ends, start, side="right"))
        if start == ends[word] - 1:  # it begins with the space, and is of the word after it
            word += 1
        owners.append(min(word, len(words) - 1))
    return owners


def first_pieces(owners: Sequence[int | None], num_words: int) -> list[int | None]:
    """The first piece of every word, None where it has none."""
    firsts: list[int | None] = [None] * num_words
    for piece, owner in enumerate(owners):
        if owner is not None and firsts[owner] is None:
            firsts[owner] = piece
    return firsts
