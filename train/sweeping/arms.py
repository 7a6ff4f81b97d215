"""What a study varies: parsed, combined into arms, named, and each arm's experiment built before anything runs.

Nothing is allocated, and no device is asked for: the runs need them.
"""

import functools
import hashlib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.experiment import CONFIGS, Experiment, run_names
from train.gin_files import Settings, parse_values
from train.run_settings import FREE
from train.sweeping.study import Arm, Study
from train.sweeping.sweep_settings import Sweep

BASE = "base"
RESERVED = ("train.workdir", "train.seed", "sweep.")
LONGEST = 100
"""Characters of an arm's folder."""


def read_settings(
    gin_files: Sequence[str], gin_params: Sequence[str], given: Mapping[str, Any]
) -> tuple[Sweep, Path]:
    """The settings of a study and its folder.

    Args:
        gin_files, gin_params: the base, with `sweep.*` if it is a study's file.
        given: settings of the command line, which win; None is not given.

    Raises:
        ValueError: a setting that is unknown or does not fit.
        OSError: a gin file is not there.
    """
    settings = Settings(run_names(), gin_files, gin_params, [CONFIGS], {"num_steps": "train.num_steps"})
    given = {name: value for name, value in given.items() if value is not None}
    bound = settings.bound("sweep")
    for one, other in (("paired", "alone"), ("alone", "paired")):
        if given.get(one):
            bound.pop(other, None)
    try:
        sweep = Sweep(**bound | given)
    except ValueError as error:
        raise settings.located(error) from None
    stem = Path(gin_files[-1]).stem if gin_files else "study"
    return sweep, Path(sweep.workdir or f"runs/sweeps/{stem}")


def make_study(
    sweep: Sweep, folder: Path, gin_files: Sequence[str], gin_params: Sequence[str], command: str
) -> Study:
    """Builds every arm of a study.

    Args:
        sweep: its settings.
        folder: of the study.
        gin_files, gin_params: the base.
        command: that starts it, to be kept.

    Raises:
        ValueError: a setting is unknown or does not fit, arms that are equal or do not pair, no such baseline, a metric
            of an evaluation that the runs do not make.
        OSError: a file is not there.
    """
    names = run_names()
    varied = [parse_values(text, names) for text in sweep.vary]
    _check_varied(varied)
    build = functools.partial(_build, gin_files, gin_params)
    try:
        base = build({})
    except ValueError:  # it may need what is varied; what else is wrong with it shows in every arm
        if not varied or sweep.alone:
            raise
        base = None
    combined = _combine(varied, sweep, base.flat if base else {})
    show = _namer([key for key, _ in varied])
    arms: list[Arm] = []
    seeds: tuple[int, ...] = ()
    own: str | None = None
    for settings in combined:
        name = ", ".join(show(key, value) for key, value in settings.items()) or BASE
        try:
            experiment = build(settings)
            arm = _arm(name, settings, experiment, sweep.metric)
        except ValueError as error:
            raise ValueError(f"arm {name}: {str(error).splitlines()[0]}") from None
        if same := next((other for other in arms if other.config == arm.config), None):
            raise ValueError(f"arms {same.name} and {name} are the same run: leave one of them out")
        arms.append(arm)
        seeds = seeds or sweep.seeds_from(experiment.run.seed)
        if base is not None and all(base.flat.get(key) == experiment.flat.get(key) for key in settings):
            own = own or name
    baseline = _baseline(sweep.baseline, arms, own)
    found = (folder, tuple(arms), seeds, baseline, sweep.metric, tuple(gin_files), tuple(gin_params), command)
    return Study(*found)


def check_earlier(study: Study, earlier: Study | None) -> None:
    """Checks that what lies in a study's folder is of the same settings; arms and seeds may be added.

    Args:
        study: as it is asked for now.
        earlier: as it was; None if there is none.

    Raises:
        ValueError: runs of an arm were started with other settings.
    """
    before = {arm.name: arm for arm in earlier.arms} if earlier else {}
    for arm in study.arms:
        old = before.get(arm.name)
        if old is None or not any((study.folder / old.folder).glob("seed-*/run.json")):
            continue
        known = {key.partition(".")[0] for key in old.config}
        # A field that is newer than the runs has the default that they were made with; a name is new altogether.
        keys = [
            k for k in {**old.config, **arm.config} if k in old.config or k.partition(".")[0] not in known
        ]
        changed = [k for k in keys if old.config.get(k) != arm.config.get(k) and not k.startswith(FREE)]
        if changed:
            listed = "; ".join(f"{k} was {old.config.get(k)}, is {arm.config.get(k)}" for k in changed[:4])
            raise ValueError(
                f"{study.folder} holds runs of arm {arm.name} with other settings: {listed}; choose another --workdir"
            )


def _check_varied(varied: Sequence[tuple[str, Sequence[str]]]) -> None:
    keys = [key for key, _ in varied]
    for key, values in varied:
        if key.startswith(RESERVED):
            mend = "--seeds varies it" if key == "train.seed" else "a study sets it itself"
            raise ValueError(f'--vary "{key}=...": {mend}')
        if keys.count(key) > 1:
            raise ValueError(f"--vary names {key} twice: give all its values in one")
        if twice := next((value for value in values if values.count(value) > 1), None):
            raise ValueError(f'--vary "{key}=...": {twice} is there twice')


def _combine(
    varied: Sequence[tuple[str, Sequence[str]]], sweep: Sweep, base: Mapping[str, str]
) -> list[dict[str, str]]:
    """The settings of every arm."""
    keys = [key for key, _ in varied]
    if sweep.alone:
        return [{}] + [{key: value} for key, values in varied for value in values if base.get(key) != value]
    if sweep.paired:
        lengths = {key: len(values) for key, values in varied}
        if len(set(lengths.values())) > 1:
            counts = ", ".join(f"{key} has {count}" for key, count in lengths.items())
            raise ValueError(f"--paired takes as many values of each setting: {counts}")
        rows = zip(*(values for _, values in varied), strict=True) if varied else [()]
    else:
        rows = itertools.product(*(values for _, values in varied))
    return [dict(zip(keys, row, strict=True)) for row in rows]


def _build(gin_files: Sequence[str], gin_params: Sequence[str], settings: Mapping[str, str]) -> Experiment:
    return Experiment(gin_files, [*gin_params, "train.workdir='.'", *as_params(settings)])


def as_params(settings: Mapping[str, str]) -> list[str]:
    """Settings as `python -m train --gin_param` takes them."""
    return [f"{key}={value}" for key, value in settings.items()]


def _arm(name: str, settings: Mapping[str, str], experiment: Experiment, metric: str) -> Arm:
    import modelzoo
    from train.state import abstract_state

    run = experiment.run
    _check_mesh(experiment)
    abstract_state(experiment.model, experiment.optimizer, options=experiment.options)
    if metric.startswith("eval_") and experiment.task is None:
        _check_held_out(experiment, metric)
    config = {k: v for k, v in experiment.flat.items() if k not in ("train.workdir", "train.seed")}
    return Arm(
        name=name,
        folder=_folder(name, settings),
        settings=dict(settings),
        config=config,
        parameters=modelzoo.num_params(experiment.model),
        num_steps=run.num_steps,
        batch=(run.global_batch_size, run.batch_rampup, run.sequence_length),
    )


def _check_mesh(experiment: Experiment) -> None:
    """Checks the mesh against model and batch as far as it is known without the devices: -1 is taken for 1."""
    from jax.sharding import AbstractMesh, AxisType

    import parallel
    from parallel.mesh import mesh_sizes

    given = experiment.settings.bound("mesh")
    sizes = {axis: max(given.get(axis, 1), 1) for axis in parallel.MESH_AXES}
    sizes = mesh_sizes(sizes, math.prod(sizes.values()))
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    experiment.make_rules(mesh=mesh)


def _check_held_out(experiment: Experiment, metric: str) -> None:
    from train.data.tokens import is_prepared

    settings = experiment.settings
    path = settings.value("data.path")
    if settings.value("data.validation_fraction") == 0 and not (isinstance(path, str) and is_prepared(path)):
        raise ValueError(
            f"data.validation_fraction = 0{settings.where('data.validation_fraction')}: nothing is held out, so runs "
            f"have no {metric}: hold some out, or compare another value, as --metric loss"
        )


def _namer(keys: Sequence[str]) -> Any:
    """How a setting is shown: by its parameter alone, where no other has that name."""
    short = [key.partition(".")[2] for key in keys]

    def show(key: str, value: str) -> str:
        name = key.partition(".")[2]
        plain = value.strip("'\"") if re.fullmatch(r"'[^']*'|\"[^\"]*\"", value) else value
        plain = re.sub(r"@([\w.]+)\(\)", r"\1", plain)
        return f"{name if short.count(name) == 1 else key}={plain}"

    return show


def _folder(name: str, settings: Mapping[str, str]) -> str:
    """An arm's name as a folder's: what shells and file systems take. Where that loses something, a hash is added."""
    plain = re.sub(r"[^\w.=,+-]+", "-", name.replace(", ", ",")).strip("-.")[:LONGEST]
    if plain != name.replace(", ", ","):
        plain += "-" + hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()[:6]
    return plain


def _baseline(asked: str | None, arms: Sequence[Arm], own: str | None) -> str:
    names = [arm.name for arm in arms]
    if asked is None:
        return own or names[0]
    squeezed = {name.replace(" ", ""): name for name in [*(arm.folder for arm in arms), *names]}
    found = {arm.folder: arm.name for arm in arms} | {name: name for name in names}
    key = squeezed.get(asked.replace(" ", ""))
    if key is None:
        raise ValueError(f"--baseline {asked!r}: the arms are {'; '.join(names)}")
    return found[key]
