"""Pipeline schedules: which stage does what at which tick, and what that costs.

A model is a chain of chunks: chunk c of stage s is link c S + s of the chain, so that a microbatch walks through
stages 0 ... S-1, returns to stage 0 for the next chunk, and so on. A tick is the time of one chunk's work on one
microbatch; in a tick a stage takes at most one microbatch forward and one back. All stages tick together, each one
tick behind its neighbour.

    gpipe        all forwards, then all backwards (Huang et al., 2019, arXiv:1811.06965): memory grows with M
    1f1b         a microbatch goes back as soon as it has arrived (Narayanan et al., 2019, arXiv:1806.03377;
                 2021, arXiv:2104.04473): memory is that of 2 S - 1 microbatches
    interleaved  1f1b with several chunks a stage (arXiv:2104.04473, section 2.2): a smaller bubble, more traffic
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

SCHEDULES = ("1f1b", "gpipe", "interleaved")


class Slot(NamedTuple):
    """What a stage does at a tick: microbatch m of chunk c, if `live`. Python numbers or arrays alike."""

    microbatch: Any
    chunk: Any
    live: Any


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A schedule's timetable.

    Attributes:
        name: one of SCHEDULES.
        num_stages: S.
        num_microbatches: M.
        num_chunks: C, chunks of every stage; more than one needs M to be a multiple of S.
    """

    name: str
    num_stages: int
    num_microbatches: int
    num_chunks: int = 1

    @property
    def num_forward_ticks(self) -> int:
        """Ticks from the first forward to the last."""
        return self.num_microbatches * self.num_chunks + self.num_stages - 1

    @property
    def first_backward(self) -> int:
        """The tick at which the first microbatch turns round at the last stage."""
        if self.name == "gpipe":
            return self.num_forward_ticks
        return self.num_chunks * self.num_stages - 1

    @property
    def num_ticks(self) -> int:
        """Ticks of a whole step."""
        return self.first_backward + self.num_forward_ticks

    def forward(self, tick: Any, stage: Any) -> Slot:
        """What a stage takes forward at a tick."""
        return self._slot(tick - stage, lambda chunk: chunk)

    def backward(self, tick: Any, stage: Any) -> Slot:
        """What a stage takes back at a tick."""
        turned = tick - self.first_backward - (self.num_stages - 1 - stage)
        return self._slot(turned, lambda chunk: self.num_chunks - 1 - chunk)

    def _slot(self, turn: Any, order: Any) -> Slot:
        # Microbatches go round in groups of S: the last of a group enters a chunk as the first one leaves it.
        size = self.num_stages * self.num_chunks
        live = (turn >= 0) & (turn < self.num_microbatches * self.num_chunks)
        if self.num_chunks == 1:
            return Slot(turn, turn * 0, live)
        group, rest = turn // size, turn % size
        return Slot(group * self.num_stages + rest % self.num_stages, order(rest // self.num_stages), live)

    @property
    def num_in_flight(self) -> int:
        """Microbatches whose input a stage must keep for one chunk, at most."""
        most = 1
        for stage in range(self.num_stages):
            for chunk in range(self.num_chunks):
                came = self._when(self.forward, stage, chunk)
                left = self._when(self.backward, stage, chunk)
                for tick in set(came.values()):
                    there = [m for m in came if came[m] <= tick <= left[m]]
                    most = max(most, there[-1] - there[0] + 1)
        return most

    def num_waiting(self, chunk: int) -> int:
        """Microbatches, at most, that have left the last stage's `chunk` and whose gradient has not come back to it."""
        last = self.num_stages - 1
        came, left = (self._when(direction, last, chunk) for direction in (self.forward, self.backward))
        return max(sum(came[m] <= tick <= left[m] for m in came) for tick in came.values())

    def _when(self, direction: Any, stage: int, chunk: int) -> dict[int, int]:
        ticks = ((direction(tick, stage), tick) for tick in range(self.num_ticks))
        return {slot.microbatch: tick for slot, tick in ticks if slot.live and slot.chunk == chunk}

    def bubble(self) -> float:
        """The share of a stage's time in which it waits: (S - 1) / (C M + S - 1), by counting ticks.

        A tick lasts as long as the dearest work in it; a backward is counted as two forwards.
        """
        spent = useful = 0
        for tick in range(self.num_ticks):
            forward, backward = (
                [direction(tick, stage).live for stage in range(self.num_stages)]
                for direction in (self.forward, self.backward)
            )
            spent += self.num_stages * (any(forward) + 2 * any(backward))
            useful += sum(forward) + 2 * sum(backward)
        return 1.0 - useful / spent


def check_layers(num_layers: int, num_stages: int, virtual_stages: int = 1) -> None:
    """Refuses layers that the stages do not divide.

    Raises:
        ValueError: they do not; names the nearest number of stages that does.
    """
    if num_layers % (num_stages * virtual_stages) == 0:
        return
    works = max(n for n in range(1, num_stages + 1) if num_layers % (n * virtual_stages) == 0 or n == 1)
    each = f" x virtual_stages={virtual_stages}" if virtual_stages > 1 else ""
    raise ValueError(
        f"{num_layers} layers do not divide over stage={num_stages}{each}: the nearest that works is stage={works}"
    )


def make_schedule(
    name: str, num_stages: int, num_microbatches: int, num_chunks: int = 1, num_stacks: int = 1
) -> Schedule:
    """A timetable, checked.

    Args:
        name: one of SCHEDULES.
        num_stages: S.
        num_microbatches: M.
        num_chunks: virtual stages that each stage holds of every stack; "interleaved" alone has more than one.
        num_stacks: stacks that a model runs one after another: 2 for an encoder-decoder.

    Raises:
        ValueError: an unknown name, or counts that do not go together; says which would.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule {name!r} is unknown: choose from {', '.join(SCHEDULES)}")
    if name == "interleaved" and num_chunks < 2:
        raise ValueError(f"virtual_stages = {num_chunks}: an interleaved schedule has at least 2 a stage")
    if name != "interleaved" and num_chunks != 1:
        raise ValueError(f"virtual_stages = {num_chunks}: the schedule {name!r} has 1; interleaved has more")
    total = num_chunks * num_stacks
    if total > 1 and num_microbatches % num_stages:
        nearest = -(-num_microbatches // num_stages) * num_stages
        why = "an interleaved schedule" if num_chunks > 1 else "an encoder-decoder"
        raise ValueError(
            f"microbatches = {num_microbatches} is no multiple of stage = {num_stages}, as {why} needs: "
            f"the nearest that works is {nearest}"
        )
    return Schedule(name, num_stages, num_microbatches, total)


def table(schedule: Schedule) -> np.ndarray:
    """The timetable as numbers.

    Returns:
        int [stages, ticks, 2]: the microbatch taken forward and the one taken back, chunk * M + microbatch, or -1.
    """
    found = np.full((schedule.num_stages, schedule.num_ticks, 2), -1)
    for stage in range(schedule.num_stages):
        for tick in range(schedule.num_ticks):
            for i, direction in enumerate((schedule.forward, schedule.backward)):
                slot = direction(tick, stage)
                if slot.live:
                    found[stage, tick, i] = slot.chunk * schedule.num_microbatches + slot.microbatch
    return found
