"""How many rows the global batch of each step has: a few at first, more from level to level, then all.

The rule is Megatron's --rampup-batch-size: the batch grows by the same increment each time that the same share of the
samples has been seen. Sizes and places follow from the step's number alone, as the order of the data does.
"""

import bisect
from typing import NamedTuple


class Level(NamedTuple):
    """Steps with one batch size: the first of them, from 0, the rows that were seen before it, and the size."""

    step: int
    rows: int
    size: int


class BatchSizes:
    """The rows of every step's global batch.

    Args:
        size: B, of the batch once it is whole.
        rampup: (start, increment, samples): the first size, what it grows by, and the rows over which it grows; None is
            a batch that is whole from the start.

    Attributes:
        levels: in order.

    Raises:
        ValueError: the increments do not lead from the first size to the last.
    """

    def __init__(self, size: int, rampup: tuple[int, int, int] | None = None):
        self.size = size
        self.levels = [Level(0, 0, size)] if rampup is None else _levels(size, *rampup)

    def of(self, step: int) -> int:
        """The size of a step's batch; steps count from 0."""
        return self._level(step).size

    def before(self, step: int) -> int:
        """How many rows the steps before one had together: the place of its first row in the order of the data."""
        level = self._level(step)
        return level.rows + (step - level.step) * level.size

    def part(self, step: int, shard: tuple[int, int]) -> range:
        """The rows of a step's batch that one of `count` equal parts has.

        Args:
            step: from 0.
            shard: (index, count).
        """
        index, count = shard
        rows = self.of(step) // count
        return range(index * rows, (index + 1) * rows)

    def check_shards(self, count: int) -> None:
        """Refuses sizes that parts do not divide.

        Raises:
            ValueError: one is not divided.
        """
        wrong = [level.size for level in self.levels if level.size % count]
        if wrong:
            raise ValueError(f"global_batch_size = {wrong[0]}: {count} processes do not divide it")

    def _level(self, step: int) -> Level:
        return self.levels[bisect.bisect(self.levels, step, key=lambda level: level.step) - 1]


def _levels(size: int, start: int, increment: int, samples: int) -> list[Level]:
    given = f"train.batch_rampup = {(start, increment, samples)}"
    if min(start, increment, samples) < 1:
        raise ValueError(f"{given}: (start, increment, samples) are at least 1")
    if start >= size or (size - start) % increment:
        raise ValueError(
            f"{given}: steps of {increment} do not lead from {start} to train.global_batch_size = {size}"
        )
    count = (size - start) // increment
    levels, step, rows = [], 0, 0
    # rows * count // samples is how many increments the rows seen so far are worth, in whole numbers
    while (reached := min(rows * count // samples, count)) < count:
        here = start + reached * increment
        levels.append(Level(step, rows, here))
        steps = -(-((reached + 1) * samples - rows * count) // (count * here))
        step, rows = step + steps, rows + steps * here
    return [*levels, Level(step, rows, size)]
