"""From a run of a study to what starts it: the arguments of `python -m train`, and its surroundings."""

import os
from pathlib import Path

from train.sweeping.running import STOP, Job
from train.sweeping.study import RunOf, Study

CACHE = "compile-cache"
PASSED_ON = ("JAX_", "XLA_", "FLAXTRON_", "LIBTPU_", "NCCL_", "PYTHONPATH")
"""Variables that decide how a run computes: it gets them on other machines too."""


def make_job(study: Study, run: RunOf) -> Job:
    """What it takes to start a run.

    Args:
        study: the run's.
        run: which.
    """
    params = [*study.gin_params, *(f"{key}={value}" for key, value in run.arm.settings.items())]
    params += [f"train.seed={run.seed}", f"train.workdir={str(run.folder)!r}"]
    files = [f"--gin_file={file}" for file in study.gin_files]
    return Job(
        name=run.name,
        folder=str(run.folder.resolve()),
        arguments=(*files, *(f"--gin_param={param}" for param in params)),
        num_steps=run.arm.num_steps,
        workplace=os.getcwd(),
        variables=surroundings(study.folder) | _for_wandb(study, run),
        stop=str((study.folder / STOP).resolve()),
    )


def surroundings(folder: Path) -> dict[str, str]:
    """Variables of a run's environment: those that let runs share compiled programs, unless the user has set them, and
    those that the study itself was started with.

    Args:
        folder: of the study.
    """
    shared = {
        "JAX_COMPILATION_CACHE_DIR": str((folder / CACHE).resolve()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return shared | {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}


def _for_wandb(study: Study, run: RunOf) -> dict[str, str]:
    """Weights & Biases, where runs report to it, shows a study as a group and its arms as kinds of jobs."""
    if run.arm.config.get("train.wandb", "None") == "None":
        return {}
    return {"WANDB_RUN_GROUP": study.folder.resolve().name, "WANDB_JOB_TYPE": run.arm.name}
