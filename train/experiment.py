"""What the gin files of a run describe, checked: its settings, and the model, mesh and optimizer they build.

Only entry points use this module. Everything here is quick and allocates no arrays; what a user can get wrong
is found here, before text is tokenised or a step compiled.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from train.data.tokens import prepare_tokens
from train.gin_files import Settings
from train.gin_names import Name

if TYPE_CHECKING:
    import optax

    import parallel
    from modelzoo import Model

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
"""Where the shipped gin files are: `include 'quickstart.gin'` finds them from anywhere."""

FREE = (
    "train.workdir", "train.num_steps", "train.log_every", "train.eval_every", "train.eval_batches",
    "train.checkpoint_every", "train.keep_checkpoints", "train.allow_changes", "train.preset", "train.remat",
    "train.microbatches", "train.schedule", "train.virtual_stages", "mesh.", "rules.", "data.cache_dir",
)  # fmt: skip
"""Settings that a run may change when it goes on: where and how it computes, not what."""


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
        seed: of the parameters, the order of the data and dropout.
        accumulate: parts of the batch that are computed one after another to save memory.
        dtype: what the step computes in; parameters and optimizer state stay float32.
        remat: what the backward pass recomputes to save memory.
        microbatches: of the pipeline; None is a number that fills the stages.
        schedule: of the pipeline: '1f1b', 'gpipe' or 'interleaved'.
        virtual_stages: pieces of the model that a stage holds; None is 2 for the interleaved schedule, else 1.
        log_every: steps between two lines of metrics.
        eval_every: steps between two evaluations on held-out text; None is only at the end.
        eval_batches: batches of an evaluation at most; None is all held-out text.
        checkpoint_every: steps between two checkpoints; the last step is always saved.
        keep_checkpoints: how many of the newest stay.
        allow_changes: go on from a checkpoint of other settings (never of another model).
    """

    workdir: str
    num_steps: int
    global_batch_size: int
    sequence_length: int
    model_class: str
    optimizer: Any
    preset: str | None = None
    seed: int = 0
    accumulate: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: str = "none"
    microbatches: int | None = None
    schedule: str = "1f1b"
    virtual_stages: int | None = None
    log_every: int = 10
    eval_every: int | None = None
    eval_batches: int | None = 50
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3
    allow_changes: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "seed" else 1
            if isinstance(value, int) and not isinstance(value, bool) and value < least:
                raise ValueError(f"train.{field.name} = {value}: it is at least {least}")
        if self.seed >= 2**32:
            raise ValueError(f"train.seed = {self.seed}: it is below 2**32")
        if self.global_batch_size % self.accumulate:
            raise ValueError(
                f"train.global_batch_size = {self.global_batch_size}: accumulate = {self.accumulate} does "
                "not divide it"
            )


class Experiment:
    """A run as its gin files describe it.

    Args:
        gin_files: read in order; a later binding wins.
        gin_params: "name.parameter=value" each; they win over the files.

    Attributes:
        run: the settings called `train.*`.
        data: keyword arguments of `train.data.prepare_tokens`.
        config: the model's config.
        settings: every binding, with its file and line.

    Raises:
        ValueError: a binding that is unknown, missing or does not fit; the first line names it.
        OSError: a gin file is not there.
    """

    def __init__(self, gin_files: Sequence[str] = (), gin_params: Sequence[str] = ()):
        linked = {"num_steps": "train.num_steps"}
        self.settings = Settings(run_names(), gin_files, gin_params, [CONFIGS], linked)
        for name in ("train", "data"):
            self.settings.require(name)
        try:
            self.run = Run(**self.settings.bound("train"))
            self.config = self._build_config()
        except ValueError as error:
            raise self.settings.located(error) from None
        self.data = self.settings.bound("data")
        self._check_lengths()

    @functools.cached_property
    def family(self) -> str:
        """The gin name of the model's config, such as "GPTJ"."""
        import modelzoo

        model_class = modelzoo.get_model_class(self.run.model_class)
        return next(name for name, family in _families().items() if model_class in family.classes)

    @functools.cached_property
    def model(self) -> "Model":
        """The model, nothing allocated."""
        import jax.numpy as jnp

        import modelzoo

        model_class = modelzoo.get_model_class(self.run.model_class)
        return model_class(self.config, dtype=jnp.dtype(self.run.dtype), remat=self.run.remat)

    @property
    def optimizer(self) -> "optax.GradientTransformation":
        """The optimizer."""
        return self.run.optimizer

    @property
    def learning_rate(self) -> Any:
        """The optimizer's learning rate or schedule, to report it; None where it has none to set."""
        (name,) = self.settings.used(["train"])[1:2] or ("train",)
        return self.settings.bound(name).get(
            "learning_rate", self.settings.names[name].defaults.get("learning_rate")
        )

    def make_rules(self, devices: Sequence[Any] | None = None) -> "parallel.Rules":
        """The mesh and its rules, checked against the model and the batch.

        Args:
            devices: None takes all there are.

        Raises:
            ValueError: the mesh does not fit the devices, the model or the batch.
        """
        import parallel

        mesh = parallel.make_mesh(**self.settings.bound("mesh"), devices=devices)
        rules = parallel.make_rules(mesh, **self.settings.bound("rules"))
        parallel.param_shardings(
            self.model, rules
        )  # heads, widths and layers divide, and nothing large is replicated
        shards = rules.num_shards("act_batch")
        if (self.run.global_batch_size // self.run.accumulate) % shards:
            parts = f" / accumulate = {self.run.accumulate}" if self.run.accumulate > 1 else ""
            raise ValueError(
                f"train.global_batch_size = {self.run.global_batch_size}{parts} does not divide over the "
                f"{shards} devices that share the batch (mesh data x fsdp)"
            )
        return rules

    @functools.cached_property
    def flat(self) -> dict[str, str]:
        """Every setting that the run uses, defaults and presets filled in: {"name.parameter": gin value}."""
        from parallel.rules import DEFAULT

        fields = {field.name: getattr(self.config, field.name) for field in dataclasses.fields(self.config)}
        return self.settings.flat(self._names, {self.family: fields, "rules": DEFAULT})

    @property
    def text(self) -> str:
        """`flat` as a gin file, which describes the same run."""
        return "".join(f"{key} = {value}\n" for key, value in self.flat.items())

    def unused(self) -> list[str]:
        """Bindings that have no effect on this run, such as those of an optimizer that it does not use."""
        used = self.settings.used(self._names)
        keys = [key for key in self.settings.bindings if key not in self.settings.linked]
        return [f"{key}{self.settings.where(key)}" for key in keys if key.split(".")[0] not in used]

    @property
    def _names(self) -> list[str]:
        return ["train", self.family, "data", "mesh", "rules"]

    def check_workdir(self) -> None:
        """Checks that the run's folder can be written.

        Raises:
            OSError: it cannot.
        """
        workdir = Path(self.run.workdir)
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=workdir):
                pass
        except OSError as error:
            where = self.settings.where("train.workdir")
            raise OSError(
                f"train.workdir = {self.run.workdir!r}{where}: cannot write there: {error.strerror}"
            ) from None

    def check_resume(self, checkpoint: Path) -> None:
        """Checks that a checkpoint of the run's folder is of this run.

        Args:
            checkpoint: its folder.

        Raises:
            ValueError: it is of another model, or of other settings and `train.allow_changes` is off; all
                differences are listed.
        """
        file = checkpoint / "config.gin"
        if not file.is_file():
            return
        lines = (line.partition(" = ") for line in file.read_text().splitlines() if not line.startswith("#"))
        saved = {key: value for key, _, value in lines if key}
        changed = [
            key
            for key in {**saved, **self.flat}
            if saved.get(key) != self.flat.get(key) and not _is_free(key)
        ]
        model = [key for key in changed if key == "train.model_class" or key.startswith(f"{self.family}.")]
        if "train.model_class" in model:
            model = ["train.model_class"]
        blocking = model or ([] if self.run.allow_changes else changed)
        if blocking:
            listed = "; ".join(f"{key} was {saved.get(key)}, is {self.flat.get(key)}" for key in blocking)
            kind = "model" if model else "settings"
            mend = "" if model else ', or go on with them by --gin_param="train.allow_changes=True"'
            raise ValueError(f"{checkpoint} is of other {kind}: {listed}; choose another train.workdir{mend}")

    def _build_config(self) -> Any:
        import modelzoo

        model_class = modelzoo.get_model_class(self.run.model_class)
        if model_class.task != "causal_lm":
            raise ValueError(
                f"train.model_class = {self.run.model_class!r}: plain text trains a language model, such as "
                f"{self.run.model_class.partition('For')[0]}ForCausalLM"
            )
        fields, family = self.settings.bound(self.family), _families()[self.family]
        if self.run.preset is None:
            return family.config_class(**fields)
        if self.run.preset not in family.presets:
            modelzoo.get_config(self.run.preset)  # names the presets if there is none of the name at all
            raise ValueError(
                f"train.preset = {self.run.preset!r}: not a {self.family}; "
                f"{self.run.model_class} takes {', '.join(sorted(family.presets))}"
            )
        return modelzoo.get_config(self.run.preset, **fields)

    def _check_lengths(self) -> None:
        limit = self.config.max_positions
        where = self.settings.where("train.sequence_length")
        if limit is not None and self.run.sequence_length > limit:
            raise ValueError(
                f"train.sequence_length = {self.run.sequence_length}{where} is past the {limit} positions "
                "of the model"
            )


TRAIN = Name(Run, hints={"optimizer": "an optimizer"})
DATA = Name(prepare_tokens, hidden=frozenset({"model_vocab_size"}))


def run_names() -> dict[str, Name]:
    """Everything that gin can set in a run."""
    import optax  # here, not above: `--help` reads this file and should answer at once

    import parallel
    from parallel.rules import DEFAULT

    axes = dict.fromkeys(DEFAULT, str | tuple[str, ...] | None)
    return {
        "train": Name(Run, hints={"optimizer": optax.GradientTransformation}),
        "data": DATA,
        "mesh": Name(parallel.make_mesh, hidden=frozenset({"devices"})),
        "rules": Name(parallel.make_rules, hidden=frozenset({"mesh"}), hints=axes),
        **{name: Name(family.config_class) for name, family in _families().items()},
        **_optimizers(),
    }


def _optimizers() -> dict[str, Name]:
    """The functions of `train.optim` that make an optimizer or a schedule."""
    import optax

    from train import optim

    names = {}
    for name in optim.__all__:
        entry = Name(getattr(optim, name), hidden=frozenset({"mask"}))
        if entry.result in (optax.GradientTransformation, optax.Schedule):
            names[name] = entry
    return names


def _families() -> dict[str, Any]:
    """{"GPTJ": its family, ...}."""
    from modelzoo.registry import FAMILIES

    return {family.config_class.__name__.removesuffix("Config"): family for family in FAMILIES.values()}


def _is_free(key: str) -> bool:
    return key.startswith(FREE) or key.endswith(".num_steps")
