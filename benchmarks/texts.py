"""What the benchmarks that train on text share: a small GPT-J, its tokens and batches, and its held-out loss."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.sides import Shape
from train import schedules
from train.data.batches import train_batches, validation_batches
from train.data.tokens import TokenData, prepare_tokens

SMALL = Shape(vocab_size=2048, n_embd=160, n_layer=4, n_head=4, rotary_dim=20, n_positions=256)
"""1.9M parameters."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is trained on, and for how long."""

    path: str = "stdlib"
    """A folder of text, or "stdlib": Python's own standard library."""
    shape: Shape = SMALL
    """The model."""
    steps: int = 200
    """Steps to train."""
    batch: int = 16
    """Sequences in a step."""
    length: int = 128
    """Tokens of a sequence."""
    rate: float = 3e-3
    """The highest learning rate: a linear rise over a tenth of the steps, then half a cosine down to a tenth."""
    held_out: int = 25
    """Batches of held-out text at most."""
    seed: int = 0
    """Of the order of the data and of the initial weights."""

    def schedule(self) -> Any:
        """step -> learning rate."""
        return schedules.warmup_cosine(
            peak=self.rate, num_steps=self.steps, warmup_steps=max(1, self.steps // 10)
        )

    def tokens(self) -> TokenData:
        """The text, tokenised; by a tokenizer that is trained on it."""
        return prepare_tokens(self.path, model_vocab_size=self.shape.vocab_size)

    def batches(self, tokens: TokenData) -> list[Mapping[str, np.ndarray]]:
        """Those to train on."""
        sizes: dict[str, Any] = dict(sequence_length=self.length, global_batch_size=self.batch)
        source = train_batches(tokens, seed=self.seed, **sizes)
        return [next(source) for _ in range(self.steps)]

    def held_out_batches(self, tokens: TokenData) -> list[Mapping[str, np.ndarray]]:
        """Those to measure on."""
        sizes: dict[str, Any] = dict(sequence_length=self.length, global_batch_size=self.batch)
        return list(validation_batches(tokens, max_batches=self.held_out, **sizes))


def held_out_loss(evaluate: Callable[[Mapping[str, np.ndarray]], tuple[float, int]], batches: Any) -> float:
    """The mean loss over all labels of all batches.

    Args:
        evaluate: batch -> (sum of losses, number of labels).
        batches: to measure on.
    """
    sums, counts = zip(*map(evaluate, batches), strict=True)
    return sum(sums) / sum(counts)
