"""What is seen of a run: lines, a progress bar, metrics.jsonl, TensorBoard, Weights & Biases, where the time goes.

Metrics stay on the device until it is time to show them, so logging never makes a step wait for the one
before.
"""

import contextlib
import datetime
import functools
import importlib
import json
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import modelzoo
from modelzoo.model import LM_TASKS
from train.goodput import Goodput

PEAK_FLOPS = {
    # Dense bf16 FLOP/s of one chip, as its maker publishes it; the key is how jax spells the device.
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def flops_per_token(model: modelzoo.Model, sequence_length: int) -> float:
    """Model FLOPs of one training step, per token: forward and backward, without recomputation.

    PaLM's count (Chowdhery et al., 2022, arXiv:2204.02311, appendix B): 6 per parameter that a token is
    multiplied with, 4 if it is frozen, and 12 L N H T for the two products of each attention, an encoder's and that
    across to it among them. Embedding tables are looked up, not multiplied, except by a language-modelling head that
    is tied to one.

    Args:
        model: any model of the zoo.
        sequence_length: T.
    """
    config = model.config
    leaves = jax.tree.leaves_with_path(modelzoo.abstract_params(model))
    trains = dict(jax.tree.leaves_with_path(modelzoo.trainable(model)))
    per_token = sum(
        leaf.size * (6.0 if trains[path] else 4.0) for path, leaf in leaves if path[-1].key != "embedding"
    )
    if getattr(config, "tie_word_embeddings", False) and model.task in LM_TASKS:
        tables = [path for path in trains if path[-1].key == "embedding"]
        tied = any(trains[path] for path in tables)
        per_token += config.vocab_size * config.hidden_size * (6.0 if tied else 4.0)
    heads = sum(leaf.size for path, leaf in leaves if [key.key for key in path[-2:]] == ["query", "kernel"])
    return per_token + 12.0 * heads / config.hidden_size * sequence_length


@functools.cache
def peak_flops() -> tuple[float, str]:
    """(FLOP/s of all devices together, where the figure is from).

    Known accelerators have their published bf16 peak. On any other device it is measured: the best of a few
    large float32 products; simulated devices share the machine, so they count once.
    """
    device = jax.devices()[0]
    for kind, peak in PEAK_FLOPS.items():
        if device.device_kind == kind or (kind.startswith("NVIDIA") and device.device_kind.startswith(kind)):
            return peak * jax.device_count(), f"{kind}'s published peak"
    size = 1536
    a = jax.device_put(np.ones((size, size), np.float32), device)
    product = jax.jit(jnp.dot)
    product(a, a).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        times.append(time.perf_counter() - start)
    machines = 1 if device.platform == "cpu" else jax.device_count()
    return 2.0 * size**3 / min(times) * machines, "measured float32 matmul peak"


class RunLog:
    """The log of one run. A context manager: leaving it closes the files and draws the plot.

    Every `log_every` steps it prints `step N/M  loss X  ...` and writes one line of WORKDIR/metrics.jsonl and
    TensorBoard events. On a terminal a progress line follows every step. Only process 0 writes.

    Args:
        workdir: the run's folder.
        num_steps: the run's last step.
        tokens_per_step: over all devices; a function of how many steps were taken tells the tokens of them all.
        flops_per_token: for model FLOPs utilisation; None leaves it out.
        peak: FLOP/s of all devices; None looks it up or measures it.
        log_every: steps between lines.
        start_step: steps that an earlier part of the run took; later lines of an old log are dropped.
        began: when the program began, as time.time() tells it; None is now.
        wandb: a project of Weights & Biases to report to as well.

    Raises:
        ValueError: the package wandb is asked for and not installed.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        num_steps: int,
        tokens_per_step: int | Callable[[int], int],
        flops_per_token: float | None = None,
        peak: float | None = None,
        log_every: int = 10,
        start_step: int = 0,
        began: float | None = None,
        wandb: str | None = None,
    ):
        self.workdir = Path(workdir)
        self.plot = self.workdir / "loss.png"
        self._num_steps, self._log_every = num_steps, log_every
        each = tokens_per_step
        self._tokens_until = each if callable(each) else lambda step: step * each
        self._flops_per_token, self._peak, self._peak_source = flops_per_token, peak, "given peak"
        self._writes = jax.process_index() == 0
        self._last_step, self._last_time, self._paused, self._waited = (
            start_step,
            time.perf_counter(),
            0.0,
            0.0,
        )
        self._latest: Any = None  # a value of the step that was last begun
        self._start_step = start_step
        self._progress: Progress | None = None
        self._events: Any = None
        self._wandb: Any = None
        self.clock = Goodput(self.workdir / "goodput.json" if self._writes else None, start_step, began)
        if not self._writes:
            return
        # Imported late: tensorboardX takes a while, and --help does not need it.
        from tensorboardX import SummaryWriter

        self.workdir.mkdir(parents=True, exist_ok=True)
        self.file = self.workdir / "metrics.jsonl"
        self._drop_after(start_step)
        self._wandb = None if wandb is None else _open_wandb(wandb, self.workdir)
        self._jsonl = self.file.open("a")
        self._events = SummaryWriter(str(self.workdir / "tensorboard"), purge_step=start_step + 1)
        if self._flops_per_token and self._peak is None:
            self._peak, self._peak_source = peak_flops()
        if sys.stdout.isatty():
            left = TimeRemainingColumn(compact=True)
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), left)
            self._progress = Progress(*columns, console=Console(), transient=True)
            self._task = self._progress.add_task("compiling", total=num_steps, completed=start_step)
            self._progress.start()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Notes one step; its metrics (scalars, on the device) are read only when they are shown.

        Args:
            step: steps taken, counted from 1.
            metrics: such as `make_train_step` returns.
        """
        self._latest = next(iter(metrics.values()))
        if self._progress is not None:
            self._progress.update(self._task, completed=step)
        first = step == self._start_step + 1
        if not (first or step % self._log_every == 0 or step == self._num_steps):
            return
        line = {name: float(value) for name, value in metrics.items()}  # waits for the step
        now = time.perf_counter()
        seconds = max(now - self._last_time - self._paused, 1e-9)
        steps = step - self._last_step
        tokens = self._tokens_until(step) - self._tokens_until(self._last_step)
        waited = self._waited
        self._last_step, self._last_time, self._paused, self._waited = step, now, 0.0, 0.0
        self.clock.reach(step, seconds - waited, "compile" if first else "steps")
        if not first:  # the first step's time is the compiler's
            speed = tokens / seconds
            line |= {"tokens_per_second": speed, "seconds_per_step": seconds / steps}
            if self._flops_per_token and self._peak:
                line["mfu"] = speed * self._flops_per_token / self._peak
            line["eta_seconds"] = (self._num_steps - step) * seconds / steps
            line["input_wait"] = waited / seconds
        else:
            line["compile_seconds"] = seconds
        line |= {"goodput": self.clock.shares()["steps"], **memory()}
        self._write(step, line)

    def take(self, batches: Any) -> Any:
        """The next batch. That it was waited for counts only if the device had finished what it was given."""
        begun = time.perf_counter()
        batch = next(batches)
        seconds = time.perf_counter() - begun
        if self._latest is None or not hasattr(self._latest, "is_ready") or self._latest.is_ready():
            self._waited += seconds
            self.clock.spent["input"] += seconds
        return batch

    @contextlib.contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """Leaves what a block takes out of the speed.

        Args:
            kind: "evaluation" or "checkpoint".
        """
        begun = time.perf_counter()
        with self.clock.during(kind):
            yield
        self.pause(time.perf_counter() - begun)

    def eval(self, step: int, metrics: Mapping[str, float]) -> None:
        """Notes how a run does on what is held out.

        Args:
            step: steps taken.
            metrics: such as {"loss": ..., "perplexity": ...}; each is written as eval_NAME.
        """
        self._write(step, {f"eval_{name}": value for name, value in metrics.items()})

    def pause(self, seconds: float) -> None:
        """Leaves time that was not spent in steps (an evaluation, a save) out of the speed."""
        self._paused += seconds

    def close(self) -> Path:
        """Closes the files and draws the loss curve.

        Returns:
            The plot's path.
        """
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._writes and self._events is not None:
            self.clock.write()
            self._jsonl.close()
            self._events.close()
            self._events = None
            if self._wandb is not None:
                self._wandb.finish()
            draw_losses(self.file, self.plot)
        return self.plot

    def _write(self, step: int, line: dict[str, float]) -> None:
        if not self._writes:
            return
        # JSON has no NaN: a loss that is none becomes null
        numbers = {name: value if math.isfinite(value) else None for name, value in line.items()}
        self._jsonl.write(json.dumps({"step": step, "time": time.time(), **numbers}) + "\n")
        self._jsonl.flush()
        for name, value in line.items():
            if math.isfinite(value):
                self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(line, step=step)
        text = f"step {step}/{self._num_steps}  " + "  ".join(_words(line, self._peak_source))
        if self._progress is None:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()
        else:
            self._progress.console.print(text, highlight=False)
            self._progress.update(
                self._task, description=f"loss {line.get('loss', line.get('eval_loss', math.nan)):.3f}"
            )

    def _drop_after(self, step: int) -> None:
        """Drops lines of steps that will be taken again."""
        if not self.file.exists():
            return
        kept = [line for line in self.file.read_text().splitlines() if _step_of(line) <= step]
        aside = self.file.with_suffix(".tmp")
        aside.write_text("".join(line + "\n" for line in kept))
        os.replace(aside, self.file)


def memory() -> dict[str, float]:
    """Bytes in use now and at most, on this process's fullest device; on a CPU, what the process holds."""
    found = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    names = {"bytes_in_use": "device_bytes", "peak_bytes_in_use": "device_bytes_peak"}
    held = (
        {new: float(max(stats.get(old, 0) for stats in found)) for old, new in names.items()} if found else {}
    )
    status = Path("/proc/self/status")
    if not held and status.exists():
        rows = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        names = {"VmRSS": "host_bytes", "VmHWM": "host_bytes_peak"}
        held = {new: float(rows[old].split()[0]) * 1024 for old, new in names.items() if old in rows}
    return held


def import_wandb(project: str) -> Any:
    """The package of Weights & Biases.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise ValueError(
            f"train.wandb = {project!r}: the package wandb is not installed: pip install 'flaxtron[wandb]'"
        ) from None


def _open_wandb(project: str, workdir: Path) -> Any:
    """A run of Weights & Biases, the same one whenever the run goes on; WANDB_MODE=offline keeps it on disk."""
    wandb = import_wandb(project)
    name = workdir / "wandb-id"
    if not name.exists():
        name.write_text(uuid.uuid4().hex[:8])
    return wandb.init(
        project=project, id=name.read_text(), name=workdir.resolve().name, dir=str(workdir), resume="allow"
    )


def draw_losses(file: Path, plot: Path) -> None:
    """Draws training and held-out loss over steps from a metrics.jsonl into a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    lines = [json.loads(line) for line in file.read_text().splitlines()]
    figure = Figure(figsize=(7, 4.2), dpi=144, layout="constrained")
    axes = figure.add_subplot()
    styles: dict[str, Any] = {
        "loss": dict(label="training", color="#3566a8", linewidth=1.6),
        "eval_loss": dict(label="held out", color="#d1662b", marker="o", markersize=5, linewidth=1.2),
    }
    for name, style in styles.items():
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if points:
            steps, losses = zip(*points, strict=True)
            (drawn,) = axes.plot(steps, losses, **style)
            drawn.set_label(f"{drawn.get_label()}, last {losses[-1]:.3f}")
    axes.set_title(f"{plot.parent.resolve().name}: loss", loc="left", fontweight="bold")
    axes.set(xlabel="step", ylabel="nats per token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False)
    aside = plot.with_suffix(".tmp.png")
    figure.savefig(aside)
    os.replace(aside, plot)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # a line that a crash cut off
        return float("inf")


def _words(line: dict[str, float], peak_source: str) -> list[str]:
    """The figures of a line as a person reads them, in a fixed order."""
    utilisation = "of the matmul peak" if peak_source.startswith("measured") else "MFU"
    show = {
        "loss": "loss {:.4f}",
        "eval_loss": "held-out loss {:.4f}",
        "eval_perplexity": "perplexity {:.2f}",
        "grad_norm": "gradient {:.2f}",
        "learning_rate": "rate {:.2e}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "compile_seconds": "({:.0f} s with compiling)",
        "mfu": f"{{:.1%}} {utilisation}",
    }
    words = [text.format(line[name]) for name, text in show.items() if name in line]
    others = [name for name in line if name.startswith("eval_") and name not in show]
    words += [f"{name.removeprefix('eval_').replace('_', ' ')} {line[name]:.4f}" for name in others]
    if seconds := line.get("eta_seconds"):
        words.append(f"{datetime.timedelta(seconds=round(seconds))} left")
    return words
