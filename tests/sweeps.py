"""A stand-in for `python -m train`, for tests of what starts, stops and reports runs.

`write_home` makes a folder with a package `train` of its own, which `python -m train` finds first there. It does what
a run does for a study: takes steps, writes metrics.jsonl and goodput.json, saves and exits with 143 at SIGTERM, goes on
from what it saved.
"""

import json
import sys
import time
from pathlib import Path

from train.sweeping.running import STOP, Job
from train.sweeping.study import RunOf, Study

STAND_IN = """
import json, os, pathlib, signal, sys, time

params = dict(arg.removeprefix("--gin_param=").split("=", 1) for arg in sys.argv if arg.startswith("--gin_param="))
folder = pathlib.Path(params["train.workdir"].strip("'"))
steps, pace = int(params.get("train.num_steps", 10)), float(os.environ.get("PACE", 0))
seed, rotary = int(params["train.seed"]), int(params.get("GPTJ.rotary_dim", 8))
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
saved = folder / "saved"
step = start = int(saved.read_text()) if saved.exists() else 0
with (folder / "starts").open("a") as file:
    file.write(f"{start}\\n")
if rotary == 4 and seed == int(os.environ.get("BAD_SEED", -1)):
    sys.exit("error: step 3: its loss or gradient is not a finite number")
with (folder / "metrics.jsonl").open("a") as file:
    for step in range(start + 1, steps + 1):
        time.sleep(pace)
        loss = 3.0 - 0.1 * step + 0.01 * rotary + 0.1 * seed + 0.001 * (seed * rotary % 3)
        line = {"step": step, "time": time.time(), "loss": loss, "tokens_per_second": 1000.0}
        if step == steps or step == 5:
            line["eval_loss"] = loss + 0.5
        file.write(json.dumps(line) + "\\n")
        file.flush()
        saved.write_text(str(step))
        if asked:
            break
(folder / "goodput.json").write_text(json.dumps([{"seconds": {"steps": steps * 0.1, "startup": 1.0}}]))
print(f"step {step}")
sys.exit(143 if asked and step < steps else 0)
"""

BASE = """
include 'models/tiny-gptj.gin'
train.workdir = 'run'
train.num_steps = 10
train.global_batch_size = 8
train.sequence_length = 16
train.log_every = 2
train.eval_every = 5
train.checkpoint_every = 5
data.path = 'corpus'
data.cache_dir = 'cache'
train.optimizer = @adamw()
adamw.learning_rate = @warmup_cosine()
warmup_cosine.peak = 1e-2
GPTJ.n_layer = 1
GPTJ.rotary_dim = 8
"""


def write_home(folder: Path) -> Path:
    """A working folder with the stand-in and tiny.gin."""
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "__init__.py").write_text("")
    (folder / "train" / "__main__.py").write_text(STAND_IN)
    (folder / "tiny.gin").write_text(BASE)
    (folder / "corpus").mkdir()
    (folder / "corpus" / "one.txt").write_text("words " * 500)
    return folder


def job(home: Path, seed: int = 0, steps: int = 10, **variables: str) -> Job:
    """A run of the stand-in, in HOME/study/arm/seed-N."""
    folder = home / "study" / "arm" / f"seed-{seed}"
    (home / "study").mkdir(exist_ok=True)
    settings = {
        "train.seed": seed,
        "train.num_steps": steps,
        "train.workdir": f"'{folder}'",
        "GPTJ.rotary_dim": 4,
    }
    return Job(
        name=f"arm seed {seed}",
        folder=str(folder),
        arguments=("--gin_file=tiny.gin", *(f"--gin_param={key}={value}" for key, value in settings.items())),
        num_steps=steps,
        workplace=str(home),
        variables=variables,
        stop=str(home / "study" / STOP),
    )


def starts(folder: str | Path) -> list[int]:
    """The step that each start of a run of the stand-in began at."""
    return [int(line) for line in (Path(folder) / "starts").read_text().split()]


def steps_of(folder: str | Path) -> list[int]:
    """The steps in a run's metrics.jsonl."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def wait_for(condition, seconds: float = 240.0) -> None:
    """Waits until something holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.02)


def finish(study: Study, values: dict[str, dict[int, float]], metric: str = "eval_loss") -> None:
    """Makes a study's runs done, with these values at the end: {arm: {seed: value}}."""
    for run in study.runs:
        if run.seed in values.get(run.arm.name, {}):
            end(run, {metric: values[run.arm.name][run.seed]})


def end(run: RunOf, last: dict[str, float], status: str = "done", began: float = 0.0) -> None:
    """Writes the files of a run that has ended."""
    run.folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"step": 1, "time": 0.0, "loss": 3.0},
        {"step": run.arm.num_steps, "time": 1.0, "loss": 2.0, **last},
    ]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    state = {"status": status, "num_steps": run.arm.num_steps, "began": began}
    state["error"] = "boom" if status == "failed" else ""
    (run.folder / "run.json").write_text(json.dumps(state))
    (run.folder / "goodput.json").write_text(json.dumps([{"seconds": {"steps": 5.0, "startup": 2.0}}]))


PYTHON = [sys.executable, "-P"]  # -P: this program's own `train`, and not the stand-in's
