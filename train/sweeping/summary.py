"""A study in numbers: a row for each arm and a row for each run, of whatever is done."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from train.sweeping.statistics import Difference, Estimate, corrected, estimate, paired_difference
from train.sweeping.study import DONE, FAILED, Arm, Look, RunOf, Study


@dataclasses.dataclass(frozen=True)
class ArmRow:
    """One arm.

    Attributes:
        arm: which.
        value: of the metric over the runs that are done; None if none is.
        difference: to the baseline; None for the baseline itself.
        seconds: of a run, on average.
        speed: tokens a second, the median of a run's lines, on average.
        done: runs that are.
        failed: runs that failed.
        count: runs in all.
    """

    arm: Arm
    value: Estimate | None
    difference: Difference | None
    seconds: float | None
    speed: float | None
    done: int
    failed: int
    count: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """A study.

    Attributes:
        study: which.
        arms: a row for each, in the study's order.
        runs: every run and how it stands.
        notes: what a reader has to know beside the numbers.
        values: {arm's name: {seed: the metric at the end}} of runs that are done and have it.
    """

    study: Study
    arms: list[ArmRow]
    runs: list[tuple[RunOf, Look]]
    notes: list[str]
    values: Mapping[str, Mapping[int, float]]

    @property
    def num_compared(self) -> int:
        """Arms whose difference to the baseline has a p-value."""
        return sum(row.difference is not None and row.difference.p is not None for row in self.arms)

    @property
    def best(self) -> str | None:
        """The arm with the best mean; None if fewer than two have one."""
        found = [(row.value.mean, row.arm.name) for row in self.arms if row.value]
        if len(found) < 2:
            return None
        return max(found)[1] if self.study.higher_is_better else min(found)[1]


def summarize(study: Study) -> Summary:
    """Reads every run of a study and does the statistics.

    Args:
        study: done or not.
    """
    runs = [(run, run.look()) for run in study.runs]
    values: dict[str, dict[int, float]] = {arm.name: {} for arm in study.arms}
    for run, look in runs:
        value = look.last.get(study.metric)
        if look.status == DONE and value is not None:
            values[run.arm.name][run.seed] = value
    base = values[study.baseline]
    differences = corrected(
        [
            None if arm.name == study.baseline else paired_difference(values[arm.name], base)
            for arm in study.arms
        ]
    )
    rows = []
    for arm, difference in zip(study.arms, differences, strict=True):
        mine = [(run, look) for run, look in runs if run.arm.name == arm.name]
        done = [(run, look) for run, look in mine if look.status == DONE]
        rows.append(
            ArmRow(
                arm=arm,
                value=estimate(list(values[arm.name].values())),
                difference=difference,
                seconds=_mean([look.seconds for _, look in done]),
                speed=_mean([speed for run, _ in done if (speed := speed_of(run))]),
                done=len(done),
                failed=sum(look.status == FAILED for _, look in mine),
                count=len(mine),
            )
        )
    return Summary(study, rows, runs, _notes(study, rows, runs, values), values)


def speed_of(run: RunOf) -> float | None:
    """Tokens a second, the median of a run's lines; None if it has none yet."""
    speeds = sorted(line["tokens_per_second"] for line in run.lines() if line.get("tokens_per_second"))
    return speeds[len(speeds) // 2] if speeds else None


def _notes(
    study: Study, rows: Sequence[ArmRow], runs: Sequence[tuple[RunOf, Look]], values: Any
) -> list[str]:
    notes = []
    done = sum(row.done for row in rows)
    if done < len(runs):
        failed = sum(row.failed for row in rows)
        words = f", {failed} failed" if failed else ""
        notes.append(f"{done} of {len(runs)} runs are done{words}: the figures are of those.")
    if len(study.seeds) == 1:
        notes.append(
            "One seed: there is no interval and no p-value; a difference may be that of the seed alone."
        )
    elif len(study.seeds) == 2:
        notes.append(
            "Two seeds: intervals are 12.7 standard errors wide on either side; three seeds make them 4.3."
        )
    if done and not any(values.values()):
        known = sorted({name for _, look in runs if look.status == DONE for name in look.last})
        notes.append(f"No run has {study.metric}; they have {', '.join(known)}: choose one by --metric.")
    if study.baseline and not values[study.baseline] and done:
        notes.append(f"The baseline, {study.baseline}, has no value yet: there are no differences.")
    compared = sum(1 for row in rows if row.difference and row.difference.p is not None)
    if compared > 1:
        notes.append(f"p (Holm) is p corrected for the {compared} comparisons with the baseline.")
    missing = done - sum(len(found) for found in values.values())
    if missing and any(values.values()):
        notes.append(f"{missing} of the runs that are done have no finite {study.metric} and are left out.")
    return notes


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
