"""The picture of a study: losses over steps with confidence bands, and where every run ended."""

import io
from collections import defaultdict
from typing import Any

import numpy as np

from train.sweeping.statistics import estimate
from train.sweeping.study import DONE, Arm
from train.sweeping.summary import Summary

COLORS = (
    "#3566a8",
    "#d1662b",
    "#3f8f4f",
    "#8d5aa8",
    "#b83b5e",
    "#6b6b6b",
    "#b8932b",
    "#2b9aa0",
    "#7a5230",
    "#c77dba",
)
MOST_LABELS = 12


def draw_study(summary: Summary, dpi: int = 120) -> bytes:
    """Draws a study as PNG.

    A line is the mean over the seeds, its band the 95 % interval; one seed has no band. Only runs that are done count.

    Args:
        summary: of the study.
        dpi: dots an inch.
    """
    from matplotlib.figure import Figure

    metric = summary.study.metric
    names = ["loss"] if metric == "loss" else ["loss", metric]
    height = max(4.2, 1.6 + 0.34 * len(summary.arms))
    figure = Figure(figsize=(4.6 * (len(names) + 1), height), dpi=dpi, layout="constrained")
    *panels, last = figure.subplots(1, len(names) + 1, squeeze=False).flat
    series = {name: _series(summary, name) for name in names}
    for axes, name in zip(panels, names, strict=True):
        _draw_curves(axes, summary, series[name])
        titles = {"loss": "training loss", "eval_loss": "held-out loss"}
        axes.set_title(titles.get(name, name), loc="left", fontweight="bold")
        axes.set_xlabel("step")
    last.set_title(_draw_ends(last, summary), loc="left", fontweight="bold")
    for axes in (*panels, last):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if 1 < len(summary.arms) <= MOST_LABELS and panels[0].lines:
        panels[0].legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def color_of(summary: Summary, arm: Arm) -> str:
    """The arm's color in all panels."""
    return COLORS[[row.arm.name for row in summary.arms].index(arm.name) % len(COLORS)]


def _series(summary: Summary, name: str) -> dict[str, dict[int, list[float]]]:
    """{arm: {step: values of its seeds}}."""
    found: dict[str, dict[int, list[float]]] = {row.arm.name: defaultdict(list) for row in summary.arms}
    for run, look in summary.runs:
        if look.status == DONE:
            for line in run.lines():
                if line.get(name) is not None:
                    found[run.arm.name][line["step"]].append(line[name])
    return found


def _draw_curves(axes: Any, summary: Summary, series: dict[str, dict[int, list[float]]]) -> None:
    from matplotlib.ticker import MaxNLocator

    means: list[float] = []
    for row in summary.arms:
        points = sorted(series[row.arm.name].items())
        if not points:
            continue
        steps = [step for step, _ in points]
        found = [value for _, values in points if (value := estimate(values))]
        color, mean = color_of(summary, row.arm), [value.mean for value in found]
        means += mean
        axes.plot(
            steps,
            mean,
            color=color,
            lw=1.5,
            label=row.arm.name,
            marker="o" if len(steps) < 12 else "",
            ms=3.5,
        )
        low = [value.mean if value.low is None else value.low for value in found]
        high = [value.mean if value.high is None else value.high for value in found]
        axes.fill_between(steps, low, high, color=color, alpha=0.15, lw=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if means:  # a band of two seeds may be as tall as a house
        room = max(np.ptp(means), 1e-3) * 0.08
        axes.set_ylim(min(means) - room, max(means) + room)


def _draw_ends(axes: Any, summary: Summary) -> str:
    """Where arms end: differences to the baseline, a dot a seed, if there are any; else the values themselves.

    Returns:
        The panel's title.
    """
    from matplotlib.ticker import MaxNLocator

    metric, baseline = summary.study.metric, summary.study.baseline
    values = summary.values
    against = values[baseline] if any(row.difference for row in summary.arms) else None
    dots: list[float] = []
    for at, row in enumerate(summary.arms):
        color, mine = color_of(summary, row.arm), values[row.arm.name]
        found = row.value
        if against is not None:
            mine = {seed: value - against[seed] for seed, value in mine.items() if seed in against}
            found = row.difference.estimate if row.difference else None
        if against is None or row.arm.name != baseline:
            dots += mine.values()
            axes.plot(list(mine.values()), [at] * len(mine), "o", color=color, alpha=0.4, ms=5, mew=0)
        if found is not None:
            reach = None if found.half is None else [[found.half], [found.half]]
            axes.errorbar(found.mean, at, xerr=reach, fmt="D", color=color, ms=4.5, capsize=3)
    if against is not None:
        axes.axvline(
            0.0,
            color=COLORS[[row.arm.name for row in summary.arms].index(baseline) % len(COLORS)],
            lw=1,
            ls="--",
        )
    names = [row.arm.name + ("\n(baseline)" if row.arm.name == baseline else "") for row in summary.arms]
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(axis="y", length=0)
    if len(summary.study.seeds) == 2 and dots:  # its interval may be as wide as a house
        room = max(np.ptp([0.0, *dots] if against is not None else dots), 1e-3)
        axes.set_xlim(min(dots) - room, max(dots) + room)
    return f"{metric} at the end" if against is None else f"{metric}: difference to baseline"
