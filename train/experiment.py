"""What the gin files of a run describe, checked: its settings, and the model, mesh and optimizer they build.

Only entry points use this module. Everything here is quick and allocates no arrays; what a user can get wrong
is found here, before text is tokenised or a step compiled.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.data.tokens import prepare_tokens
from train.gin_files import Settings
from train.gin_names import Name
from train.objectives.corruption import LEFT_TO_RIGHT, TEXT_TASKS, Objective
from train.run_settings import FIXED, FREE, Adapters, Run
from train.sweeping.sweep_settings import Sweep
from train.tasks.settings import Task

if TYPE_CHECKING:
    import optax

    import parallel
    from modelzoo import Model
    from train.guard import StateOptions
    from train.starting import Start
    from train.tasks.examples import Example

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
"""Where the shipped gin files are: `include 'quickstart.gin'` finds them from anywhere."""


class Experiment:
    """A run as its gin files describe it.

    Args:
        gin_files: read in order; a later binding wins.
        gin_params: "name.parameter=value" each; they win over the files.

    Attributes:
        run: the settings called `train.*`.
        task: those called `task.*`, of a run on labelled examples; None of one on plain text.
        objective: those called `objective.*`: how text is corrupted for models that read it both ways.
        data: keyword arguments of `train.data.prepare_tokens`.
        lora: those called `lora.*`, of a run that trains adapters; else None.
        config: the model's config.
        settings: every binding, with its file and line.

    Raises:
        ValueError: a binding that is unknown, missing or does not fit; the first line names it.
        OSError: a gin file is not there.
    """

    def __init__(self, gin_files: Sequence[str] = (), gin_params: Sequence[str] = ()):
        linked = {"num_steps": "train.num_steps"}
        self.settings = Settings(run_names(), gin_files, gin_params, [CONFIGS], linked)
        has_task = any(key.startswith("task.") for key in self.settings.bindings)
        adapts = any(key.startswith("lora.") for key in self.settings.bindings)
        for name in ("train", "task" if has_task else "data", *["lora"] * adapts):
            self.settings.require(name)
        if not has_task and not {"data.path", "data.mixture"} & self.settings.bindings.keys():
            raise ValueError(
                'data.path is not set: add it to the gin file or pass --gin_param="data.path=..."; data.mixture takes '
                "several"
            )
        try:
            self.run = Run(**self.settings.bound("train"))
            self.task = Task(**self.settings.bound("task")) if has_task else None
            self.objective = Objective(**self.settings.bound("objective"))
            self.config = self._build_config()
            self.lora = Adapters(**self.settings.bound("lora")) if adapts else None
            if self.lora or self.run.freeze or self.run.tune:
                _ = self.model  # made here, since what it trains may be wrong
        except ValueError as error:
            raise self.settings.located(error) from None
        self.data = self.settings.bound("data")
        self._check_lengths()

    @functools.cached_property
    def family(self) -> str:
        """The gin name of the model's config, such as "GPTJ"."""
        from modelzoo import registry

        family = registry.family_of(registry.get_model_class(self.run.model_class))
        assert family is not None
        return family.prefix

    @functools.cached_property
    def model(self) -> "Model":
        """The model, nothing allocated."""
        import jax.numpy as jnp

        import modelzoo

        model_class = modelzoo.get_model_class(self.run.model_class)
        model = model_class(self.config, dtype=jnp.dtype(self.run.dtype), remat=self.run.remat)
        try:
            lora = None if self.lora is None else modelzoo.Lora(**dataclasses.asdict(self.lora))
            tuning = modelzoo.Tuning(freeze=self.run.freeze, tune=self.run.tune, lora=lora)
            return model if tuning == modelzoo.Tuning() else modelzoo.tuned(model, tuning)
        except ValueError as error:
            raise ValueError(str(error).replace("Tuning.", "train.", 1)) from None

    @property
    def optimizer(self) -> "optax.GradientTransformation":
        """The optimizer."""
        return self.run.optimizer

    @property
    def options(self) -> "StateOptions":
        """What the run's state holds beside parameters and the optimizer's state."""
        from train.guard import StateOptions

        run = self.run
        return StateOptions(
            ema=run.ema,
            skip_nonfinite=run.skip_nonfinite,
            loss_scale=run.loss_scale if run.dtype == "float16" else None,
            loss_scale_growth=run.loss_scale_growth,
        )

    @property
    def learning_rate(self) -> Any:
        """The optimizer's learning rate or schedule, to report it; None where it has none to set."""
        (name,) = self.settings.used(["train"])[1:2] or ("train",)
        return self.settings.bound(name).get(
            "learning_rate", self.settings.names[name].defaults.get("learning_rate")
        )

    def make_rules(self, devices: Sequence[Any] | None = None, mesh: Any = None) -> "parallel.Rules":
        """The mesh and its rules, checked against the model and the batch.

        Args:
            devices: None takes all there are.
            mesh: in place of that of the settings, such as an abstract one of devices that are not here.

        Raises:
            ValueError: the mesh does not fit the devices, the model or the batch.
        """
        import parallel

        mesh = mesh or parallel.make_mesh(**self.settings.bound("mesh"), devices=devices)
        rules = parallel.make_rules(mesh, **self.settings.bound("rules"))
        parallel.param_shardings(
            self.model, rules
        )  # heads, widths and layers divide, and nothing large is replicated
        shards = rules.num_shards("act_batch")
        for level in self.run.batch_sizes.levels:
            if (level.size // self.run.accumulate) % shards:
                parts = f" / accumulate = {self.run.accumulate}" if self.run.accumulate > 1 else ""
                parts += " of train.batch_rampup" if level.size != self.run.global_batch_size else ""
                raise ValueError(
                    f"train.global_batch_size = {level.size}{parts} does not divide over the "
                    f"{shards} devices that share the batch (mesh data x fsdp)"
                )
        return rules

    def make_step(self, rules: "parallel.Rules") -> Any:
        """The training step on a mesh, not compiled yet."""
        from train.step import make_train_step

        run = self.run
        return make_train_step(
            self.model,
            self.optimizer,
            rules=rules,
            microbatches=run.microbatches,
            schedule=run.schedule,
            virtual_stages=run.virtual_stages,
            accumulate=run.accumulate,
            learning_rate=self.learning_rate,
            module_norms=run.module_norms,
            halt_on_nonfinite=run.stop_on_nonfinite,
            options=self.options,
            label_smoothing=run.label_smoothing,
            z_loss=run.z_loss,
            quantize=run.quantize,
        )

    def shard(self, rules: "parallel.Rules") -> tuple[int, int]:
        """(index, count): which part of each global batch this process reads."""
        import parallel
        from train.data.batches import batch_shard

        return batch_shard(parallel.batch_sharding(rules), self.run.global_batch_size)

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
        used = self.settings.used([*self._names, "sweep"])
        keys = [key for key in self.settings.bindings if key not in self.settings.linked]
        return [f"{key}{self.settings.where(key)}" for key in keys if key.split(".")[0] not in used]

    @property
    def _names(self) -> list[str]:
        source = ["task"]
        if self.task is None:
            source = ["data"] if self.model.task == LEFT_TO_RIGHT else ["data", "objective"]
        adapters = [] if self.lora is None else ["lora"]
        return ["train", self.family, *source, *adapters, "mesh", "rules"]

    def check_workdir(self) -> None:
        """Checks that the run's folder can be written, or made where there is none yet.

        Raises:
            OSError: it cannot.
        """
        folder = Path(self.run.workdir).absolute()
        folder = next(place for place in (folder, *folder.parents) if place.exists())
        try:
            with tempfile.TemporaryFile(dir=folder):
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
        for key in self.flat.keys() - saved.keys():  # a setting that is newer than the checkpoint
            name, parameter = key.split(".")
            if name == "train":
                saved[key] = repr(self.settings.names[name].defaults[parameter])
        changed = [
            key
            for key in {**saved, **self.flat}
            if saved.get(key) != self.flat.get(key) and not _is_free(key)
        ]
        model = [key for key in changed if key.startswith(("train.model_class", f"{self.family}.", *FIXED))]
        if "train.model_class" in model:
            model = ["train.model_class"]
        blocking = model or ([] if self.run.allow_changes else changed)
        if blocking:
            listed = "; ".join(f"{key} was {saved.get(key)}, is {self.flat.get(key)}" for key in blocking)
            kind = "another model" if model else "other settings"
            mend = "" if model else ', or go on with them by --gin_param="train.allow_changes=True"'
            raise ValueError(f"{checkpoint} is of {kind}: {listed}; choose another train.workdir{mend}")

    @functools.cached_property
    def start(self) -> "Start | None":
        """The checkpoint that `train.init_from` names."""
        if self.run.init_from is None:
            return None
        from train.starting import open_start

        return open_start(self.run.init_from)

    @functools.cached_property
    def examples(self) -> tuple[list["Example"], list["Example"]]:
        """Labelled examples: those to train on, those to evaluate on."""
        from train.tasks.examples import hold_out, read_examples

        assert self.task is not None
        train = read_examples(self.task.train_file, self.task.columns)
        if self.task.eval_file is not None:
            held_out = read_examples(self.task.eval_file, self.task.columns, "task.eval_file")
        else:
            train, held_out = hold_out(train, self.task.eval_fraction)
        return train, held_out[: self.task.max_eval_examples]

    def _build_config(self) -> Any:
        import modelzoo

        model_class = modelzoo.get_model_class(self.run.model_class)
        fields, config = self.settings.bound(self.family), self._first_config()
        config = dataclasses.replace(config, **fields)
        if self.task is not None:
            from train.tasks.classes import with_classes

            return with_classes(config, model_class.task, self.examples[0], self.task.labels, fields)
        if model_class.task not in TEXT_TASKS:
            classes = _families()[self.family].classes
            fitting = next(cls.__name__ for cls in classes if cls.task in TEXT_TASKS)
            raise ValueError(
                f"train.model_class = {self.run.model_class!r}: plain text trains a language model, such as "
                f"{fitting}; task.train_file trains other heads"
            )
        return config

    def _first_config(self) -> Any:
        """What the family's fields are set in."""
        import modelzoo

        family = _families()[self.family]
        if self.start is not None:
            if self.run.preset is not None:
                raise ValueError(
                    f"train.preset = {self.run.preset!r}: train.init_from has a config of its own: set one of them"
                )
            return self.start.config(family.model_type)
        if self.run.preset is None:
            return family.config_class()
        if self.run.preset not in family.presets:
            modelzoo.get_config(self.run.preset)  # names the presets if there is none of the name at all
            raise ValueError(
                f"train.preset = {self.run.preset!r}: not a {self.family}; "
                f"{self.run.model_class} takes {', '.join(sorted(family.presets))}"
            )
        return modelzoo.get_config(self.run.preset)

    def _check_lengths(self) -> None:
        limit = self.config.max_positions
        where = self.settings.where("train.sequence_length")
        if limit is not None and self.run.sequence_length > limit:
            raise ValueError(
                f"train.sequence_length = {self.run.sequence_length}{where} is past the {limit} positions "
                "of the model"
            )


TRAIN = Name(Run, hints={"optimizer": "an optimizer"})
TASK = Name(Task)
OBJECTIVE = Name(Objective)
LORA = Name(Adapters)
SWEEP = Name(Sweep)
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
        "task": TASK,
        "objective": OBJECTIVE,
        "lora": LORA,
        "sweep": SWEEP,
        "mesh": Name(parallel.make_mesh, hidden=frozenset({"devices"})),
        "rules": Name(parallel.make_rules, hidden=frozenset({"mesh"}), hints=axes),
        **{name: Name(family.config_class) for name, family in _families().items()},
        **_optimizers(),
    }


def _optimizers() -> dict[str, Name]:
    """The functions that make an optimizer or a schedule."""
    from train import optim, optimizers, schedules

    return {
        name: Name(getattr(module, name), hidden=frozenset({"mask"}))
        for module in (optim, optimizers, schedules)
        for name in module.__all__
    }


def _families() -> dict[str, Any]:
    """{"GPTJ": its family, ...}."""
    from modelzoo.registry import FAMILIES

    return {family.prefix: family for family in FAMILIES.values()}


def _is_free(key: str) -> bool:
    return key.startswith(FREE) or key.endswith(".num_steps")
