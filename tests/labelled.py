"""Heads on labelled examples for tests: tiny models, tokenizers trained on a sentence or two."""

from typing import Any

import modelzoo
from tests import small_tokenizers
from tests.zoo import TINY
from train.tasks.examples import Example
from train.tasks.settings import Task
from train.tasks.words import Words

BERT = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), range(5), strict=True))


def examples(*rows: dict[str, Any]) -> list[Example]:
    return [Example(f"a.jsonl:{i + 1}", row, {}) for i, row in enumerate(rows)]


def bert_words() -> Words:
    return Words(small_tokenizers.bert(), BERT, {})


def roberta_words() -> Words:
    tokenizer = small_tokenizers.roberta()
    return Words(tokenizer, dict(bos_token=0, pad_token=1, eos_token=2, cls_token=0, sep_token=2), {})


def settings(**fields: Any) -> Task:
    return Task(train_file="a.jsonl", **fields)


def head(
    kind: Any, model_class: str, words: Words, length: int = 24, config: Any = None, **fields: Any
) -> Any:
    """A head with a tiny model of a class; `fields` are of its config, those of `Task` under `task`."""
    task = settings(**fields.pop("task", {}))
    cls = modelzoo.get_model_class(model_class)
    family = modelzoo.registry.family_of(cls)
    size = max(words.tokenizer.get_vocab().values()) + 1
    config = config or modelzoo.get_config(TINY[family.model_type], vocab_size=size, **fields)
    return kind(cls(config), words, task, length)
