"""What every task on a text has in common: a checkpoint with its tokenizer, and batches of texts through the model."""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Encoding, Tokenizer

import modelzoo
import parallel
from inference.loading import open_checkpoint, read_json
from inference.prompts import bucket_length
from inference.text import check_unicode, read_tokenizer, special_tokens
from modelzoo.tasks import LastTokenClassification


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint that was read.

    Attributes:
        folder: where it lies; None where there is none.
        model: of a class with a head.
        params: laid out by `prepare`.
        tokenizer: its tokenizer.
        special: ids of tokens by purpose, such as "mask_token".
        rules: of the mesh that the parameters lie on.
        cleans_up: decoding takes back the spaces before punctuation that BERT's tokenizer adds.
        max_length: tokens of a text at most, as the tokenizer's files say; None where they do not.
    """

    folder: Any
    model: modelzoo.Model
    params: Any
    tokenizer: Tokenizer
    special: Mapping[str, int]
    rules: parallel.Rules | None = None
    cleans_up: bool = False
    max_length: int | None = None


class TaskModel:
    """Base of the tasks.

    Args:
        loaded: the checkpoint.
        batch_size: texts that go through the model together.
    """

    name: ClassVar[str]
    """What the task is called on the command line."""
    tasks: ClassVar[tuple[str, ...]]
    """`Model.task` of the models that do it."""

    def __init__(self, loaded: Loaded, batch_size: int = 8):
        if batch_size < 1:
            raise ValueError(f"batch_size = {batch_size}: it is at least 1")
        if loaded.model.task not in self.tasks:
            raise ValueError(
                f"{type(loaded.model).__name__} does not do the task {self.name!r}: it is for models of "
                f"{' or '.join(task.replace('_', ' ') for task in self.tasks)}"
            )
        self.loaded, self.batch_size = loaded, batch_size
        self.model, self.tokenizer, self.config = loaded.model, loaded.tokenizer, loaded.model.config
        self._pad_id = getattr(self.config, "pad_token_id", None)
        # A causal model finds a text's end by its padding: without a token for it every text goes alone, as it is.
        self._alone = isinstance(self.model, LastTokenClassification) and self._pad_id is None

    @classmethod
    def open(
        cls,
        checkpoint: str | os.PathLike[str],
        dtype: Any = jnp.float32,
        quantize: str | None = None,
        rules: parallel.Rules | None = None,
        batch_size: int = 8,
        **options: Any,
    ) -> Any:
        """Opens a checkpoint for the task.

        Args:
            checkpoint: as of `inference.loading.open_checkpoint`.
            dtype, quantize, rules: of the parameters.
            batch_size, options: of the class.

        Raises:
            OSError, ValueError: the checkpoint is missing or damaged, or has no head for the task.
        """
        opened = open_checkpoint(checkpoint, dtype, cls.tasks)
        folder = opened.folder
        tokenizer = read_tokenizer(folder)
        special = special_tokens(folder, tokenizer)
        file = Path(folder) / "tokenizer_config.json"
        about = read_json(file) if file.is_file() else {}
        longest = about.get("model_max_length")
        details: dict[str, Any] = dict(
            cleans_up=about.get("clean_up_tokenization_spaces") is True,
            max_length=longest if isinstance(longest, int) and longest < 10**9 else None,
        )
        params = opened.read_prepared(rules, quantize)
        loaded = Loaded(folder, opened.model, params, tokenizer, special, rules, **details)
        return cls(loaded, batch_size, **options)

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """The text of tokens."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=skip_special)
        if self.loaded.cleans_up:
            for spaced in (" .", " ?", " !", " ,"):
                text = text.replace(spaced, spaced[1:])
            text = text.replace(" ' ", "'")
            for spaced in (" n't", " 'm", " 's", " 've", " 're"):
                text = text.replace(spaced, spaced[1:])
        return text

    def encode(self, text: str, pair: str | None = None) -> Encoding:
        """The tokens of a text, or of two, with what the model wants around them.

        Raises:
            ValueError: no text, or one that is longer than the model reads.
        """
        for one in (text,) if pair is None else (text, pair):
            if not isinstance(one, str) or not one:
                raise ValueError(f"{self.name} reads text, and got {one!r}")
            check_unicode(one)
        encoding = self.tokenizer.encode(text, pair)
        limit = self.config.max_positions
        if limit is not None and len(encoding.ids) > limit:
            raise ValueError(
                f"the text {text[:30]!r}... has {len(encoding.ids)} tokens, but the model reads {limit}: cut it up"
            )
        return encoding

    def run(self, encodings: Sequence[Encoding], *fields: str) -> list[tuple[np.ndarray, ...]]:
        """Runs the model over texts, the longest first.

        Args:
            encodings: of the texts.
            fields: of the model's output.

        Returns:
            For each text, in its order, its row of each field, float32; a field with a place for every token is cut
            to the text's own.
        """
        found: dict[int, tuple[np.ndarray, ...]] = {}
        order = sorted(range(len(encodings)), key=lambda i: -len(encodings[i].ids))
        size = 1 if self._alone else self.batch_size
        for start in range(0, len(order), size):
            numbers = order[start : start + size]
            rows = self.call([encodings[number] for number in numbers], fields, size)
            for row, number in enumerate(numbers):
                length = len(encodings[number].ids)
                parts = (values[row] for values in rows)
                found[number] = tuple(part[:length] if self._per_token else part for part in parts)
        return [found[number] for number in range(len(encodings))]

    @property
    def _per_token(self) -> bool:
        return self.model.task in ("token_classification", "question_answering", "masked_lm", "pretraining")

    def call(self, encodings: Sequence[Encoding], fields: Sequence[str], size: int) -> list[np.ndarray]:
        """One batch, filled up with copies of its first text to `size` rows."""
        inputs = self.inputs(encodings, size)
        rules = self.loaded.rules
        with parallel.use(rules):
            out = _apply(self.model, self.loaded.params, inputs, tuple(fields), rules)
        return [np.asarray(values, np.float32) for values in out]

    def inputs(self, encodings: Sequence[Encoding], size: int) -> dict[str, jax.Array]:
        """Token ids and masks [size, T], padded on the right to a bucket's length."""
        rules, longest = self.loaded.rules, max(len(one.ids) for one in encodings)
        size += 0 if rules is None else -size % rules.num_shards("act_batch")
        length = longest if self._alone else bucket_length(longest, self.config.max_positions)
        rows = [*encodings, *[encodings[0]] * (size - len(encodings))]

        def padded(values: list[list[int]], fill: int) -> np.ndarray:
            return np.array([[*row, *[fill] * (length - len(row))] for row in values], np.int32)

        arrays = {"input_ids": padded([row.ids for row in rows], self._pad_id or 0)}
        arrays["attention_mask"] = padded([[1] * len(row.ids) for row in rows], 0)
        if getattr(self.config, "type_vocab_size", 1) > 1:
            arrays["token_type_ids"] = padded([row.type_ids for row in rows], 0)
        placed = {name: jnp.asarray(array) for name, array in arrays.items()}
        if rules is not None:
            placed = {name: jax.device_put(a, parallel.batch_sharding(rules)) for name, a in placed.items()}
        return placed

    def label(self, number: int) -> str:
        """The name of a class."""
        return dict(self.config.id2label or ()).get(number, f"LABEL_{number}")


@functools.partial(jax.jit, static_argnames=("model", "fields", "rules"))
def _apply(model: Any, params: Any, inputs: Any, fields: tuple[str, ...], rules: Any) -> list[jax.Array]:
    out = model.apply({"params": params}, **inputs)
    return [getattr(out, field) for field in fields]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities along the last dimension."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def as_list(texts: Any) -> tuple[list[Any], bool]:
    """(a list, whether a single text was given)."""
    alone = isinstance(texts, (str, Mapping))
    return [texts] if alone else list(texts), alone
