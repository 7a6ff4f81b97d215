"""One pass over held-out examples: the loss, the field's metrics, and a file of predictions."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

import modelzoo
import parallel
from train.step import make_eval_step
from train.tasks.batches import padded_length
from train.tasks.examples import Example
from train.tasks.head import Head, Row
from train.tasks.targets import left_padded
from train.tasks.writing import Writer

PREDICTIONS = "predictions.jsonl"
_LM = ("causal_lm", "seq2seq_lm", "unshifted_lm")


class Evaluation:
    """params -> metrics; writes WORKDIR/predictions.jsonl.

    Args:
        head: of the model.
        examples: to evaluate on.
        rules: of the mesh, or None.
        lengths: that batches are padded to.
        batch_size: B, over all processes.
        shard: (index, count), this process's part of a batch.
        workdir: of the run.
    """

    def __init__(
        self,
        head: Head,
        examples: Sequence[Example],
        *,
        rules: parallel.Rules | None,
        lengths: Sequence[int],
        batch_size: int,
        shard: tuple[int, int],
        workdir: str | os.PathLike[str],
    ):
        self.head, self.examples, self.rows = head, examples, head.rows(examples)
        self._rules, self._lengths, self._size, self._shard = rules, tuple(lengths), batch_size, shard
        self._file = Path(workdir) / PREDICTIONS
        self._step = make_eval_step(head.model, rules=rules, fields=head.fields)
        self._writer = None
        if head.writes and head.settings.write:
            self._writer = Writer(head.model, rules, head.settings.target_length)

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of what an evaluation finds."""
        perplexity = ("perplexity",) if self.head.model.task in _LM else ()
        return ("loss", *self.head.metrics, *perplexity)

    def __call__(self, params: Any) -> dict[str, float]:
        """Evaluates, with all processes.

        Returns:
            "loss" (the mean over labels), "perplexity" of language models, and the field's metrics.
        """
        outputs: dict[str, list[Any]] = {name: [] for name in self.head.fields}
        if self._writer is not None:
            outputs["written"] = []
        total = count = 0.0
        for start in range(0, len(self.rows), self._size):
            real = self.rows[start : start + self._size]
            found = self._run(params, real)
            total, count = total + float(found["loss_sum"]), count + int(found["tokens"])
            for name in self.head.fields:
                outputs[name].extend(np.asarray(_whole(found[name])[: len(real)], np.float32))
            if self._writer is not None:
                outputs["written"].extend(self._write(params, real))
        metrics, predictions = self.head.measure(self.examples, self.rows, outputs)
        metrics = {"loss": total / count if count else math.nan} | metrics
        if self.head.model.task in _LM:
            metrics["perplexity"] = math.exp(min(metrics["loss"], 700.0))
        self._save(predictions)
        return metrics

    def _mine(self, rows: Sequence[Row]) -> list[Row]:
        """This process's part of a batch that is filled up with copies of its first row."""
        index, count = self._shard
        share = self._size // count
        whole = [*rows, *[rows[0]] * (self._size - len(rows))]
        return whole[index * share : (index + 1) * share]

    def _run(self, params: Any, rows: Sequence[Row]) -> Any:
        index, count = self._shard
        share = self._size // count
        counted = min(max(len(rows) - index * share, 0), share)
        batch = self.head.batch(self._mine(rows), padded_length(rows, self._lengths), counted)
        return self._step(params, batch)

    def _write(self, params: Any, rows: Sequence[Row]) -> list[str]:
        head: Any = self.head
        prompts = head.prompts(self._mine(rows))
        length = padded_length(rows, self._lengths)
        fill = head.pad_id or 0
        if head.model.task == "seq2seq_lm":
            ids, mask = (array[:, ::-1] for array in left_padded([p[::-1] for p in prompts], length, fill))
        else:
            limit = head.config.max_positions
            if limit is not None:
                length = min(length, limit - head.settings.target_length)
            ids, mask = left_padded([prompt[-length:] for prompt in prompts], length, fill)
        assert self._writer is not None
        tokens = _whole(self._writer(params, _placed(ids, self._rules), _placed(mask, self._rules)))
        texts = head.words.tokenizer.decode_batch(tokens[: len(rows)].tolist(), skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _save(self, predictions: Sequence[dict[str, Any]]) -> None:
        if jax.process_index():
            return
        aside = self._file.with_suffix(".tmp")
        with aside.open("w", encoding="utf-8") as lines:
            for example, prediction in zip(self.examples, predictions, strict=True):
                found = {"where": example.where} | prediction
                lines.write(json.dumps(found, ensure_ascii=False, default=float) + "\n")
        os.replace(aside, self._file)


def _placed(array: np.ndarray, rules: parallel.Rules | None) -> Any:
    array = np.ascontiguousarray(array)
    if rules is None:
        return array
    sharding = parallel.batch_sharding(rules)
    if jax.process_count() > 1:
        return jax.make_array_from_process_local_data(sharding, array)
    return jax.device_put(array, sharding)


def _whole(array: Any) -> np.ndarray:
    """All rows of an array whose rows may lie in several processes."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def head_of(model: modelzoo.Model) -> type[Head]:
    """The way with examples that a model's head has.

    Raises:
        ValueError: nothing labelled trains it.
    """
    from train.tasks import answers, sequences, tags, targets

    heads: dict[str, type[Head]] = {
        "sequence_classification": sequences.Sequences,
        "next_sentence": sequences.NextSentence,
        "multiple_choice": sequences.Choices,
        "double_heads": sequences.TwoHeads,
        "token_classification": tags.Tags,
        "question_answering": answers.Answers,
        "seq2seq_lm": targets.Targets,
        "causal_lm": targets.Continuations,
        "unshifted_lm": targets.Continuations,
    }
    if model.task not in heads:
        raise ValueError(
            f"train.model_class = {type(model).__name__!r}: task.train_file trains heads that read labels; this one "
            "learns from plain text, by data.path"
        )
    return heads[model.task]
