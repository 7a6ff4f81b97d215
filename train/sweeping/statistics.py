"""What seeds tell: a mean with its interval, and how an arm differs from the baseline.

Intervals are Student's, 95 %. A difference is paired: the same seed gives both arms the same order of the data, and the
same first parameters as far as they have the same, so what a seed does to both cancels. Its p-value is that of the
paired t-test; where several arms are compared with one baseline, Holm's correction tells how likely it is to find any
so small (Holm, 1979, "A simple sequentially rejective multiple test procedure").
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: over seeds.
        deviation: the sample's standard deviation; None for one seed.
        low, high: the 95 % interval; None for one seed.
        count: seeds.
    """

    mean: float
    deviation: float | None
    low: float | None
    high: float | None
    count: int

    @property
    def half(self) -> float | None:
        """Half the interval's width."""
        return None if self.high is None else self.high - self.mean


@dataclasses.dataclass(frozen=True)
class Difference:
    """An arm less the baseline, over the seeds that both have.

    Attributes:
        estimate: of the differences.
        p: of the paired t-test; None for one seed, or where no difference varies.
        holm: p after Holm's correction over all arms; set by `corrected`.
    """

    estimate: Estimate
    p: float | None
    holm: float | None = None


def estimate(values: Sequence[float]) -> Estimate | None:
    """The mean of some values and its interval; None of no values.

    Args:
        values: one a seed.
    """
    if not len(values):
        return None
    array = np.asarray(values, np.float64)
    mean, count = float(array.mean()), len(array)
    if count == 1:
        return Estimate(mean, None, None, None, 1)
    deviation = float(array.std(ddof=1))
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * deviation / math.sqrt(count)
    return Estimate(mean, deviation, mean - half, mean + half, count)


def paired_difference(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """How an arm differs from the baseline.

    Args:
        arm, baseline: {seed: value}.

    Returns:
        None if they have no seed in common.
    """
    seeds = sorted(arm.keys() & baseline.keys())
    found = estimate([arm[seed] - baseline[seed] for seed in seeds])
    if found is None:
        return None
    if (
        not found.deviation
    ):  # of one seed nothing follows, nor where all differences are equal to the last bit
        return Difference(found, None)
    mine, theirs = ([values[seed] for seed in seeds] for values in (arm, baseline))
    return Difference(found, float(stats.ttest_rel(mine, theirs).pvalue))


def corrected(differences: Sequence[Difference | None]) -> list[Difference | None]:
    """The same differences with Holm's correction over those that have a p-value."""
    order = sorted(
        (difference.p, at)
        for at, difference in enumerate(differences)
        if difference and difference.p is not None
    )
    found, least = list(differences), 0.0
    for rank, (p, at) in enumerate(order):
        least = max(least, min(p * (len(order) - rank), 1.0))
        difference = found[at]
        assert difference is not None
        found[at] = dataclasses.replace(difference, holm=least)
    return found
