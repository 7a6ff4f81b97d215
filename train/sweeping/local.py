"""Runs of a study as processes of this machine, a few at a time, each with its share of cores and GPUs."""

import math
import os
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Mapping, Sequence

from train.sweeping.running import LOOK_SECONDS, Job, Process, Watch


def run_here(jobs: Sequence[Job], at_once: int, watch: Watch) -> None:
    """Runs jobs to their end.

    Args:
        jobs: in the order to start them.
        at_once: how many run at a time.
        watch: the study.
    """
    waiting, slots = deque(jobs), shares(at_once)
    busy: dict[int, Process] = {}
    told: set[str] = set()
    while waiting or busy:
        asked = watch.stopping()
        if asked:
            waiting.clear()
            for process in busy.values():
                process.stop(at_once=asked > 1)
        for slot in [slot for slot in range(at_once) if slot not in busy][: len(waiting)]:
            job = waiting.popleft()
            try:
                busy[slot] = Process(job, *slots[slot])
            except BlockingIOError:
                waiting.append(job)
                if job.name not in told:
                    told.add(job.name)
                    watch.tell(f"{job.name} is still ending from an earlier start; it is waited for")
                continue
            except OSError as error:
                watch.tell(f"{job.name} cannot be started: {error}")
        for slot, process in list(busy.items()):
            if process.ended():
                del busy[slot]
        watch.tick()
        if busy or waiting:
            time.sleep(LOOK_SECONDS)


def shares(at_once: int) -> list[tuple[dict[str, str], tuple[int, ...]]]:
    """What each of so many runs has of this machine: (variables of its environment, cores).

    One run alone has everything. Several share cores evenly, and GPUs too if there are any; where there are fewer GPUs
    than runs, those of one GPU share its memory.
    """
    if at_once == 1:
        return [({}, ())]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    gpus = visible_gpus(os.environ)
    found = []
    for slot in range(at_once):
        variables: dict[str, str] = {}
        if gpus:
            each = max(len(gpus) // at_once, 1)
            first = slot * each % len(gpus)
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first : first + each])
            sharing = math.ceil(at_once / len(gpus))
            if sharing > 1:
                variables["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / sharing:.2f}"
        each = max(len(cores) // at_once, 1)
        mine = [cores[(slot * each + i) % len(cores)] for i in range(each)] if cores else []
        found.append((variables, tuple(mine)))
    return found


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """The GPUs of NVIDIA that a process would see, as CUDA_VISIBLE_DEVICES names them; none where JAX is kept off."""
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return []
    if "CUDA_VISIBLE_DEVICES" in environment:
        return [gpu for gpu in environment["CUDA_VISIBLE_DEVICES"].split(",") if gpu]
    if shutil.which("nvidia-smi") is None:
        return []
    asked = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    return [str(i) for i, line in enumerate(asked.stdout.splitlines()) if line.startswith("GPU ")]
