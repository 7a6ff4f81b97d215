"""A batch for any model class, drawn from a seed: for programs that need one and have no data."""

from typing import Any

import numpy as np

import modelzoo
from modelzoo.model import CHOICE_TASKS
from train import losses

NUM_CHOICES = 2


def draw_batch(model: Any, rows: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs and labels with padding, ignored labels and, where the model takes them, segments and a decoder's input.

    Args:
        model: of a task with a loss.
        rows: B.
        length: T.
        seed: the same one gives the same batch.

    Returns:
        int32 [B, T] and so on under transformers' names; of a choice [B, C, T].

    Raises:
        ValueError: the model has no loss, or its positions do not hold the length.
    """
    parts = losses.objective(model)
    config, names, random = model.config, modelzoo.input_names(model), np.random.default_rng(seed)
    if length < 2 or (config.max_positions is not None and length > config.max_positions):
        raise ValueError(f"length = {length}: it is from 2 to the model's {config.max_positions} positions")
    if rows < 1:
        raise ValueError(f"rows = {rows}: a batch has at least 1")
    ids_of = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
    special = {getattr(config, name, None) for name in ids_of}
    words = np.array([i for i in range(config.vocab_size) if i not in special])
    shape = (rows, NUM_CHOICES, length) if model.task in CHOICE_TASKS else (rows, length)

    # Rows end 0, 1 or 2 tokens early, with the end token if there is one.
    lengths = length - np.arange(rows * (NUM_CHOICES if len(shape) == 3 else 1)) % min(3, length)
    places = np.arange(length)
    mask = (places < lengths[:, None]).reshape(shape)
    last = (places == lengths[:, None] - 1).reshape(shape)
    ids = random.choice(words, shape)
    if config.eos_token_id is not None:
        ids = np.where(last, config.eos_token_id, ids)
    ids = np.where(mask, ids, 0 if config.pad_token_id is None else config.pad_token_id)

    batch: dict[str, np.ndarray] = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in names and getattr(config, "type_vocab_size", 1) > 1:
        batch["token_type_ids"] = np.broadcast_to(places >= length // 2, shape)
    if "decoder_input_ids" in names:
        batch["decoder_input_ids"] = random.choice(words, shape)
    if "mc_token_ids" in names:
        batch["mc_token_ids"] = (lengths - 1).reshape(shape[:-1])
    batch = {name: value.astype(np.int32) for name, value in batch.items()}
    for part in parts:
        batch[part.labels] = _labels(part.name, model, words, mask, random)
    return batch


def _labels(part: str, model: Any, words: np.ndarray, mask: np.ndarray, random: Any) -> np.ndarray:
    rows, length = mask.shape[0], mask.shape[-1]
    if part in ("start", "end"):
        return random.integers(0, length, rows).astype(np.int32)
    if part == "next_sentence":
        return random.integers(0, 2, rows).astype(np.int32)
    if part == "choice":
        return random.integers(0, NUM_CHOICES, rows).astype(np.int32)
    if part == "classification" and model.task == "sequence_classification":
        count, problem = model.config.num_labels, model.config.problem_type
        if problem == "multi_label_classification":
            return random.integers(0, 2, (rows, count)).astype(np.float32)
        if problem == "regression" or (problem is None and count == 1):
            return random.normal(size=(rows, count)).astype(np.float32)
        return random.integers(0, count, rows).astype(np.int32)
    labels = random.choice(words, mask.shape)
    if part == "classification":
        labels = random.integers(0, model.config.num_labels, mask.shape)
    learned = mask & (random.random(mask.shape) < 0.7)
    learned.reshape(-1, length)[0, 1] = True  # one label at least
    return np.where(learned, labels, losses.IGNORED).astype(np.int32)
