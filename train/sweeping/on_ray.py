"""Runs of a study as tasks of a Ray cluster, which gives each the CPUs and GPUs that it asks for.

What the study needs of the cluster: flaxtron is installed on every node, and all see the study's folder and the data at
the same paths. A task whose node is lost is started again elsewhere, and its run goes on from its newest checkpoint.
"""

import logging
import signal
from collections.abc import Mapping, Sequence
from typing import Any

from train.sweeping.running import Job, Watch, check_installed, run_to_end

RETRIES = 3
"""Of a task whose node or worker is lost; a run that fails is not tried again."""


def run_on_ray(
    jobs: Sequence[Job],
    at_once: int | None,
    address: str | None,
    resources: Mapping[str, float],
    watch: Watch,
) -> None:
    """Runs jobs to their end.

    Args:
        jobs: in the order to start them.
        at_once: how many at a time at most; None is as many as the cluster takes.
        address: of the cluster; None is RAY_ADDRESS, else Ray is started here.
        resources: num_cpus and num_gpus of a run.
        watch: the study.

    Raises:
        ValueError: Ray is not installed, or the cluster can never give a run what it asks for.
        OSError: no cluster answers.
    """
    check_installed("ray")
    import ray

    ours = not ray.is_initialized()
    if ours:
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise OSError(f"--address {address}: no Ray cluster: {str(error).splitlines()[0]}") from None
        for number, handler in before.items():  # Ray has put its own in their place
            signal.signal(number, handler)
    try:
        _check_resources(ray.nodes(), resources)
        task: Any = ray.remote(run_to_end)
        waiting, going, level = list(jobs), {}, 0
        while waiting or going:
            if (asked := watch.stopping()) > level:
                level = asked
                waiting.clear()
                if level > 1:
                    for reference in going:
                        ray.cancel(reference, force=True)
            while waiting and (at_once is None or len(going) < at_once):
                job = waiting.pop(0)
                options = {"name": job.name, "max_retries": RETRIES, **resources}
                going[task.options(**options).remote(job)] = job
            ended, _ = ray.wait(list(going), timeout=0.2) if going else ([], [])
            for reference in ended:
                job = going.pop(reference)
                try:
                    ray.get(reference)
                except Exception as error:  # what a node, a worker or the cluster came up with
                    watch.tell_error(job, error)
            watch.tick()
    finally:
        if ours:
            ray.shutdown()


def _check_resources(nodes: Sequence[Mapping[str, Any]], resources: Mapping[str, float]) -> None:
    """A task that no node can hold would wait for ever."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    for name, key in (("num_cpus", "CPU"), ("num_gpus", "GPU")):
        most = max((held.get(key, 0) for held in alive), default=0)
        if resources[name] > most:
            raise ValueError(
                f"--{key.lower()}s_per_run {resources[name]:g}: no node of the Ray cluster has more than {most:g}"
            )
