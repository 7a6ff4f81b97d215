"""`python -m benchmarks.sweeps`: what a study costs beside its runs, and what a kill takes from it.

    overhead  the six runs of two arms and three seeds, alternately started bare, one `python -m train` after another,
              and by `python -m train.sweep --jobs 1`. Both have a compile cache that was filled by a run before. Wall
              seconds, and processor seconds, which other work on the machine changes less.
    kill      twelve runs, two at a time; the study is ended by SIGKILL when half are done, and started again. No run
              may be lost, none that was done may be touched, and none that was cut off may begin anew if it had a
              checkpoint.

Prints a ledger; exit code 1 if something was lost.
"""

import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import tyro

SETTINGS = """
include 'studies/positions.gin'
train.num_steps = {steps}
train.eval_every = {every}
train.log_every = 5
train.checkpoint_every = {every}
data.max_bytes = 1_000_000
sweep.vary = ["GPTJ.position={positions}"]
sweep.seeds = 3
"""
SWEEP = [sys.executable, "-m", "train.sweep", "--gin_file=study.gin"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The command line."""

    what: tyro.conf.Positional[Literal["all", "overhead", "kill"]] = "all"
    """What to do."""
    steps: int = 100
    """Of each run."""
    rounds: int = 3
    """overhead: of each kind."""


def main() -> None:
    """Runs what the flags ask for."""
    flags = tyro.cli(Flags, prog="python -m benchmarks.sweeps", description=__doc__)
    lost = False
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        if flags.what in ("all", "overhead"):
            overhead(home, flags.steps, flags.rounds)
        if flags.what in ("all", "kill"):
            lost = not kill(home, flags.steps)
    raise SystemExit(lost)


def overhead(home: Path, steps: int, rounds: int) -> None:
    """Alternates bare runs and the same runs as a study."""
    write(home, steps, "'rotary','none'")
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": f"{home}/cache"}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    start([*SWEEP, "--workdir=warm"], home, environment)
    wall: dict[str, list[float]] = {"bare": [], "study": []}
    processor: dict[str, list[float]] = {"bare": [], "study": []}
    for turn in range(rounds):
        for kind in ("bare", "study") if turn % 2 else ("study", "bare"):
            begun, used = time.perf_counter(), children_seconds()
            if kind == "study":
                start([*SWEEP, f"--workdir=study-{turn}"], home, environment)
            else:
                for seed in range(3):
                    for position in ("rotary", "none"):
                        params = (f"GPTJ.position='{position}'", f"train.seed={seed}")
                        params += (f"train.workdir='bare-{turn}/{position}-{seed}'",)
                        flags = [f"--gin_param={param}" for param in params]
                        start(
                            [sys.executable, "-m", "train", "--gin_file=study.gin", *flags], home, environment
                        )
            wall[kind].append(time.perf_counter() - begun)
            processor[kind].append(children_seconds() - used)
            print(f"{kind:6} {wall[kind][-1]:7.1f} s, {processor[kind][-1]:7.1f} processor s", flush=True)
    for name, seconds in (("wall", wall), ("processor", processor)):
        ratio = statistics.median(seconds["study"]) / statistics.median(seconds["bare"])
        print(f"a study of six runs takes {ratio - 1:+.1%} {name} time beside the bare runs")


def kill(home: Path, steps: int) -> bool:
    """Kills a study half-way and starts it again."""
    write(home, steps, "'rotary','alibi','learned','none'")
    command = [*SWEEP, "--workdir=killed", "--jobs=2"]
    begun = time.perf_counter()
    study = subprocess.Popen(command, cwd=home, stdout=subprocess.DEVNULL)
    while sum(status == "done" for status in states(home).values()) < 6:
        assert study.poll() is None, "the study has ended"
        time.sleep(0.1)
    study.kill()
    study.wait()
    before = {
        run: (run / "metrics.jsonl").read_text() for run, status in states(home).items() if status == "done"
    }
    cut = [run for run, status in states(home).items() if status != "done"]
    start(command, home, dict(os.environ))
    after = states(home)
    whole = len(after) == 12 and set(after.values()) == {"done"}
    untouched = all((run / "metrics.jsonl").read_text() == text for run, text in before.items())
    went_on = [run.name for run in cut if "going on from step" in (run / "log.txt").read_text()]
    print(
        f"killed with {len(before)} of 12 runs done and {len(cut)} begun: {len(after)} done after the next start, "
        f"{len(went_on)} went on from a checkpoint, what was done is {'untouched' if untouched else 'CHANGED'}; "
        f"{time.perf_counter() - begun:.0f} s",
        flush=True,
    )
    return whole and untouched


def write(home: Path, steps: int, positions: str) -> None:
    """Writes the study's gin file."""
    every = max(steps // 4, 1)
    (home / "study.gin").write_text(SETTINGS.format(steps=steps, every=every, positions=positions))


def start(command: list[str], home: Path, environment: dict[str, str]) -> None:
    """Runs a command to its end, which has to be a good one."""
    subprocess.run(command, cwd=home, env=environment, stdout=subprocess.DEVNULL, check=True)


def states(home: Path) -> dict[Path, str]:
    """How every run stands that was begun."""
    files = sorted((home / "killed").glob("*/seed-*/run.json"))
    return {file.parent: json.loads(file.read_text())["status"] for file in files}


def children_seconds() -> float:
    """Processor seconds of all children so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
