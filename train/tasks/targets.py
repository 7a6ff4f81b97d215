"""Texts to write: summaries and answers, by encoder-decoders and by causal models that go on with a text."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from train.losses import IGNORED
from train.tasks import scores
from train.tasks.examples import Example
from train.tasks.head import Head, Measured, Row

TARGETS = ("summary", "target")
"""Columns that may hold the text to write."""


class Targets(Head):
    """Columns `text`, and `summary` or `target`: an encoder reads the text, the decoder writes the target."""

    fields = ()
    libraries = ("rouge_score",)
    writes = True
    target_is_apart = True

    def __init__(self, *args: Any):
        super().__init__(*args)
        limit = self.config.max_positions
        if limit is not None and self.settings.target_length > limit:
            raise ValueError(
                f"task.target_length = {self.settings.target_length}: the model has {limit} positions"
            )
        self.end_id = self.config.eos_token_id

    @property
    def per_token(self) -> bool:
        return True

    def rows(self, examples: Sequence[Example]) -> list[Row]:
        encodings = self.encode([self.prompt(one) for one in examples])
        targets = self.targets(examples)
        return [
            Row(i, one.ids, one.type_ids, {"labels": target})
            for i, (one, target) in enumerate(zip(encodings, targets, strict=True))
        ]

    def targets(self, examples: Sequence[Example]) -> list[list[int]]:
        """The targets' tokens, ended by the end token, cut to `task.target_length`."""
        texts = [self.target(one) for one in examples]
        cutter = self.words.cutter(self.settings.target_length)
        found = cutter.encode_batch(texts)
        self.num_cut += sum(bool(one.overflowing) for one in found)
        return [self._ended(one.ids) for one in found]

    def _ended(self, ids: list[int]) -> list[int]:
        if self.end_id is None or (ids and ids[-1] == self.end_id):
            return ids
        return [*ids[: self.settings.target_length - 1], self.end_id]

    def target(self, example: Example) -> str:
        """The text to write.

        Raises:
            ValueError: there is none.
        """
        name = next((name for name in TARGETS if example.has(name)), TARGETS[0])
        return example.text(name)

    @property
    def metrics(self) -> tuple[str, ...]:
        return scores.SUMMARIES if self.settings.write else ()

    def measure(
        self, examples: Sequence[Example], rows: Sequence[Row], outputs: Mapping[str, Any]
    ) -> Measured:
        targets = [self.target(one) for one in examples]
        if "written" not in outputs:
            return {}, [{"label": target} for target in targets]
        written = outputs["written"]
        return scores.summaries(targets, written), [
            {"prediction": text, "label": target} for text, target in zip(written, targets, strict=True)
        ]

    def prompts(self, rows: Sequence[Row]) -> list[list[int]]:
        """What the model reads before it writes."""
        return [row.ids for row in rows]


class Continuations(Targets):
    """The same for a causal model: it reads the text and goes on with the target, which alone is learned."""

    target_is_apart = False

    def __init__(self, *args: Any):
        super().__init__(*args)
        if self.settings.target_length >= self.length:
            raise ValueError(
                f"task.target_length = {self.settings.target_length}: train.sequence_length = {self.length} holds the "
                "text too"
            )

    def rows(self, examples: Sequence[Example]) -> list[Row]:
        prompts = self.words.tokenizer.encode_batch(
            [self.prompt(one) for one in examples], add_special_tokens=False
        )
        found = []
        for i, (prompt, target) in enumerate(zip(prompts, self.targets(examples), strict=True)):
            # What the settings put after a text stays, so the text is cut before it.
            room, kept = self.length - len(target), prompt.ids
            if len(kept) > room:
                self.num_cut += 1
                tail = self._tail
                kept = [*kept[: max(room - len(tail), 0)], *tail][:room]
            ids = [*kept, *target]
            labels = [IGNORED] * len(kept) + target
            if self.model.task == "unshifted_lm":  # labels stand where their logits do
                labels = [*labels[1:], IGNORED]
            found.append(Row(i, ids, [0] * len(ids), {"labels": labels}, len(kept)))
        return found

    @property
    def _tail(self) -> list[int]:
        suffix = self.settings.suffix
        return self.words.tokenizer.encode(suffix, add_special_tokens=False).ids if suffix else []

    def targets(self, examples: Sequence[Example]) -> list[list[int]]:
        texts = [self.target(one) for one in examples]
        found = self.words.tokenizer.encode_batch(texts, add_special_tokens=False)
        length = self.settings.target_length
        self.num_cut += sum(len(one.ids) >= length for one in found)
        return [self._ended(one.ids[:length]) for one in found]

    def prompts(self, rows: Sequence[Row]) -> list[list[int]]:
        return [row.ids[: row.about] for row in rows]


def left_padded(prompts: Sequence[list[int]], length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask), each int32 [rows, length], every row ending at the last place."""
    ids, mask = np.full((len(prompts), length), pad_id, np.int32), np.zeros((len(prompts), length), np.int32)
    for row, marks, prompt in zip(ids, mask, prompts, strict=True):
        row[length - len(prompt) :], marks[length - len(prompt) :] = prompt, 1
    return ids, mask
