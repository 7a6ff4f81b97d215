"""Where a run's time goes, over all its restarts: in steps that count, and in everything else.

WORKDIR/goodput.json holds a record for each time that the run was started:

    startup      from the program's begin to the first step: imports, data, restoring
    compile      the first step, which the compiler takes
    input        waiting for a batch while the device had nothing else to do
    checkpoint   what saving kept the loop from going on
    evaluation   on what is held out
    steps        the rest of the loop

Steps that a later start had to take again are lost, and count as a restart, as do the startup and compile of later
starts.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KINDS: tuple[str, ...] = ("steps", "input", "compile", "checkpoint", "evaluation", "startup")


class Goodput:
    """The clock of one start of a run.

    Args:
        file: the record; None keeps none.
        start_step: steps taken before.
        began: when the program began, as time.time() tells it; None is now.
    """

    def __init__(self, file: Path | None, start_step: int, began: float | None = None):
        self._file = file
        self.spent: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        now = time.time()
        began = now if began is None else began
        self._session: dict[str, Any] = {
            "began": began,
            "first": start_step,
            "last": start_step,
            "seconds": self.spent,
        }
        self.spent["startup"] = now - began
        self._earlier: list[dict[str, Any]] = []
        if file is not None and start_step:
            with contextlib.suppress(OSError, ValueError):
                self._earlier = json.loads(file.read_text())

    @contextlib.contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """Counts the block's time as of a kind."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.spent[kind] += time.perf_counter() - begun

    def reach(self, step: int, seconds: float, kind: str = "steps") -> None:
        """Notes steps and writes the record.

        Args:
            step: the last one.
            seconds: since the last call, without what `during` counted.
            kind: "steps", or "compile" of the first one.
        """
        self.spent[kind] += max(seconds, 0.0)
        self._session["last"] = step
        self.write()

    def write(self) -> None:
        """Writes the record."""
        if self._file is not None:
            aside = self._file.with_suffix(".tmp")
            aside.write_text(json.dumps([*self._earlier, self._session], indent=1) + "\n")
            os.replace(aside, self._file)

    def shares(self) -> dict[str, float]:
        """Shares of the time of all starts together, which add up to one; see `shares_of`."""
        return shares_of([*self._earlier, self._session])


def shares_of(sessions: list[dict[str, Any]]) -> dict[str, float]:
    """Shares of the time of all starts of a run.

    Args:
        sessions: as in goodput.json.

    Returns:
        {"steps": those that count, "input", "compile", "checkpoint", "evaluation", "startup", "restart"}.
    """
    total: dict[str, float] = dict.fromkeys((*KINDS, "restart"), 0.0)
    for number, session in enumerate(sessions):
        following = sessions[number + 1]["first"] if number + 1 < len(sessions) else session["last"]
        taken = session["last"] - session["first"]
        lost = max(session["last"] - following, 0) / taken if taken else 0.0
        for kind, seconds in session["seconds"].items():
            again = 1.0 if number and kind in ("startup", "compile") else lost if kind == "steps" else 0.0
            total["restart"] += again * seconds
            total[kind] += (1 - again) * seconds
    whole = sum(total.values())
    return {kind: seconds / whole for kind, seconds in total.items()} if whole else total


def describe(shares: dict[str, float]) -> str:
    """The shares as a line, the largest first."""
    words = {"steps": "in steps", "input": "waiting for input", "restart": "restarting"}
    found = sorted(((share, kind) for kind, share in shares.items() if share >= 0.0005), reverse=True)
    return ", ".join(f"{share:.1%} {words.get(kind, kind)}" for share, kind in found)
