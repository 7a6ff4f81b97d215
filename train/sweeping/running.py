"""One run of a study: `python -m train` in a process of its own, its log, and what became of it.

The process is in a session of its own, so that a terminal's Ctrl-C reaches it once, through the study, and not twice.
It holds the lock of its folder; if the study is killed, the system sends it SIGTERM, it saves and ends, and the next
start of the study waits for that.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from train.sweeping.study import COMMAND, DONE, FAILED, LOG, RUNNING, STATE, STOPPED, lock, write_whole

STOP = "stop"
"""A file of the study's folder: while it is there, runs on other machines save and stop."""
LOOK_SECONDS = 0.1
_ERROR_BYTES = 16_384
_WHEN_ASKED = {-signal.SIGTERM, -signal.SIGINT, -signal.SIGKILL, 128 + signal.SIGTERM, 128 + signal.SIGINT}
"""Exit codes of a run that was asked to stop."""

# What the process does before it becomes `python -m train`: it asks to be told of its parent's end (on Linux), and
# keeps to its own cores. It ignores the signals for submitit, which SLURM sends to every process of a job.
# Not a preexec_fn: forking a process that has threads, as jax makes them, may hang.
_BEFORE = """
import os, signal, sys
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
signal.signal(signal.SIGUSR2, signal.SIG_IGN)
parent, cores, *command = sys.argv[1:]
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, 15)
    if os.getppid() != int(parent):
        sys.exit(143)
    if cores:
        os.sched_setaffinity(0, map(int, cores.split(",")))
os.execv(command[0], command)
"""


@dataclasses.dataclass(frozen=True)
class Job:
    """What it takes to start a run, on whatever machine.

    Attributes:
        name: for messages.
        folder: of the run, absolute.
        arguments: of `python -m train`.
        num_steps: of the run.
        workplace: the working folder, that gin files and data are found from.
        variables: of the environment, to be added.
        stop: the study's stop file.
    """

    name: str
    folder: str
    arguments: tuple[str, ...]
    num_steps: int
    workplace: str
    variables: Mapping[str, str]
    stop: str

    @property
    def command(self) -> list[str]:
        """The run's command."""
        return [sys.executable, "-m", "train", *self.arguments]

    def script(self) -> str:
        """The command as a shell script."""
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in self.variables.items())
        return (
            f"#!/bin/sh\n# {self.name}\ncd {shlex.quote(self.workplace)} || exit\n{exports}"
            f"exec {shlex.join(self.command)}\n"
        )


@dataclasses.dataclass(frozen=True)
class Watch:
    """The study, as what starts its runs sees it.

    Attributes:
        tick: to be called at every look.
        stopping: 0; or 1 once the runs are to save and stop, which their stop file tells them on other machines; or 2
            to end them at once.
        tell: says what is not in a run's own folder.
    """

    tick: Callable[[], None]
    stopping: Callable[[], int]
    tell: Callable[[str], None]

    def tell_error(self, job: Job, error: BaseException) -> None:
        """Says what became of a job elsewhere, by the last line of it."""
        told = [line for line in str(error).splitlines() if line.strip()]
        self.tell(f"{job.name}: {told[-1].strip() if told else type(error).__name__}")


def check_installed(launcher: str) -> None:
    """Checks that the package of a launcher, "ray" or "slurm", is there.

    Raises:
        ValueError: it is not.
    """
    package = {"ray": "ray", "slurm": "submitit"}[launcher]
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"--launcher {launcher}: the package {package} is not installed: pip install 'flaxtron[sweep]'"
        )


class Process:
    """A run that has been started.

    Args:
        job: which.
        variables: of the environment, beside the job's own.
        cores: of this machine, to keep to; () is all.

    Raises:
        BlockingIOError: an earlier start still has the folder.
        OSError: the folder cannot be written.
    """

    def __init__(self, job: Job, variables: Mapping[str, str] | None = None, cores: Sequence[int] = ()):
        self.job, self._folder = job, Path(job.folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._held = lock(self._folder)
        if self._held is None:
            raise BlockingIOError(f"{job.folder}: an earlier start of this run is still ending")
        try:
            write_whole(self._folder / COMMAND, job.script())
            self._began, self._asked = time.time(), False
            self._note(RUNNING)
            head = f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} on {socket.gethostname()}: {shlex.join(job.command)}\n"
            with (self._folder / LOG).open("ab") as log:
                log.write(head.encode())
                log.flush()
                self._from = log.tell()
                self._process = subprocess.Popen(
                    [
                        sys.executable,
                        "-c",
                        _BEFORE,
                        str(os.getpid()),
                        ",".join(map(str, cores)),
                        *job.command,
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=job.workplace,
                    env={**os.environ, **job.variables, **(variables or {})},
                    start_new_session=True,
                    pass_fds=(self._held,),
                )
        except BaseException:
            self.leave()
            raise

    def ended(self) -> str | None:
        """How the run ended, noted in its run.json: done, failed or stopped; None while it goes on."""
        code = self._process.poll()
        if code is None:
            return None
        if code == 0:
            status, error = DONE, ""
        elif self._asked and code in _WHEN_ASKED:
            status, error = STOPPED, ""
        else:
            status, error = FAILED, last_error(self._folder / LOG, self._from, code)
        self._note(status, code, error)
        self.leave()
        return status

    def stop(self, at_once: bool = False) -> None:
        """Asks the run to save and stop, once; or ends it at once."""
        if not self._asked or at_once:
            self._asked = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL if at_once else signal.SIGTERM)

    def leave(self) -> None:
        """Leaves the folder to the process, which has it until it ends, and then to the next start.

        A run that has ended holds its folder until that is noted: else whoever looked between would take it for one
        that was cut off.
        """
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def _note(self, status: str, code: int | None = None, error: str = "") -> None:
        now = time.time()
        state: dict[str, Any] = {"status": status, "num_steps": self.job.num_steps, "began": self._began}
        state |= {"host": socket.gethostname()}
        if code is not None:
            state |= {"ended": now, "exit_code": code, "error": error}
        write_whole(self._folder / STATE, json.dumps(state, indent=1) + "\n")


def run_to_end(job: Job, on_start: Callable[["Process"], None] | None = None) -> str:
    """Runs one job where this is called, as a worker of Ray or SLURM does; the study's stop file stops it.

    Args:
        job: which.
        on_start: told of the process.

    Returns:
        done, failed or stopped.

    Raises:
        OSError: this machine does not see the study's folder.
    """
    if not Path(job.stop).parent.is_dir():
        raise OSError(
            f"{socket.gethostname()} does not see {Path(job.stop).parent}: give --workdir in a folder that all "
            "machines share"
        )
    while not Path(job.stop).exists():
        try:
            process = Process(job)
        except BlockingIOError:
            time.sleep(LOOK_SECONDS)
            continue
        if on_start is not None:
            on_start(process)
        try:
            while (status := process.ended()) is None:
                if Path(job.stop).exists():
                    process.stop()
                time.sleep(LOOK_SECONDS)
        except BaseException:
            process.stop()
            process.leave()
            raise
        return status
    return STOPPED


def last_error(log: Path, start: int = 0, code: int | None = None) -> str:
    """The line of a log that says what went wrong: the last `error: ...`, or the last line of a traceback.

    Args:
        log: the file.
        start: where the run's output begins in it, in bytes.
        code: the process's exit code; below 0 it is a signal's number.
    """
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(start, size - _ERROR_BYTES))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    lines = [line for line in lines if line]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt|Exit)\b", line)]
    return next(iter([*told[-1:], *raised[-1:], *lines[-1:]]), f"exit code {code}, nothing said")
