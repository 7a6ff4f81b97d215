"""Answers marked in contexts, long ones in pieces that overlap, as SQuAD asks for them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from train.tasks import scores
from train.tasks.examples import Example
from train.tasks.head import Head, Measured, Row

NUM_BEST = 20
"""Starts and ends that are looked at in each piece."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """Where a row's tokens stand in its context.

    Attributes:
        offsets: [T, 2], characters of each token.
        inside: bool [T], tokens of the context.
        none: the token that stands for no answer.
    """

    offsets: np.ndarray
    inside: np.ndarray
    none: int


class Answers(Head):
    """Spans of contexts: columns `question`, `context`, `answers` {"text": [...], "answer_start": [...]}.

    `answer` and `answer_start` may stand in place of `answers`. No answer is an empty list; the first of several is
    learned, and any of them counts as right. A context that does not fit is read in pieces that share `task.stride`
    tokens; a piece without the answer points at its first token.
    """

    fields = ("start_logits", "end_logits")

    def __init__(self, *args: Any):
        super().__init__(*args)
        if self.settings.stride >= self.length:
            raise ValueError(
                f"task.stride = {self.settings.stride}: pieces of train.sequence_length = {self.length} tokens share "
                "fewer than that"
            )

    def rows(self, examples: Sequence[Example]) -> list[Row]:
        cutter = self.words.cutter(self.length, stride=self.settings.stride, strategy="only_second")
        found = []
        for number, example in enumerate(examples):
            question, context = f"{self.settings.prefix}{example.text('question')}", example.text("context")
            texts, starts = answers_of(example, context)
            try:
                whole = cutter.encode(question, context)
            except Exception as error:  # the library raises a bare Exception
                raise ValueError(
                    f"{example.where}: the question leaves no room for the context in train.sequence_length = "
                    f"{self.length} tokens, {self.settings.stride} of them shared: {error}"
                ) from None
            pieces = [whole, *whole.overflowing]
            self.num_cut += len(pieces) > 1
            for one in pieces:
                piece = self._piece(one)
                start, end = piece.none, piece.none
                if texts:
                    start, end = _tokens_of(piece, starts[0], starts[0] + len(texts[0]))
                labels = {"start_positions": start, "end_positions": end}
                found.append(Row(number, one.ids, one.type_ids, labels, piece))
        return found

    def _piece(self, encoding: Any) -> Piece:
        cls = self.words.special.get("cls_token")
        none = encoding.ids.index(cls) if cls in encoding.ids else 0
        inside = np.array([number == 1 for number in encoding.sequence_ids])
        return Piece(np.array(encoding.offsets), inside, none)

    @property
    def metrics(self) -> tuple[str, ...]:
        return scores.SQUAD

    def measure(
        self, examples: Sequence[Example], rows: Sequence[Row], outputs: Mapping[str, Any]
    ) -> Measured:
        accepted = [answers_of(one, one.text("context"))[0] for one in examples]
        may_be_none = any(not texts for texts in accepted)
        best: list[tuple[float, int, int]] = [(-np.inf, 0, 0)] * len(examples)
        none = [np.inf] * len(examples)
        for row, start, end in zip(rows, outputs["start_logits"], outputs["end_logits"], strict=True):
            piece: Piece = row.about
            none[row.example] = min(none[row.example], float(start[piece.none] + end[piece.none]))
            best[row.example] = max(best[row.example], self._best(piece, start, end))
        written = []
        for number, (score, first, last) in enumerate(best):
            empty = may_be_none and none[number] > score
            written.append("" if empty else examples[number].text("context")[first:last])
        predictions = [
            {"prediction": text, "answers": texts, "score": score}
            for text, texts, (score, *_) in zip(written, accepted, best, strict=True)
        ]
        return scores.squad(accepted, written), predictions

    def _best(self, piece: Piece, start: np.ndarray, end: np.ndarray) -> tuple[float, int, int]:
        """(score, first and last character) of a piece's best span."""
        count = len(piece.inside)
        start, end = (np.where(piece.inside, logits[:count], -np.inf) for logits in (start, end))
        firsts, lasts = (np.argsort(-logits, kind="stable")[:NUM_BEST] for logits in (start, end))
        spans = [
            (float(start[a] + end[b]), int(piece.offsets[a][0]), int(piece.offsets[b][1]))
            for a in firsts
            for b in lasts
            if a <= b < a + self.settings.max_answer_length and piece.inside[a] and piece.inside[b]
        ]
        return max(spans, default=(-np.inf, 0, 0))


def answers_of(example: Example, context: str) -> tuple[list[str], list[int]]:
    """The answers of an example and where they start.

    Raises:
        ValueError: one does not stand where it is said to.
    """
    if example.has("answers"):
        given = example.value("answers")
        if not isinstance(given, Mapping) or {"text", "answer_start"} - set(given):
            raise ValueError(
                f'{example.where}: answers is {{"text": [...], "answer_start": [...]}}, not {given!r}'
            )
        texts, starts = given["text"], given["answer_start"]
    else:
        texts, starts = [example.text("answer")], [example.value("answer_start")]
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise ValueError(f"{example.where}: answers has {texts!r} and {starts!r}: two lists of one length")
    numbers = [int(start) if str(start).isdigit() else -1 for start in starts]
    for text, start in zip(texts, numbers, strict=True):
        if not isinstance(text, str) or not text or start < 0 or context[start : start + len(text)] != text:
            raise ValueError(
                f"{example.where}: the answer {text!r} does not stand at {start} of the context, where it has "
                f"{context[max(start, 0) : max(start, 0) + 20]!r}"
            )
    return texts, numbers


def _tokens_of(piece: Piece, start: int, end: int) -> tuple[int, int]:
    """The first and the last token of a span of characters, or twice the token for none if it is not all there."""
    places = np.flatnonzero(piece.inside)
    if not len(places) or piece.offsets[places[0]][0] > start or piece.offsets[places[-1]][1] < end:
        return piece.none, piece.none
    covers = [i for i in places if piece.offsets[i][1] > start and piece.offsets[i][0] < end]
    return (int(covers[0]), int(covers[-1])) if covers else (piece.none, piece.none)
