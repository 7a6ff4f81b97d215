"""The settings of a run under `train.` in gin files, and which of them may change when it goes on."""

import dataclasses
from typing import Any, Literal

from train.data.rampup import BatchSizes

FREE = (
    "train.workdir", "train.num_steps", "train.log_every", "train.eval_every", "train.eval_batches",
    "train.checkpoint_every", "train.keep_checkpoints", "train.keep_best", "train.allow_changes", "train.preset",
    "train.remat", "train.microbatches", "train.schedule", "train.virtual_stages", "train.profile_steps",
    "train.module_norms", "train.stop_on_nonfinite", "train.skip_nonfinite", "train.wandb", "mesh.", "rules.",
    "data.cache_dir", "data.processes",
)  # fmt: skip
"""Settings that a run may change when it goes on: where and how it computes, not what."""


FIXED = ("train.freeze", "train.tune", "lora.")
"""Settings that shape the state: not even `train.allow_changes` lets a run go on with others."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapters:
    """Low-rank adapters beside kernels, each set in gin as `lora.<name>`: all else is frozen, but a new head.

    Attributes:
        rank: of every adapter; the setting that turns them on.
        alpha: an adapter's part is scaled by alpha / rank.
        targets: regular expressions of the kernels to adapt, such as ".*/mlp/.*" for every kernel of an MLP.
        dropout: probability of dropping an element of what an adapter reads.
        also: regular expressions of parameters that train beside the adapters; None is a head that is no language
            model's, as that of a classifier.
    """

    rank: int
    alpha: float = 16.0
    targets: str | tuple[str, ...] = ".*attention/(query|value)/kernel"
    dropout: float = 0.0
    also: str | tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The settings of one run, each set in gin as `train.<name>`.

    Attributes:
        workdir: folder of the run: checkpoints, metrics, plot.
        num_steps: steps to train, counted from the start of the run.
        global_batch_size: B, sequences in a step over all devices.
        sequence_length: T, tokens in a sequence.
        model_class: such as "GPTJForCausalLM"; its config's fields are set by family, as `GPTJ.n_layer = 6`.
        optimizer: such as @adamw().
        preset: the config that the family's fields start from, such as "gpt-j-6b"; None is their defaults.
        init_from: a Hugging Face folder or another run, whose config, tokenizer and parameters to start from.
        freeze: regular expressions of parameters that do not train, such as "trunk/layers/.*".
        tune: regular expressions of the only ones that do, such as ".*/bias"; () is all.
        seed: of the parameters, the order of the data and dropout.
        accumulate: parts of the batch that are computed one after another to save memory.
        batch_rampup: (start, increment, samples): begin with batches of `start` sequences and grow them by `increment`
            over the first `samples` sequences; each size is compiled once.
        label_smoothing: share of every class label that is spread over all classes.
        z_loss: factor of the squared log of the softmax's denominator, such as 1e-4; its own figure in the metrics.
        ema: decay of a moving average of what trains, such as 0.999, which evaluation and inference take.
        dtype: what the step computes in; parameters and optimizer state stay float32.
        loss_scale: what float16 multiplies the loss by at first; halved where gradients overflow.
        loss_scale_growth: good steps in a row after which the scale doubles.
        quantize: what products with kernels are computed in; needs the package qwix.
        remat: what the backward pass recomputes to save memory: nothing, all but the products with kernels, or all.
        microbatches: of the pipeline; None is a number that fills the stages.
        schedule: of the pipeline.
        virtual_stages: pieces of the model that a stage holds; None is 2 for the interleaved schedule, else 1.
        log_every: steps between two lines of metrics.
        eval_every: steps between two evaluations on held-out text; None is only at the end.
        eval_batches: batches of an evaluation at most; None is all held-out text.
        checkpoint_every: steps between two checkpoints; the last step is always saved.
        keep_checkpoints: how many of the newest stay.
        keep_best: a value of the evaluation, such as "loss" or "f1": the checkpoint with the best one stays too.
        skip_nonfinite: so many steps in a row whose loss or gradient is no number are skipped, and counted.
        stop_on_nonfinite: at such a step that is not skipped, stop with the state before it.
        module_norms: log the gradient's norm of each module too.
        profile_steps: (first, last): steps to trace with jax.profiler, into WORKDIR/profile.
        wandb: a project of Weights & Biases to report to as well; needs the package wandb.
        allow_changes: go on from a checkpoint of other settings (never of another model).
    """

    workdir: str
    num_steps: int
    global_batch_size: int
    sequence_length: int
    model_class: str
    optimizer: Any
    preset: str | None = None
    init_from: str | None = None
    freeze: str | tuple[str, ...] = ()
    tune: str | tuple[str, ...] = ()
    seed: int = 0
    accumulate: int = 1
    batch_rampup: tuple[int, int, int] | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    ema: float | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    loss_scale: float = 65536.0
    loss_scale_growth: int = 2000
    quantize: Literal["int8", "fp8"] | None = None
    remat: Literal["none", "dots", "full"] = "none"
    microbatches: int | None = None
    schedule: Literal["1f1b", "gpipe", "interleaved"] = "1f1b"
    virtual_stages: int | None = None
    log_every: int = 10
    eval_every: int | None = None
    eval_batches: int | None = 50
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3
    keep_best: str | None = None
    skip_nonfinite: int = 0
    stop_on_nonfinite: bool = True
    module_norms: bool = True
    profile_steps: tuple[int, int] | None = None
    wandb: str | None = None
    allow_changes: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name in ("seed", "skip_nonfinite") else 1
            if isinstance(value, int) and not isinstance(value, bool) and value < least:
                raise ValueError(f"train.{field.name} = {value}: it is at least {least}")
        if self.profile_steps is not None and not 1 <= self.profile_steps[0] <= self.profile_steps[1]:
            raise ValueError(
                f"train.profile_steps = {self.profile_steps}: it is (first, last), counted from 1"
            )
        if self.seed >= 2**32:
            raise ValueError(f"train.seed = {self.seed}: it is below 2**32")
        for level in self.batch_sizes.levels:
            if level.size % self.accumulate:
                raise ValueError(
                    f"train.global_batch_size = {level.size}: accumulate = {self.accumulate} does not divide it"
                )
        for name, value, holds in (
            ("label_smoothing", self.label_smoothing, 0 <= self.label_smoothing < 1),
            ("z_loss", self.z_loss, self.z_loss >= 0),
            ("ema", self.ema, self.ema is None or 0 < self.ema < 1),
            ("loss_scale", self.loss_scale, self.loss_scale >= 1),
        ):
            if not holds:
                raise ValueError(f"train.{name} = {value!r} is out of range")

    @property
    def batch_sizes(self) -> BatchSizes:
        """The rows of every step's batch.

        Raises:
            ValueError: `batch_rampup` does not lead to `global_batch_size`.
        """
        return BatchSizes(self.global_batch_size, self.batch_rampup)
