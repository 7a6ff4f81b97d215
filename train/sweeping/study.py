"""A study on disk: its arms and runs, where they lie, and how far each is.

    STUDY/
        sweep.json               what was asked for: arms with their settings, seeds, metric, baseline
        ARM/seed-N/              a run: what `python -m train` writes, and
            command.sh           the command of the run, to start by hand
            log.txt              all that it printed, over all its starts
            run.json             how it stands: done, failed, stopped; exit code, last line of error, seconds
        compile-cache/           compiled programs, shared by the runs
        report.html  curves.png  arms.csv  runs.csv  report.md

Nothing here needs jax: a study is looked at while its runs hold the devices.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from train.data.rampup import BatchSizes
from train.tasks.scores import lower_is_better

PLAN, STATE, LOG, COMMAND = "sweep.json", "run.json", "log.txt", "command.sh"
WAITING, RUNNING, DONE, FAILED, STOPPED = "waiting", "running", "done", "failed", "stopped"


@dataclasses.dataclass(frozen=True)
class Arm:
    """One variant of an experiment.

    Attributes:
        name: readable, such as "rotary_dim=16, n_layer=2".
        folder: its name in the study's folder.
        settings: what it sets, {"name.parameter": gin text}.
        config: every setting that its runs use but folder and seed, defaults filled in.
        parameters: of the model.
        num_steps: of a run.
        batch: (rows, ramp-up or None, tokens in a row) of its steps.
    """

    name: str
    folder: str
    settings: Mapping[str, str]
    config: Mapping[str, str]
    parameters: int
    num_steps: int
    batch: Sequence[Any]

    def tokens(self, step: int) -> int:
        """Tokens in the steps so far, over all devices."""
        rows, rampup, length = self.batch
        return BatchSizes(rows, tuple(rampup) if rampup else None).before(step) * length  # type: ignore


@dataclasses.dataclass(frozen=True)
class Look:
    """How a run stands.

    Attributes:
        status: waiting, running, done, failed or stopped.
        step: steps taken.
        last: the last value of everything in metrics.jsonl.
        seconds: that its starts took together.
        error: of a failed run, its last line.
    """

    status: str
    step: int
    last: Mapping[str, float | None]
    seconds: float
    error: str


@dataclasses.dataclass(frozen=True)
class RunOf:
    """One run of a study: an arm and a seed."""

    arm: Arm
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        """Such as "rotary_dim=16 seed 0"."""
        return f"{self.arm.name} seed {self.seed}"

    def state(self) -> dict[str, Any]:
        """What run.json says; empty if the run was never started."""
        try:
            return json.loads((self.folder / STATE).read_text())
        except (OSError, ValueError):
            return {}

    def is_done(self) -> bool:
        """Whether it ended well, at the step that the arm has now."""
        state = self.state()
        return state.get("status") == DONE and state.get("num_steps") == self.arm.num_steps

    def lines(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; one that is being written is left out."""
        return list(_json_lines(self.folder / "metrics.jsonl"))

    def look(self) -> Look:
        """How it stands now."""
        state, last = self.state(), {}
        for line in self.lines():
            last |= line
        status = state.get("status", WAITING)
        if status == DONE and state["num_steps"] != self.arm.num_steps:
            status = WAITING
        if status == RUNNING and not is_locked(self.folder):
            status = STOPPED  # its machine or the study was cut off
        step = last.pop("step", 0)
        last.pop("time", None)
        return Look(status, step, last, _seconds(self.folder), state.get("error", ""))


@dataclasses.dataclass(frozen=True)
class Study:
    """Arms, each trained with several seeds.

    Attributes:
        folder: of the study.
        arms: in the order that they were asked for.
        seeds: of each arm.
        baseline: name of the arm that the others are compared with.
        metric: what is compared.
        gin_files, gin_params: the base.
        command: that started it.
    """

    folder: Path
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    baseline: str
    metric: str
    gin_files: tuple[str, ...]
    gin_params: tuple[str, ...]
    command: str

    @property
    def runs(self) -> list[RunOf]:
        """All runs, in the order that they are started: a seed of every arm, then the next."""
        return [
            RunOf(arm, seed, self.folder / arm.folder / f"seed-{seed}")
            for seed in self.seeds
            for arm in self.arms
        ]

    def runs_of(self, arm: Arm) -> list[RunOf]:
        """The runs of one arm, by seed."""
        return [run for run in self.runs if run.arm.name == arm.name]

    @property
    def higher_is_better(self) -> bool:
        """Of the metric."""
        return not lower_is_better(self.metric)

    def save(self) -> None:
        """Writes sweep.json."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields |= {"folder": None, "arms": [dataclasses.asdict(arm) for arm in self.arms]}
        write_whole(self.folder / PLAN, json.dumps(fields, indent=1) + "\n")


def open_study(folder: Path) -> Study:
    """Reads a study's sweep.json.

    Raises:
        OSError: there is none.
        ValueError: it cannot be read.
    """
    file = folder / PLAN
    if not file.is_file():
        raise OSError(f"{folder}: no study there ({PLAN} is missing): give --workdir, or the gin files")
    try:
        fields = json.loads(file.read_text())
        arms = tuple(Arm(**arm) for arm in fields.pop("arms"))
        known = {field.name for field in dataclasses.fields(Study)} - {"folder", "arms"}
        values: dict[str, Any] = {
            name: tuple(v) if isinstance(v := fields[name], list) else v for name in known
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: cannot be read: {error}; start the study again") from None
    return Study(folder=folder, arms=arms, **values)


def write_whole(file: Path, text: str | bytes) -> None:
    """Writes a file aside, then gives it its name: a reader sees the old one or the new one."""
    aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    aside.write_bytes(text.encode() if isinstance(text, str) else text)
    os.replace(aside, file)


def lock(folder: Path) -> int | None:
    """Takes a folder for this process and those that inherit the descriptor, until all of them are gone.

    Returns:
        The descriptor; None if another has the folder.
    """
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # some network file systems have no locks
        pass
    return descriptor


def is_locked(folder: Path) -> bool:
    """Whether a process has the folder."""
    if not (folder / ".lock").exists():
        return False
    descriptor = lock(folder)
    if descriptor is None:
        return True
    os.close(descriptor)
    return False


def _json_lines(file: Path) -> Iterator[dict[str, Any]]:
    try:
        text = file.read_text()
    except OSError:
        return
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def _seconds(folder: Path) -> float:
    """All starts of a run together, as its goodput.json has them."""
    try:
        sessions = json.loads((folder / "goodput.json").read_text())
    except (OSError, ValueError):
        return 0.0
    return sum(sum(session["seconds"].values()) for session in sessions)
