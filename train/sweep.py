"""`python -m train.sweep`: a study of several runs, from what is varied to a table with intervals and a picture.

gin files, --vary -> arms, each built before anything runs -> runs, each a process of its own -> report
"""

import dataclasses
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import tyro

from train.cli import user_errors
from train.gin_names import Name, describe
from train.sweeping.sweep_settings import Sweep

EXAMPLES = """\
Trains variants of one experiment with several seeds, each run in a process and a folder of its
own, and compares them: means with 95 % intervals, paired differences, curves with bands. Run the
same command again to go on: what is done is skipped, what was cut off goes on where it was.

examples:
  python -m train.sweep --gin_file=quickstart.gin --vary "GPTJ.rotary_dim=8,24,48" --seeds 3
  python -m train.sweep --gin_file=quickstart.gin --vary "GPTJ.n_layer=2,4" --vary "GPTJ.n_embd=256,192" \\
                        --paired --seeds 3 --dry_run
  python -m train.sweep --gin_file=studies/positions.gin --jobs 2
  python -m train.sweep --gin_file=studies/positions.gin --launcher ray --address auto --gpus_per_run 1
  python -m train.sweep --report --workdir runs/sweeps/positions

exit code: 0 all runs are done, 1 some are not, 2 bad input (before any run), 130 or 143 stopped by a signal.

settings of a study in a gin file, which flags of the same name win over:
"""
Repeated = tyro.conf.UseAppendAction


@dataclasses.dataclass(frozen=True)
class Flags:
    """The command line."""

    gin_file: Annotated[tuple[str, ...], Repeated, tyro.conf.arg(metavar="FILE")] = ()
    """The gin files of the base, as of python -m train."""
    gin_param: Annotated[tuple[str, ...], Repeated, tyro.conf.arg(metavar="NAME.PARAMETER=VALUE")] = ()
    """A setting of the base that wins over the files."""
    vary: Annotated[tuple[str, ...], Repeated, tyro.conf.arg(metavar="NAME.PARAMETER=VALUE,VALUE")] = ()
    """A setting and the values to try, as gin writes them: --vary "train.dtype='float32','bfloat16'"."""
    seeds: Annotated[str | None, tyro.conf.arg(metavar="N|SEED,SEED")] = None
    """How many seeds each arm gets, counted from train.seed; or the seeds themselves."""
    paired: bool = False
    """The first values of all that is varied are one arm, the second another, rather than all combinations."""
    alone: bool = False
    """Each value is an arm of its own beside the base, all else as in the base."""
    baseline: Annotated[str | None, tyro.conf.arg(metavar="ARM")] = None
    """The arm that the others are compared with; by default the one with the base's own values, else the first."""
    metric: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """What is compared, a value of metrics.jsonl at the last step; by default eval_loss."""
    workdir: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """The study's folder; by default runs/sweeps/ and the name of the gin file."""
    dry_run: bool = False
    """Build every arm and list arms and runs; start nothing."""
    report: bool = False
    """Start nothing; make the report of what is done."""
    launcher: Literal["local", "ray", "slurm"] = "local"
    """Where runs go: processes here, a Ray cluster, SLURM jobs (the last two need the extra `sweep`)."""
    jobs: int | None = None
    """Runs at a time; by default 1 here, and with Ray and SLURM as many as fit."""
    address: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT|auto")] = None
    """Of the Ray cluster; by default RAY_ADDRESS, else Ray is started on this machine."""
    cpus_per_run: float = 1
    """Of each run, with Ray and SLURM."""
    gpus_per_run: float = 0
    """Likewise."""
    slurm: Annotated[tuple[str, ...], Repeated, tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """An option of sbatch, such as partition=gpu or time=240 (minutes)."""


def main(args: Sequence[str] | None = None) -> None:
    """Reads the flags (those of the command line if `args` is None), runs the study and reports."""
    given = sys.argv[1:] if args is None else list(args)
    flags = tyro.cli(
        tyro.conf.configure(tyro.conf.OmitArgPrefixes)(Flags),
        prog="python -m train.sweep",
        args=given,
        description=EXAMPLES + "\n".join(f"  {line}" for line in describe("sweep", Name(Sweep))),
        use_underscores=True,
    )
    with user_errors():
        code = run_study(flags, shlex.join(["python", "-m", "train.sweep", *given]))
    if code:
        raise SystemExit(code)


def run_study(flags: Flags, command: str) -> int:
    """Runs a study as flags say.

    Args:
        flags: the command line.
        command: the same as text, to be kept.

    Returns:
        The exit code.

    Raises:
        ValueError, OSError: bad input, before any run.
    """
    from train.sweeping.board import say
    from train.sweeping.study import DONE, lock, open_study

    _check(flags)
    if flags.report and flags.workdir and not flags.gin_file:
        study = open_study(Path(flags.workdir))
        return finish(study)
    if not flags.gin_file:
        raise ValueError("nothing to study: give --gin_file, such as --gin_file=configs/quickstart.gin")
    study = read_study(flags, command)
    if flags.dry_run:
        return list_runs(study)
    if flags.report:
        return finish(study)
    study.folder.mkdir(parents=True, exist_ok=True)
    held = lock(study.folder)
    if held is None:
        raise OSError(f"{study.folder}: another start of this study is running")
    try:
        study.save()
        todo = [run for run in study.runs if not run.is_done()]
        skipped = len(study.runs) - len(todo)
        say(
            f"study: {len(study.arms)} arms x {len(study.seeds)} seeds = {len(study.runs)} runs, compared by "
            f"{study.metric} with {study.baseline}" + (f"; {skipped} done before" if skipped else "")
        )
        say(f"files: {study.folder}")
        stopped = launch(study, todo, flags) if todo else 0
    finally:
        os.close(held)
    finish(study)
    left = sum(run.look().status != DONE for run in study.runs)
    if left:
        word = "stopped" if stopped else "unfinished"
        say(f"{word}: {left} of {len(study.runs)} runs are left; run the same command again to go on")
    return stopped or int(left > 0)


def read_study(flags: Flags, command: str) -> Any:
    """The study that flags ask for: every arm is built, and what its folder holds is of the same settings.

    Raises:
        ValueError, OSError: bad input.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")  # the devices are for the runs
    from train.sweeping.arms import check_earlier, make_study, read_settings
    from train.sweeping.study import PLAN, open_study

    given = {
        "vary": list(flags.vary) or None,
        "seeds": _seeds(flags.seeds),
        "paired": flags.paired or None,
        "alone": flags.alone or None,
        "baseline": flags.baseline,
        "metric": flags.metric,
        "workdir": flags.workdir,
    }
    settings, folder = read_settings(flags.gin_file, flags.gin_param, given)
    study = make_study(settings, folder, flags.gin_file, flags.gin_param, command)
    check_earlier(study, open_study(folder) if (folder / PLAN).is_file() else None)
    return study


def launch(study: Any, todo: Sequence[Any], flags: Flags) -> int:
    """Runs what is to do.

    Returns:
        0, or the exit code of the signal that stopped it.
    """
    from train.sweeping.board import Board
    from train.sweeping.jobs import make_job
    from train.sweeping.running import Watch

    jobs = [make_job(study, run) for run in todo]
    Path(jobs[0].stop).unlink(missing_ok=True)
    with Stopping(Path(jobs[0].stop)) as stopping, Board(study, todo) as board:
        watch = Watch(board.tick, stopping.level, board.tell)
        if flags.launcher == "local":
            from train.sweeping.local import run_here

            run_here(jobs, min(flags.jobs or 1, len(jobs)), watch)
        elif flags.launcher == "ray":
            from train.sweeping.on_ray import run_on_ray

            resources = {"num_cpus": flags.cpus_per_run, "num_gpus": flags.gpus_per_run}
            run_on_ray(jobs, flags.jobs, flags.address, resources, watch)
        else:
            from train.sweeping.on_slurm import run_on_slurm

            options = {"cpus_per_task": int(flags.cpus_per_run), "gpus_per_node": int(flags.gpus_per_run)}
            folder = study.folder.resolve() / "slurm"
            run_on_slurm(jobs, flags.jobs, folder, options, flags.slurm, watch)
    Path(jobs[0].stop).unlink(missing_ok=True)
    return stopping.exit_code


class Stopping:
    """Ctrl-C or SIGTERM lets the runs save and stop; a second one ends them at once.

    Args:
        file: written at the first, for runs on other machines.

    Attributes:
        exit_code: 128 + the signal's number; 0 while there was none.
    """

    def __init__(self, file: Path):
        self._file, self._level, self.exit_code = file, 0, 0

    def __enter__(self) -> "Stopping":
        self._before = {
            number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def level(self) -> int:
        """How many signals came."""
        return self._level

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._level, self.exit_code = self._level + 1, 128 + number
        if self._level == 1:
            self._file.write_text("")
            sys.stderr.write("\nthe runs save and stop (again to end them at once)\n")


def list_runs(study: Any) -> int:
    """Prints arms and runs, and starts nothing."""
    from train.sweeping.board import say

    for arm in study.arms:
        mark = " (baseline)" if arm.name == study.baseline else ""
        say(
            f"arm {arm.name}{mark}: {arm.parameters:,} parameters, {arm.tokens(arm.num_steps):,} tokens a run"
        )
        for key, value in arm.settings.items():
            say(f"    {key} = {value}")
    for run in study.runs:
        look = run.look()
        say(f"run {run.name}: {look.status}, {run.folder}")
    say(f"{len(study.arms)} arms x {len(study.seeds)} seeds = {len(study.runs)} runs")
    return 0


def finish(study: Any) -> int:
    """Makes the report of what is done, prints it, and tells what failed.

    Returns:
        0 if nothing failed, else 1.
    """
    from train.sweeping.report import make_report

    return make_report(study)


def _check(flags: Flags) -> None:
    if flags.jobs is not None and flags.jobs < 1:
        raise ValueError(f"--jobs {flags.jobs}: it is at least 1")
    for name in ("cpus_per_run", "gpus_per_run"):
        value = getattr(flags, name)
        if value < 0 or (flags.launcher == "slurm" and value != int(value)):
            kind = "a whole number" if value >= 0 else "at least 0"
            raise ValueError(f"--{name} {value:g}: it is {kind}")
    for name, launcher in (("address", "ray"), ("slurm", "slurm")):
        if getattr(flags, name) and flags.launcher != launcher:
            raise ValueError(f"--{name} is for --launcher {launcher}")
    if flags.launcher == "slurm":
        from train.sweeping.on_slurm import read_options

        read_options(flags.slurm)
    elif flags.launcher == "ray":
        from train.sweeping.running import check_installed

        check_installed(flags.launcher)


def _seeds(text: str | None) -> int | tuple[int, ...] | None:
    if text is None:
        return None
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--seeds {text}: write a count, as 3, or the seeds, as 0,5,7") from None
    return found if "," in text else found[0]


if __name__ == "__main__":
    main()
