"""Answers to questions, cut out of a text: long texts in overlapping pieces, as transformers 4.57.6 does it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from inference.task_model import Loaded, TaskModel, as_list
from inference.text import check_unicode

LONGEST_PIECE = 384
HIDDEN = -10000.0
NOT_SEEN = 1_000_000.0


class Answer(TaskModel):
    """Finds answers in texts.

    Args:
        loaded, batch_size: as `TaskModel`; pieces of long texts count as texts.
        top_k: answers to tell of, the best first.
        max_answer_len: tokens of an answer at most.
        max_seq_len: tokens of question and piece together; None is 384, or what the model reads.
        doc_stride: tokens that neighbouring pieces share; None is 128, or half of a piece.
        may_be_empty: an empty answer, where the text has none, is one of those to choose from.
        whole_words: answers begin and end with words.
    """

    name = "answer"
    tasks = ("question_answering",)

    def __init__(
        self,
        loaded: Loaded,
        batch_size: int = 8,
        top_k: int = 1,
        max_answer_len: int = 15,
        max_seq_len: int | None = None,
        doc_stride: int | None = None,
        may_be_empty: bool = False,
        whole_words: bool = True,
    ):
        super().__init__(loaded, batch_size)
        for field, value in (("top_k", top_k), ("max_answer_len", max_answer_len)):
            if value < 1:
                raise ValueError(f"{field} = {value}: it is at least 1")
        limit = self.config.max_positions
        length = max_seq_len or min(filter(None, (LONGEST_PIECE, limit, loaded.max_length)))
        if limit is not None and length > limit:
            raise ValueError(f"max_seq_len = {length}: the model reads {limit} tokens")
        stride = min(length // 2, 128) if doc_stride is None else doc_stride
        if not 0 <= stride < length:
            raise ValueError(f"doc_stride = {stride}: pieces of {length} tokens share fewer than that")
        self.top_k, self.max_answer_len = top_k, max_answer_len
        self.may_be_empty, self.whole_words = may_be_empty, whole_words
        self._cutter = Tokenizer.from_str(self.tokenizer.to_str())
        self._cutter.enable_truncation(length, stride=stride, strategy="only_second")

    def __call__(self, questions: Any, context: str | None = None) -> Any:
        """Answers questions.

        Args:
            questions: {"question": ..., "context": ...} or a list of such; or a question, or a list, with `context`.
            context: the text for all of the questions.

        Returns:
            For each question its answers, the best first: dicts of "score", "start" and "end" in the text, "answer".

        Raises:
            ValueError: a question or a text is missing, or a question leaves no room for the text.
        """
        asked, alone = as_list(questions)
        pairs = [_pair(one, context) for one in asked]
        pieces = [self._pieces(question, text) for question, text in pairs]
        rows = iter(self.run([piece for group in pieces for piece in group], "start_logits", "end_logits"))
        found = []
        for (_, text), group in zip(pairs, pieces, strict=True):
            found.append(self._best(text, [(piece, next(rows)) for piece in group]))
        return found[0] if alone else found

    def _pieces(self, question: str, text: str) -> list[Encoding]:
        try:
            first = self._cutter.encode(question, text)
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(
                f"the question {question[:30]!r}... leaves no room for the text: {error}"
            ) from None
        return [first, *first.overflowing]

    def _best(self, text: str, pieces: list[tuple[Encoding, tuple[np.ndarray, ...]]]) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = []
        empty = NOT_SEEN
        for piece, (start_logits, end_logits) in pieces:
            # Some spans become one when they are widened to words.
            count = self.top_k * 2 + 10 if self.whole_words else self.top_k
            spans = self._spans(piece, start_logits, end_logits, count)
            empty = min(empty, spans.empty)
            for first, last, score in zip(spans.starts, spans.ends, spans.scores, strict=True):
                start, end = self._place(piece, int(first), int(last))
                same = (one for one in answers if one["answer"].lower() == text[start:end].lower())
                known = next(same, None)
                if known is not None:
                    known["score"] += float(score)
                else:
                    answers.append(dict(score=float(score), start=start, end=end, answer=text[start:end]))
        if self.may_be_empty:
            answers.append(dict(score=empty, start=0, end=0, answer=""))
        return sorted(answers, key=lambda one: one["score"], reverse=True)[: self.top_k]

    def _spans(self, piece: Encoding, start: np.ndarray, end: np.ndarray, count: int) -> "Spans":
        """The most probable spans of a piece."""
        allowed = np.array([number == 1 for number in piece.sequence_ids])
        if (cls := self.loaded.special.get("cls_token")) is not None:
            allowed |= np.array(piece.ids) == cls  # counts for the probabilities, and is no answer
        start, end = (np.where(allowed, logits, np.float32(HIDDEN)) for logits in (start, end))
        start, end = (np.exp(logits - logits.max()) for logits in (start, end))
        start, end = start / start.sum(), end / end.sum()
        empty = float(start[0] * end[0])
        start[0] = end[0] = 0.0
        scores = np.tril(np.triu(np.outer(start, end)), self.max_answer_len - 1)
        flat = -scores.ravel()
        if count == 1:
            best = np.array([flat.argmin()])
        elif flat.size < count:
            best = np.argsort(flat)
        else:
            best = np.argpartition(flat, count - 1 if count == flat.size else count)[:count]
            best = best[np.argsort(flat[best])]
        starts, ends = np.unravel_index(best, scores.shape)
        kept = allowed[starts] & allowed[ends]
        starts, ends = starts[kept], ends[kept]
        return Spans(starts, ends, scores[starts, ends], empty)

    def _place(self, piece: Encoding, first: int, last: int) -> tuple[int, int]:
        """Where tokens stand in the text."""
        if self.whole_words:
            words = piece.token_to_word(first), piece.token_to_word(last)
            if None not in words:
                places = [piece.word_to_chars(word, 1) for word in words]  # type: ignore[arg-type]
                if None not in places:
                    return places[0][0], places[1][1]  # type: ignore[index]
        return piece.offsets[first][0], piece.offsets[last][1]


@dataclasses.dataclass(frozen=True)
class Spans:
    """Spans of tokens, both ends included, with their probabilities; `empty` is that of no answer."""

    starts: np.ndarray
    ends: np.ndarray
    scores: np.ndarray
    empty: float


def _pair(asked: Any, context: str | None) -> tuple[str, str]:
    if isinstance(asked, Mapping):
        question, text = asked.get("question"), asked.get("context", context)
    else:
        question, text = asked, context
    for name, value in (("question", question), ("context", text)):
        if not isinstance(value, str) or not value:
            raise ValueError(f"a {name} is missing: pass question and context, each a text")
        check_unicode(value)
    return str(question), str(text)
