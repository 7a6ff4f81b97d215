"""Text in, text out, with scores, for every head: one line of Python each.

    inference.open_task("fill-mask", "roberta-base")("The capital of France is <mask>.")
    inference.open_task("classify", "runs/reviews")(["A joy.", "Two hours that I want back."], top_k=2)
    inference.open_task("answer", "runs/squad")("Who wrote it?", context="It was written by Ann.")
    inference.open_task("tag", "runs/names", strategy="average")("Ann lives in Oslo.")
    inference.open_task("choose", "runs/swag")("She opened the door and", choices=["went in.", "flew."])
    inference.open_task("summarize", "RUCAIBox/mvp")("Summarize: You may want to stick it to your boss and ...")

Results are those of transformers' pipelines (4.57.6) on the same weights; several texts go through together.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from inference.answering import Answer
from inference.decode import generate
from inference.generation_config import GenerationConfig
from inference.loading import read_json
from inference.tagging import Tag
from inference.task_model import TaskModel, as_list, softmax

SUMMARY_TOKENS, SUMMARY_BEAMS = 256, 4
"""Where neither the caller nor the checkpoint says how much to write."""


class FillMask(TaskModel):
    """Says what may stand in place of a mask."""

    name = "fill-mask"
    tasks = ("masked_lm", "pretraining")

    def __call__(self, texts: Any, top_k: int = 5) -> Any:
        """Fills masks.

        Args:
            texts: a text, or a list of them, with the tokenizer's mask in it once or several times.
            top_k: tokens to tell of.

        Returns:
            For each text the best tokens, the most probable first: dicts of "score", "token" (its id), "token_str" and
            "sequence", the text with it. Where a text has several masks, a list of those for each.

        Raises:
            ValueError: a text without a mask, empty or too long; or a tokenizer without one.
        """
        if "mask_token" not in self.loaded.special:
            raise ValueError(f"{self.loaded.folder}: its tokenizer names no mask_token")
        _check_top_k(top_k)
        mask_id = self.loaded.special["mask_token"]
        texts, alone = as_list(texts)
        encodings = [self.encode(text) for text in texts]
        for text, encoding in zip(texts, encodings, strict=True):
            if mask_id not in encoding.ids:
                raise ValueError(
                    f"the text {text[:30]!r}... has no mask: write {self.tokenizer.id_to_token(mask_id)} where a word "
                    "is missing"
                )
        field = "prediction_logits" if self.model.task == "pretraining" else "logits"
        found = []
        for encoding, (logits,) in zip(encodings, self.run(encodings, field), strict=True):
            ids = np.array(encoding.ids)
            places = np.flatnonzero(ids == mask_id).tolist()
            filled = [self._best(ids, place, logits[place], top_k, len(places) == 1) for place in places]
            found.append(filled[0] if len(filled) == 1 else filled)
        return found[0] if alone else found

    def _best(self, ids: np.ndarray, place: int, logits: np.ndarray, top_k: int, single: bool) -> list[Any]:
        probs = softmax(logits[: self.config.vocab_size])
        best = np.argsort(-probs, kind="stable")[:top_k].tolist()
        found = []
        for token in best:
            tokens = ids.copy()
            tokens[place] = token
            tokens = tokens[tokens != self.loaded.special.get("pad_token", -1)].tolist()
            texts = dict(token_str=self.decode([token], False), sequence=self.decode(tokens, single))
            found.append(dict(score=float(probs[token]), token=token, **texts))
        return found


class Classify(TaskModel):
    """Says which class a text is of."""

    name = "classify"
    tasks = ("sequence_classification",)

    def __call__(self, texts: Any, top_k: int | None = 1) -> Any:
        """Classifies texts.

        Args:
            texts: a text, or {"text": ..., "text_pair": ...} of two, or a list of such.
            top_k: classes to tell of; None tells of all.

        Returns:
            For each text its classes, the most probable first: dicts of "label" and "score". The score is a probability
            among the classes, or of the class alone where several may hold; of a regression the number itself.

        Raises:
            ValueError: a text is empty or too long.
        """
        _check_top_k(top_k)
        texts, alone = as_list(texts)
        encodings = [self.encode(*_pair(text)) for text in texts]
        found = []
        for (logits,) in self.run(encodings, "logits"):
            scores = self._scores(logits)
            best = sorted(range(len(scores)), key=lambda i: -scores[i])[:top_k]
            found.append([dict(label=self.label(i), score=float(scores[i])) for i in best])
        return found[0] if alone else found

    def _scores(self, logits: np.ndarray) -> np.ndarray:
        kind = self.config.problem_type
        if kind == "regression":
            return logits
        if kind == "multi_label_classification" or self.config.num_labels == 1:
            return 1.0 / (1.0 + np.exp(-logits))
        return softmax(logits)


class Choose(TaskModel):
    """Says which of several continuations fits a text."""

    name = "choose"
    tasks = ("multiple_choice", "double_heads")

    def __call__(self, texts: Any, choices: Sequence[str] | None = None) -> Any:
        """Chooses.

        Args:
            texts: {"text": ..., "choices": [...]} or a list of such; or a text, or a list, with `choices`.
            choices: for all of the texts.

        Returns:
            For each text its choices, the most probable first: dicts of "choice", "index" and "score".

        Raises:
            ValueError: a text is empty or too long, or has fewer than two choices.
        """
        asked, alone = as_list(texts)
        found = []
        for one in asked:
            text, options = one, choices
            if isinstance(one, Mapping):
                text, options = one.get("text", ""), one.get("choices", choices)
            if not isinstance(options, Sequence) or isinstance(options, str) or len(options) < 2:
                raise ValueError(f"choices = {options!r}: there are two or more to choose from")
            encodings = [self.encode(text, option) for option in options]
            field = "mc_logits" if self.model.task == "double_heads" else "logits"
            scores = softmax(self.call(encodings, [field], len(encodings))[0][0, : len(options)])
            order = sorted(range(len(options)), key=lambda i: -scores[i])
            found.append([dict(choice=options[i], index=i, score=float(scores[i])) for i in order])
        return found[0] if alone else found

    def inputs(self, encodings: Sequence[Any], size: int) -> dict[str, Any]:
        """The choices of one text: [1, C, T]; of two heads, one scores a choice by its last token."""
        inputs = super().inputs(encodings, size)
        if self.model.task == "double_heads":
            inputs["mc_token_ids"] = inputs["attention_mask"].sum(axis=-1) - 1
        return {name: values[None] for name, values in inputs.items()}


class Summarize(TaskModel):
    """Writes what an encoder-decoder makes of a text: a summary, or whatever it was trained to write.

    Args:
        loaded, batch_size: as `TaskModel`.
        generation: fields of `GenerationConfig`; what is not given is as the checkpoint says.
    """

    name = "summarize"
    tasks = ("seq2seq_lm",)

    def __init__(self, loaded: Any, batch_size: int = 8, **generation: Any):
        super().__init__(loaded, batch_size)
        fields = {field.name for field in dataclasses.fields(GenerationConfig)}
        if unknown := sorted(set(generation) - fields):
            raise ValueError(f"GenerationConfig has no field {unknown[0]!r}")
        chosen: dict[str, Any] = _generation_of(loaded.folder, fields) | generation
        if not {"max_length", "max_new_tokens"} & set(chosen):
            longest = min(SUMMARY_TOKENS, (self.config.max_positions or SUMMARY_TOKENS + 1) - 1)
            chosen = dict(num_beams=SUMMARY_BEAMS, max_new_tokens=longest) | chosen
        self.generation = GenerationConfig(**chosen)

    def __call__(self, texts: Any) -> Any:
        """Writes summaries.

        Args:
            texts: a text, or a list of them, with what the model was trained to be asked with, such as "Summarize: ".

        Returns:
            For each text {"summary_text": ...}, with "score" where beams were searched.

        Raises:
            ValueError: a text is empty or too long.
        """
        texts, alone = as_list(texts)
        encodings = [self.encode(text) for text in texts]
        found: dict[int, dict[str, Any]] = {}
        order = sorted(range(len(encodings)), key=lambda i: -len(encodings[i].ids))
        for start in range(0, len(order), self.batch_size):
            numbers = order[start : start + self.batch_size]
            width = max(len(encodings[number].ids) for number in numbers)
            ids = np.full((len(numbers), width), self._pad_id or 0)
            mask = np.zeros((len(numbers), width), np.int64)
            for row, number in enumerate(numbers):
                tokens = encodings[number].ids
                ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
            options: dict[str, Any] = dict(rules=self.loaded.rules, tokenizer=self.tokenizer)
            out = generate(self.model, self.loaded.params, ids, mask, self.generation, **options)
            for row, number in enumerate(numbers):
                text = self.tokenizer.decode(out.sequences[row].tolist(), skip_special_tokens=True)
                found[number] = dict(summary_text=text)
                if out.sequences_scores is not None:
                    found[number]["score"] = float(out.sequences_scores[row])
        results = [found[number] for number in range(len(texts))]
        return results[0] if alone else results


TASKS: dict[str, type[TaskModel]] = {
    task.name: task for task in (FillMask, Classify, Answer, Tag, Choose, Summarize)
}
"""By the name on the command line."""


def open_task(name: str, checkpoint: str | os.PathLike[str], **options: Any) -> Any:
    """Opens a checkpoint for a task; call the result with texts.

    Args:
        name: one of TASKS.
        checkpoint: a folder or a hub id.
        options: dtype, quantize, rules, batch_size, and those of the task's class.

    Raises:
        OSError, ValueError: an unknown task; or the checkpoint is missing or damaged, or has no head for the task.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: choose from {', '.join(TASKS)}")
    return TASKS[name].open(checkpoint, **options)


def _generation_of(folder: Any, fields: set[str]) -> dict[str, Any]:
    """How a checkpoint says that it writes."""
    found: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        if folder is not None and (Path(folder) / name).is_file():
            content = read_json(Path(folder) / name)
            found |= {key: value for key, value in content.items() if key in fields and value is not None}
    return found


def _pair(text: Any) -> tuple[Any, Any]:
    if isinstance(text, Mapping):
        return text.get("text"), text.get("text_pair")
    return text, None


def _check_top_k(top_k: int | None) -> None:
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k = {top_k}: it is at least 1")
