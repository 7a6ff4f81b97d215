"""`python -m benchmarks.kills`: a run of several processes is killed at random moments, restarted, and compared.

    kill      each of RUNS runs loses one process to SIGKILL: at a random step, in the middle of a save, or while it
              starts. What is left of it is killed too, as a scheduler would, and the same command goes on. It has to
              end with the state, the batches and the losses of a run that nobody disturbed, bit for bit, and to have
              lost no step that a finished checkpoint had.
    elastic   a run stops on 4 processes by SIGTERM, goes on with 2 and then with 1, on another mesh each time: the same
              batches by their hash, and losses within 1e-6.

Prints a ledger, a line for each run; exit code 1 if one is not as it should be.
"""

import contextlib
import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 300.0  # seconds; only a hang takes so long
STEPS, EVERY = 24, 3

CONFIG = f"""
include 'models/tiny-gptj.gin'
train.num_steps = {STEPS}
train.global_batch_size = 8
train.sequence_length = 16
train.log_every = 1
train.checkpoint_every = {EVERY}
train.keep_checkpoints = 2
train.eval_batches = 1
data.path = 'corpus'
data.cache_dir = 'cache'
train.optimizer = @adamw()
adamw.learning_rate = 1e-2
GPTJ.n_layer = 1
GPTJ.resid_pdrop = 0.1
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The command line."""

    what: tyro.conf.Positional[Literal["all", "kill", "elastic"]] = "all"
    """What to do to runs."""
    runs: int = 20
    """kill: how many runs."""
    processes: int = 2
    """kill: processes of a run, one device each."""
    seed: int = 0
    """Of the moments."""
    ledger: str | None = None
    """A file for the ledger, as JSON lines."""


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        whole: the hash of its last state.
        chain: the hash of its batches.
        losses: by step.
    """

    whole: str
    chain: str
    losses: dict[int, float]


class Home:
    """A folder with a corpus, a config and runs.

    Args:
        folder: to be filled.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "corpus").mkdir()
        for i in range(60):
            text = f"document {i}: the square of {i} is {i * i}. " * 10
            (folder / "corpus" / f"{i:02}.txt").write_text(text)
        (folder / "run.gin").write_text(CONFIG)

    @contextlib.contextmanager
    def start(self, run: str, processes: int, **mesh: int) -> Iterator[list[subprocess.Popen[bytes]]]:
        """Starts a run, or goes on with it; what still runs at the end is killed."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        command = [sys.executable, "-m", "train", "--gin_file=run.gin", f"--gin_param=train.workdir='{run}'"]
        command += [f"--gin_param=mesh.{axis}={size}" for axis, size in mesh.items()]
        surroundings = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=1",
            "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(processes),
        }
        with (self.folder / f"{run}.log").open("ab") as log:
            started = [
                subprocess.Popen(
                    command,
                    cwd=self.folder,
                    env=surroundings | {"JAX_PROCESS_ID": str(number)},
                    stdout=log,
                    stderr=log,
                )
                for number in range(processes)
            ]
        try:
            yield started
        finally:
            for process in started:
                process.kill()
                process.wait()

    def finish(self, run: str, processes: int, **mesh: int) -> Result:
        """Takes a run to its end."""
        with self.start(run, processes, **mesh) as started:
            for process in started:
                code = process.wait(timeout=LIMIT)
                if code:
                    log = (self.folder / f"{run}.log").read_text(errors="replace")
                    raise RuntimeError(f"{run} ended with exit code {code}:\n{log[-3000:]}")
        return self.result(run)

    def result(self, run: str) -> Result:
        """What a run that ended left."""
        saved = json.loads((self.folder / run / "checkpoints" / str(STEPS) / "run" / "run.json").read_text())
        certificate = saved["certificate"]
        return Result(certificate["whole"], certificate["batches"]["chain"], self.losses(run))

    def losses(self, run: str) -> dict[int, float]:
        """The losses that a run has logged; the last line may be half written."""
        found = {}
        with contextlib.suppress(OSError):
            for line in (self.folder / run / "metrics.jsonl").read_text().splitlines():
                with contextlib.suppress(ValueError):
                    values = json.loads(line)
                    if "loss" in values:
                        found[values["step"]] = values["loss"]
        return found

    def saved(self, run: str) -> int:
        """The newest finished checkpoint."""
        folder = self.folder / run / "checkpoints"
        names = [path.name for path in folder.glob("*") if (path / "commit_success.txt").exists()]
        return max((int(name) for name in names if name.isdecimal()), default=0)

    def is_saving(self, run: str, after: int) -> bool:
        """Whether a step past `after` is being written."""
        names = [path.name for path in (self.folder / run / "checkpoints").glob("*.orbax-checkpoint-tmp*")]
        return any(int(name.partition(".")[0]) > after for name in names)


def kill_runs(home: Home, flags: Flags) -> Iterator[dict[str, Any]]:
    """Kills and restarts runs, and yields a line of the ledger for each."""
    whole = home.finish("undisturbed", flags.processes, data=flags.processes)
    chance = random.Random(flags.seed)
    for number in range(flags.runs):
        run, kind = f"killed-{number}", ("step", "save", "start")[number % 5 % 3]
        moment, victim = chance.randrange(1, STEPS - 1), chance.randrange(flags.processes)
        delay = chance.random() * {"step": 0.2, "save": 0.05, "start": 6.0}[kind]
        with home.start(run, flags.processes, data=flags.processes) as started:
            if kind == "step":
                _wait(lambda m=moment, r=run: max(home.losses(r), default=0) >= m, started)
            elif kind == "save":
                _wait(lambda m=moment, r=run: home.is_saving(r, min(m, STEPS - EVERY - 1)), started)
            time.sleep(delay)
            alive = started[victim].poll() is None
            in_save = home.is_saving(run, 0)
            started[victim].send_signal(signal.SIGKILL)
            time.sleep(chance.random())
        saved, reached = home.saved(run), max(home.losses(run), default=0)
        result = home.finish(run, flags.processes, data=flags.processes)
        log = (home.folder / f"{run}.log").read_text(errors="replace")
        kept = saved == 0 or f"going on from step {saved} " in log or saved == STEPS
        yield {
            "run": number,
            "killed": f"process {victim}",
            "moment": f"{kind}, step {reached}" + (", a save under way" if in_save else ""),
            "was running": alive,
            "went on from": saved,
            "state": result.whole == whole.whole,
            "batches": result.chain == whole.chain,
            "losses": result.losses == whole.losses,
            "ok": result == whole and kept,
        }


def change_processes(home: Home) -> Iterator[dict[str, Any]]:
    """Stops a run on 4 processes, goes on with 2 and with 1, and yields the ledger's line."""
    whole = home.finish("four", 4, data=4)
    stopped = []
    for processes, mesh, until in ((4, {"data": 4}, STEPS // 3), (2, {"fsdp": 2}, 2 * STEPS // 3)):
        with home.start("elastic", processes, **mesh) as started:
            _wait(lambda u=until: max(home.losses("elastic"), default=0) >= u - 4, started)
            started[0].send_signal(signal.SIGTERM)
            codes = [process.wait(timeout=LIMIT) for process in started]
        stopped.append(
            {"processes": processes, "mesh": mesh, "saved": home.saved("elastic"), "exit codes": codes}
        )
    result = home.finish("elastic", 1)
    apart = max(abs(result.losses[step] - loss) for step, loss in whole.losses.items())
    yield {
        "stopped": stopped,
        "batches": result.chain == whole.chain,
        "largest difference of a loss": apart,
        "ok": result.chain == whole.chain and apart <= 1e-6 and result.losses.keys() == whole.losses.keys(),
    }


def _wait(until: Callable[[], bool], started: Sequence[subprocess.Popen[bytes]]) -> None:
    """Until something is so, or no process is left to make it so."""
    deadline = time.monotonic() + LIMIT
    while not until() and any(process.poll() is None for process in started):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not so within {LIMIT:g} s")
        time.sleep(0.002)


def main(args: Sequence[str] | None = None) -> None:
    """Reads the flags (those of the command line if `args` is None), does it, and exits with 0 or 1."""
    flags = tyro.cli(Flags, prog="python -m benchmarks.kills", description=__doc__, args=args)
    # Ended by `timeout` or a scheduler, it takes along the processes that it started.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    good, begun = [], time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            home = Home(Path(folder))
            ledger = stack.enter_context(open(flags.ledger, "w")) if flags.ledger else None
            parts = {"kill": lambda: kill_runs(home, flags), "elastic": lambda: change_processes(home)}
            for name, part in parts.items():
                if flags.what not in ("all", name):
                    continue
                for line in part():
                    good.append(line["ok"])
                    print("  ".join(f"{key} {value}" for key, value in line.items()), flush=True)
                    if ledger:
                        print(json.dumps(line), file=ledger, flush=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"{sum(good)} of {len(good)} as they should be, in {time.monotonic() - begun:.0f} s")
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
