"""Runs of a study as one SLURM job array, through submitit (https://github.com/facebookincubator/submitit).

A job that its time limit or a priority ends lets its run save and stop, and is queued again by submitit; the run
goes on from its checkpoint. `--slurm cluster=local` does the same with processes of this machine in place of SLURM, to
rehearse.
"""

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.sweeping.running import LOOK_SECONDS, Job, Process, Watch, check_installed, run_to_end

MINUTES = 24 * 60
"""Time limit of a job unless --slurm time=... sets one: it is queued again at its end."""
NUM_TIMES = 100
"""How often at most."""
STOPPING_SECONDS = 5
"""Between looks at jobs that are to end."""
_QUEUED = ("PENDING", "REQUEUED")


class Runner:
    """What a job does; submitit pickles it, and calls `checkpoint` when SLURM is about to end the job."""

    def __init__(self) -> None:
        self._process: Process | None = None

    def __call__(self, job: Job) -> str:
        """Runs one job to its end and tells how it ended."""
        return run_to_end(job, on_start=self._keep)

    def checkpoint(self, job: Job) -> Any:
        """Lets the run save and stop, and queues the job again."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            self._process.stop()
            while self._process.ended() is None:
                time.sleep(LOOK_SECONDS)
        return DelayedSubmission(Runner(), job)

    def _keep(self, process: Process) -> None:
        self._process = process


def run_on_slurm(
    jobs: Sequence[Job],
    at_once: int | None,
    folder: Path,
    options: Mapping[str, int],
    given: Sequence[str],
    watch: Watch,
) -> None:
    """Submits jobs as an array and waits for them.

    Args:
        jobs: in the order to start them.
        at_once: how many at a time at most; None is as many as SLURM lets run.
        folder: for submitit's files: the sbatch script, what jobs print.
        options: cpus_per_task and gpus_per_node of a job.
        given: "name=value" each, options of sbatch.
        watch: the study.

    Raises:
        ValueError: submitit or SLURM is not here, or an option cannot be read.
    """
    executor, is_local = make_executor(folder, options, given, at_once)
    each = (at_once or 1) if is_local else len(jobs)  # submitit's processes here do not queue
    for first in range(0, len(jobs), each):
        if watch.stopping():
            return
        runner = Runner()
        submitted = executor.map_array(runner, jobs[first : first + each])
        if not is_local:
            watch.tell(
                f"submitted as SLURM job {submitted[0].job_id.partition('_')[0]}; its files are in {folder}"
            )
        _wait(list(zip(submitted, jobs[first : first + each], strict=True)), watch)


def make_executor(
    folder: Path, options: Mapping[str, int], given: Sequence[str], at_once: int | None
) -> tuple[Any, bool]:
    """submitit's executor, and whether it is one of this machine; arguments as `run_on_slurm`'s.

    Raises:
        ValueError: as `run_on_slurm`.
    """
    cluster, asked = read_options(given)
    # Left to itself, importing submitit closes every handler of logging that is there.
    os.environ.setdefault("SUBMITIT_LOG_LEVEL", "NOCONFIG")
    import submitit
    from submitit.slurm.slurm import SlurmExecutor

    executor = submitit.AutoExecutor(folder=folder, cluster=cluster, slurm_max_num_timeout=NUM_TIMES)
    shared: dict[str, Any] = {"timeout_min": MINUTES, **{k: v for k, v in options.items() if v}}
    known = SlurmExecutor._valid_parameters()
    own = {f"slurm_{name}": value for name, value in asked.items() if name in known}
    others = {name: value for name, value in asked.items() if name not in known and name != "time"}
    if "time" in asked:
        shared["timeout_min"] = asked["time"]
    if others:
        own["slurm_additional_parameters"] = others
    if at_once:
        own["slurm_array_parallelism"] = at_once
    executor.update_parameters(name=folder.parent.name, **shared, **own)
    return executor, cluster != "slurm"


def read_options(given: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Where runs are submitted to, "slurm", "local" or "debug", and the options of sbatch.

    Args:
        given: "name=value" each.

    Raises:
        ValueError: submitit or SLURM is not here, or an option cannot be read.
    """
    check_installed("slurm")
    asked = dict(_option(text) for text in given)
    cluster = asked.pop("cluster", "slurm")
    if cluster not in ("slurm", "local", "debug"):
        raise ValueError(f"--slurm cluster={cluster}: it is slurm, local or debug")
    if cluster == "slurm" and shutil.which("srun") is None:
        raise ValueError(
            "--launcher slurm: there is no srun here: start from a login node; --slurm cluster=local rehearses with "
            "processes of this machine"
        )
    return cluster, asked


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"--slurm {text}: write it as NAME=VALUE, such as partition=gpu")
    name = name.strip().lstrip("-").replace("-", "_")
    if name == "time" and not value.isdecimal():
        raise ValueError(f"--slurm time={value}: it is in minutes")
    return name, int(value) if value.isdecimal() else value


def _wait(going: list[tuple[Any, Job]], watch: Watch) -> None:
    level, looked = 0, time.monotonic()
    while going:
        if (asked := watch.stopping()) > level:
            level = asked
            for submitted, _ in going:
                if level > 1 or submitted.state in _QUEUED:  # which have nothing to save
                    submitted.cancel()
        if level and time.monotonic() > looked + STOPPING_SECONDS:
            looked = time.monotonic()
            going[0][0].done(force_check=True)  # asks for all; left to itself submitit asks once a minute
        for submitted, job in [one for one in going if one[0].done()]:
            going.remove((submitted, job))
            if not level and (error := submitted.exception()):
                watch.tell_error(job, error)
        watch.tick()
        time.sleep(0.2)
