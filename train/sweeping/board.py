"""What is seen of a study while it runs: a table with a bar on a terminal, a line for each event elsewhere.

All of it is read from the runs' own files, so that it is the same wherever the runs are.
"""

import datetime
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from train.sweeping.study import DONE, FAILED, RUNNING, STOPPED, WAITING, Look, RunOf, Study

EVERY_SECONDS = 1.0
COLORS = {DONE: "green", FAILED: "red", RUNNING: "cyan", STOPPED: "yellow", WAITING: "dim"}


class Board:
    """A context manager: leaving it takes the live table away.

    Args:
        study: what to show.
        started: runs that this start of the study works on; the others count as they are.
        console: None is standard output.
    """

    def __init__(self, study: Study, started: Sequence[RunOf], console: Console | None = None):
        self.study = study
        self._console = console or make_console()
        self._looks: dict[str, Look] = {run.name: run.look() for run in study.runs}
        self._said = {run.name: WAITING for run in started}
        self._ours = list(started)
        self._left = {run.name: run.state() for run in started}
        self._before = self._units()
        self._began = self._shown = time.perf_counter()
        self._live: Live | None = None

    def __enter__(self) -> "Board":
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
            self._live.update(self.table(), refresh=True)
        return self

    def __exit__(self, *exception: object) -> None:
        self.tick(now=True)
        if self._live is not None:
            self._live.stop()
            self._live = None

    def tick(self, now: bool = False) -> None:
        """Looks at the runs every second, or now, and shows what has changed."""
        if not now and time.perf_counter() - self._shown < EVERY_SECONDS:
            return
        for run in self._ours:
            if self._looks[run.name].status != DONE or self._said[run.name] != DONE:
                self._looks[run.name] = run.look()
        self._shown = time.perf_counter()
        for run in self._ours:
            look = self._looks[run.name]
            if look.status != self._said[run.name]:
                if look.status in (FAILED, STOPPED) and run.state() == self._left[run.name]:
                    continue  # what an earlier start left stays unsaid until this one has begun it
                self._said[run.name] = look.status
                self.tell(self._line(run, look))
        if self._live is not None:
            self._live.update(self.table(), refresh=True)

    def tell(self, line: str) -> None:
        """Says a line, above the table if there is one."""
        if self._console.is_terminal:
            self._console.print(Text(line))
        else:
            self._console.file.write(line + "\n")
            self._console.file.flush()

    def eta(self) -> float | None:
        """Seconds that what is left takes at the pace of this start; None before there is one."""
        gained = self._units() - self._before
        left = sum(1 - self._share(run) for run in self._ours if self._looks[run.name].status != FAILED)
        return self._lasted() * left / gained if gained > 0.005 else None

    def table(self) -> Any:
        """The arms as they stand, and the bar."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("arm", "done", "now", "step", "loss", self.study.metric):
            table.add_column(name, justify="left" if name in ("arm", "now") else "right")
        for arm in self.study.arms:
            runs = self.study.runs_of(arm)
            looks = [(run, self._looks[run.name]) for run in runs]
            done = [look for _, look in looks if look.status == DONE]
            going = [(run, look) for run, look in looks if look.status == RUNNING]
            others = [(run, look) for run, look in looks if look.status in (FAILED, STOPPED)]
            seeds = Text(", ".join(f"seed {run.seed}" for run, _ in going), COLORS[RUNNING])
            for run, look in others:
                seeds.append(f"{'  ' if seeds else ''}{look.status} {run.seed}", COLORS[look.status])
            latest = going[-1][1] if going else None
            table.add_row(
                Text(arm.name + (" *" if arm.name == self.study.baseline else "")),
                f"{len(done)}/{len(runs)}",
                seeds,
                f"{latest.step}/{arm.num_steps}" if latest else "",
                _number(latest.last.get("loss") if latest else None),
                _number(_mean([look.last.get(self.study.metric) for look in done])),
            )
        total, units = len(self.study.runs), self._units()
        left = self.eta()
        done = sum(look.status == DONE for look in self._looks.values())
        words = f"{done} of {total} runs, {clock(self._lasted())}" + (f", {clock(left)} left" if left else "")
        bar = Table.grid(padding=(0, 2))
        bar.add_row(ProgressBar(total=total, completed=units, width=40), words)
        return Group(table, "", bar)

    def _line(self, run: RunOf, look: Look) -> str:
        done = sum(look.status == DONE for look in self._looks.values())
        count = f"[{done}/{len(self.study.runs)}]"
        if look.status == DONE:
            value = look.last.get(self.study.metric)
            found = f"{self.study.metric} {value:.4f}" if value is not None else f"no {self.study.metric}"
            left = self.eta()
            words = f", {clock(left)} left" if left else ""
            return f"{count} done     {run.name}: {found}, {clock(look.seconds)}{words}"
        if look.status == FAILED:
            return f"{count} failed   {run.name}: {look.error}; log {run.folder / 'log.txt'}"
        if look.status == RUNNING:
            going_on = f", from step {look.step}" if look.step else ""
            return f"{count} started  {run.name}{going_on}"
        return f"{count} {look.status:8} {run.name}, step {look.step}"

    def _units(self) -> float:
        """Runs that are done, and shares of those that are not."""
        return sum(self._share(run) for run in self.study.runs)

    def _share(self, run: RunOf) -> float:
        look = self._looks[run.name]
        return 1.0 if look.status == DONE else 0.98 * min(look.step / run.arm.num_steps, 1.0)

    def _lasted(self) -> float:
        return time.perf_counter() - self._began


def make_console() -> Console:
    """Standard output; a notebook or a CI that asks for colors is no terminal yet."""
    return Console() if sys.stdout.isatty() else Console(force_terminal=False, no_color=True, width=160)


def clock(seconds: float) -> str:
    """Seconds as 0:01:15."""
    return str(datetime.timedelta(seconds=round(seconds)))


def say(line: str) -> None:
    """Prints a line."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.4f}"
