"""`python -m parallel.schedule_picture`: a pipeline schedule as text and as a picture.

Time runs to the right, one line of work a stage. A tick lasts as long as the dearest work in it: a forward pass counts
one, a backward pass two (`Schedule.bubble` counts the same way), so the empty area of the picture is the bubble.
"""

import dataclasses
import string
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro

from parallel.schedule import Schedule, make_schedule, table
from parallel.terminal import user_errors

EXAMPLES = """\
Shows a pipeline schedule: which stage takes which microbatch forward and back at which
tick, and the bubble, the share of the time in which a stage waits.

examples:
  python -m parallel.schedule_picture
  python -m parallel.schedule_picture --schedule gpipe --stages 4 --microbatches 12
  python -m parallel.schedule_picture --schedule interleaved --virtual-stages 2 --picture plan.png
  python -m parallel.schedule_picture --stacks 2    (an encoder-decoder: two chunks a stage)"""

MAX_CELLS = 100_000
"""Stages times ticks that are still a picture."""
FORWARD, BACKWARD = ("#9ecae1", "#6baed6", "#3182bd", "#08519c"), ("#fdd0a2", "#fdae6b", "#e6550d", "#a63603")


def summary(schedule: Schedule) -> str:
    """A line on a schedule: sizes, ticks, bubble and what a stage keeps."""
    stages, count, chunks = schedule.num_stages, schedule.num_microbatches, schedule.num_chunks
    each = f", {chunks} chunks a stage" if chunks > 1 else ""
    predicted = (stages - 1) / (chunks * count + stages - 1)
    return (
        f"{schedule.name}: {stages} stages, {count} microbatches{each}: {schedule.num_ticks} ticks, "
        f"bubble {schedule.bubble():.1%} by counting, {predicted:.1%} by (S-1)/({'C ' if chunks > 1 else ''}M+S-1); "
        f"a stage keeps the inputs of at most {schedule.num_in_flight} microbatches{' a chunk' if each else ''}"
    )


def as_text(schedule: Schedule) -> str:
    """The timetable as plain text: two lines a stage, forward and back, one column a tick; a dot is waiting.

    A number is a microbatch, a letter after it the chunk (a is the first).

    Returns:
        Lines without a newline at the end.
    """
    found, count = table(schedule), schedule.num_microbatches
    width = len(str(max(schedule.num_ticks - 1, count - 1))) + (1 if schedule.num_chunks > 1 else 0) + 1
    head = f"{'tick':9}" + "".join(f"{tick:{width}}" for tick in range(schedule.num_ticks))
    lines = [summary(schedule), "", head]
    for stage, row in enumerate(found):
        for i, name in enumerate(("F", "B")):
            cells = (f"{_cell(number, schedule):>{width}}" for number in row[:, i])
            lines.append(f"{f'stage {stage}' if i == 0 else '':8}{name}" + "".join(cells))
    return "\n".join(line.rstrip() for line in lines)


def draw_schedule(axes: Any, schedule: Schedule) -> None:
    """Draws the timetable: blue is forward, orange back, darker a later chunk, white waiting.

    Args:
        axes: matplotlib's.
        schedule: what to draw.
    """
    spans = list(_spans(schedule))
    end = _end(spans)
    size = 7 if end <= 130 else 7 * 130 / end
    for stage, direction, number, start, length in spans:
        chunk = number // schedule.num_microbatches
        shades = (FORWARD, BACKWARD)[direction]
        shade = min(chunk, len(shades) - 1)
        axes.broken_barh(
            [(start, length)], (stage - 0.4, 0.8), facecolor=shades[shade], edgecolor="white", linewidth=0.5
        )
        color = "white" if shade > 1 else "black"
        text = _cell(number, schedule)
        axes.text(start + length / 2, stage, text, ha="center", va="center", fontsize=size, color=color)
    axes.set(
        xlim=(0, end),
        ylim=(schedule.num_stages - 0.5, -0.5),
        yticks=range(schedule.num_stages),
        yticklabels=[f"stage {stage}" for stage in range(schedule.num_stages)],
        xlabel="time, in forward passes of a chunk (blue forward, orange backward)",
    )
    each = f", {schedule.num_chunks} chunks a stage" if schedule.num_chunks > 1 else ""
    count = f"{schedule.num_microbatches} microbatch{'es' if schedule.num_microbatches > 1 else ''}"
    axes.set_title(
        f"{schedule.name}: {count}{each}, bubble {schedule.bubble():.1%}",
        loc="left",
    )
    axes.spines[["top", "right"]].set_visible(False)


def save_picture(schedule: Schedule, path: Path) -> None:
    """Draws the timetable into a file of its own.

    Args:
        schedule: what to draw.
        path: of the picture; its ending says the format, such as .png.

    Raises:
        ValueError: a format that matplotlib does not know.
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    end = _end(_spans(schedule))
    # Cells stay readable up to what a screen holds.
    figure = Figure(
        figsize=(min(40.0, 2.0 + 0.3 * end), 1.2 + 0.55 * schedule.num_stages), layout="constrained"
    )
    known = sorted(figure.canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".") not in known:
        raise ValueError(f"cannot draw {str(path)!r}: its ending is one of {', '.join(known)}")
    draw_schedule(figure.subplots(), schedule)
    figure.savefig(path, dpi=120)


def _end(spans: Iterable[tuple[int, int, int, int, int]]) -> int:
    return max(start + length for *_, start, length in spans)


def _cell(number: int, schedule: Schedule) -> str:
    """A microbatch and, where there are several, its chunk; a dot for none."""
    if number < 0:
        return "."
    chunk, microbatch = divmod(int(number), schedule.num_microbatches)
    letters = string.ascii_lowercase
    return f"{microbatch}{letters[chunk % len(letters)] if schedule.num_chunks > 1 else ''}"


def _spans(schedule: Schedule) -> Iterator[tuple[int, int, int, int, int]]:
    """(stage, 0 for forward or 1 for backward, number as in `table`, when, how long) of all work."""
    found, start = table(schedule), 0
    for tick in range(schedule.num_ticks):
        for direction, length in enumerate((1, 2)):
            numbers = found[:, tick, direction]
            yield from ((s, direction, int(n), start, length) for s, n in enumerate(numbers) if n >= 0)
            start += length if (numbers >= 0).any() else 0


@dataclasses.dataclass(frozen=True)
class Flags:
    """The command line."""

    schedule: str = "1f1b"
    """1f1b, gpipe or interleaved."""
    stages: int = 4
    """Stages of the pipeline."""
    microbatches: int = 8
    """Pieces that the batch is cut into."""
    virtual_stages: int | None = None
    """Pieces of the model that each stage holds. By default 2 where interleaved, else 1."""
    stacks: int = 1
    """Stacks of layers that the model runs one after another: 2 for an encoder-decoder."""
    picture: Path | None = None
    """A file to draw it into, such as schedule.png."""


def main(args: Sequence[str] | None = None) -> None:
    """Reads the flags, prints the timetable and draws it.

    Args:
        args: the flags; None are those of the command line.
    """
    flags = tyro.cli(
        Flags,
        prog="python -m parallel.schedule_picture",
        args=args,
        description=EXAMPLES,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    with user_errors():
        for name in ("stages", "microbatches", "virtual_stages", "stacks"):
            value = getattr(flags, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: it is at least 1")
        virtual = flags.virtual_stages or (2 if flags.schedule == "interleaved" else 1)
        schedule = make_schedule(flags.schedule, flags.stages, flags.microbatches, virtual, flags.stacks)
        cells = schedule.num_stages * schedule.num_ticks
        if cells > MAX_CELLS:
            raise ValueError(f"{cells:,} stages x ticks are more than the {MAX_CELLS:,} that a picture holds")
        if flags.picture is not None:
            save_picture(schedule, flags.picture)
        sys.stdout.write(as_text(schedule) + "\n")
        if flags.picture is not None:
            sys.stdout.write(f"picture: {flags.picture}\n")


if __name__ == "__main__":
    main()
