"""The settings of fine-tuning, each set in gin as `task.<name>`."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What to learn from labelled examples; the head of `train.model_class` says which kind.

    Attributes:
        train_file: a .jsonl (an object a line) or .csv (with a header) of examples.
        eval_file: examples to evaluate on; None holds some of train_file out.
        eval_fraction: share of train_file that is held out where there is no eval_file.
        columns: our names of columns to the file's, such as {'text': 'sentence', 'label': 'stars'}.
        labels: names of the classes in their order; None takes the model's, or those in train_file.
        tokenizer: a folder or file; None is that of train.init_from, or one trained on the texts.
        prefix: stands before every text, such as 'Summarize: '.
        suffix: stands after every text, such as ' TL;DR:' for a causal model that is to go on with the answer.
        buckets: lengths that batches are padded to, each compiled once; train.sequence_length is the last in any case.
        label_all_pieces: every piece of a word learns its label, rather than the first alone.
        stride: tokens that neighbouring pieces of a long context share.
        max_answer_length: tokens of an answer at most.
        target_length: tokens of a target (a summary) at most, its end token included.
        write: evaluate what the model writes (ROUGE), rather than the loss on the targets alone.
        max_eval_examples: examples of an evaluation at most; None is all.
    """

    train_file: str
    eval_file: str | None = None
    eval_fraction: float = 0.1
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    labels: tuple[str, ...] | list[str] | None = None
    tokenizer: str | None = None
    prefix: str = ""
    suffix: str = ""
    buckets: tuple[int, ...] | list[int] = ()
    label_all_pieces: bool = False
    stride: int = 128
    max_answer_length: int = 30
    target_length: int = 64
    write: bool = True
    max_eval_examples: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.eval_fraction < 1:
            raise ValueError(f"task.eval_fraction = {self.eval_fraction}: a share lies between 0 and 1")
        for name in ("max_answer_length", "target_length", "max_eval_examples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"task.{name} = {value}: it is at least 1")
        if self.stride < 0:
            raise ValueError(f"task.stride = {self.stride}: it is at least 0")
        if any(size < 1 for size in self.buckets):
            raise ValueError(f"task.buckets = {self.buckets}: lengths are at least 1")
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            raise ValueError(f"task.labels = {self.labels}: a class is named twice")

    def lengths(self, sequence_length: int) -> tuple[int, ...]:
        """The lengths that batches are padded to, in rising order."""
        return (*sorted({size for size in self.buckets if size < sequence_length}), sequence_length)
