"""A plan's page: memory by class, collectives by axis, a roofline by phase; as text, as data and as a picture.

What a compiler said and what arithmetic says stand apart, and a predicted time is never called measured.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.console import Group as Stacked
from rich.table import Table

from parallel.chips import GIB, Link
from parallel.report import format_bytes
from parallel.roofline import ASSUMPTIONS, LIMITS, Forecast

KEPT = "saved activations"
PADDING = "padding"
PICTURES = (".svg", ".png")
COLORS = ("#08519c", "#3182bd", "#6baed6", "#9ecae1", "#e6550d", "#fdae6b", "#fdd0a2", "#bdbdbd")


@dataclasses.dataclass(frozen=True)
class Sent:
    """What a step sends over one axis in one kind of collective.

    Attributes:
        kind: of collective.
        axes: of the mesh.
        count: runs in a step; None where it is not counted.
        sent: bytes that one chip sends in a step.
        what: is sent, or which part of the model sends it.
        crosses: from slice to slice; None where only the axis says so.
    """

    kind: str
    axes: tuple[str, ...]
    count: int | None
    sent: float
    what: str
    crosses: bool | None = None


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler said of the program.

    Attributes:
        arguments: bytes on one chip by class; `padding` beyond them.
        argument_size_in_bytes, temp_size_in_bytes, output_size_in_bytes, alias_size_in_bytes,
        generated_code_size_in_bytes: the compiler's own figures.
        flops: products that one chip computes, loops counted as often as they turn.
        sent: its collectives.
        seconds: that compiling took.
        kept: bytes of the temporaries that layers keep for their way back; 0 where that is not told.
        compiler: its name and version.
        peak_memory_in_bytes: the most that lives at once, arguments included; 0 where that is not told.
    """

    arguments: Mapping[str, int]
    argument_size_in_bytes: int
    temp_size_in_bytes: int
    output_size_in_bytes: int
    alias_size_in_bytes: int
    generated_code_size_in_bytes: int
    flops: float
    sent: Sequence[Sent]
    seconds: float
    kept: int = 0
    compiler: str = "libtpu"
    peak_memory_in_bytes: int = 0

    @property
    def needed(self) -> int:
        """Bytes without which the program does not run: temporaries that never live together share room."""
        return (
            self.peak_memory_in_bytes + self.generated_code_size_in_bytes
            if self.peak_memory_in_bytes
            else self.total
        )

    @property
    def total(self) -> int:
        """Bytes of one chip's arguments, temporaries, results and program, each counted by itself."""
        outputs = self.output_size_in_bytes - self.alias_size_in_bytes
        return (
            self.argument_size_in_bytes
            + self.temp_size_in_bytes
            + outputs
            + self.generated_code_size_in_bytes
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """A plan of one program on one topology.

    Attributes:
        title: what is planned.
        layout: the mesh, as `parallel.layouts` writes it.
        forecast: phases and times.
        memory: bytes on one chip by class, by arithmetic.
        messages: what is sent, by arithmetic.
        compiled: what the compiler said, or None.
        without: why it said nothing.
        figures: further lines: (name, text).
    """

    title: str
    layout: str
    forecast: Forecast
    memory: Mapping[str, int]
    messages: Sequence[Sent]
    compiled: Compiled | None = None
    without: str = ""
    figures: Sequence[tuple[str, str]] = ()

    @property
    def predicted_bytes(self) -> int:
        """That one chip holds, by arithmetic."""
        return sum(self.memory.values())

    @property
    def held_bytes(self) -> int:
        """That one chip has to have: the compiler's figure where there is one."""
        return self.predicted_bytes if self.compiled is None else self.compiled.needed

    @property
    def fits(self) -> bool:
        """Whether the chip's memory holds that."""
        return self.held_bytes <= self.forecast.topology.chip.hbm_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        chip = self.forecast.topology.chip
        found: dict[str, Any] = {
            "title": self.title,
            "topology": str(self.forecast.topology),
            "mesh": dict(self.forecast.mesh),
            "layout": self.layout,
            "fits": self.fits,
            "hbm_bytes": chip.hbm_bytes,
            "held_bytes": self.held_bytes,
            "compiled": self.compiled is not None,
            "analytic_memory_bytes": dict(self.memory) | {"total": self.predicted_bytes},
            "analytic_collectives": [dataclasses.asdict(one) for one in self.messages],
        }
        if self.compiled is None:
            found["without_compiler"] = self.without
        else:
            fields = dataclasses.asdict(self.compiled)
            found |= {name: fields[name] for name in fields if name.endswith("_in_bytes")}
            found |= {
                "argument_bytes_by_class": fields["arguments"],
                "compiled_flops_per_chip": fields["flops"],
                "compiled_collectives": fields["sent"],
                "kept_activation_bytes": fields["kept"],
                "compile_seconds": fields["seconds"],
                "analytic_memory_error": self.predicted_bytes / self.compiled.total - 1,
            }
        return found | self.forecast.to_dict() | dict(self.figures)

    def __rich__(self) -> Stacked:
        return Stacked(*self._parts())

    def _parts(self) -> Iterator[Any]:
        forecast, chip = self.forecast, self.forecast.topology.chip
        verdict = "fits" if self.fits else "DOES NOT FIT"
        source = "by the compiler's account" if self.compiled else "by arithmetic alone"
        yield f"{self.title}\non {forecast.topology} ({forecast.topology.size} chips), mesh {self.layout}"
        yield (
            f"{verdict}: {self.held_bytes / GIB:.2f} GiB of {chip.hbm_bytes / GIB:.2f} GiB a chip, {source}"
            + (f" (compiled in {self.compiled.seconds:.0f} s, nothing allocated)" if self.compiled else "")
        )
        if self.without:
            yield self.without
        yield ""
        yield self._memory_table()
        yield self._sent_table()
        yield self._phases_table()
        yield self._prediction()

    def _memory_table(self) -> Table:
        compiled = self.compiled
        table = Table(title="memory of one chip", title_justify="left")
        table.add_column("class")
        table.add_column("arithmetic", justify="right")
        if compiled:
            table.add_column("compiler", justify="right")
        shown: dict[str, tuple[float | None, float | None]] = {
            name: (size, compiled.arguments.get(name) if compiled else None)
            for name, size in self.memory.items()
            if not compiled or name != PADDING
        }
        if compiled:
            arguments = compiled.argument_size_in_bytes
            shown["batch, padding"] = (
                self.memory.get(PADDING),
                arguments - sum(compiled.arguments.get(n, 0) for n in self.memory),
            )
            inner = [n for n in self.memory if n not in compiled.arguments and n != PADDING]
            for name in inner:
                shown[name] = (self.memory[name], compiled.kept or None if name == KEPT else None)
            shown["all temporaries"] = (sum(self.memory[n] for n in inner), compiled.temp_size_in_bytes)
            outputs = compiled.output_size_in_bytes - compiled.alias_size_in_bytes
            shown["program, results"] = (None, outputs + compiled.generated_code_size_in_bytes)
        for name, sizes in shown.items():
            table.add_row(name, *(_or_dash(size) for size in sizes[: 2 if compiled else 1]))
        table.add_section()
        if compiled:
            error = self.predicted_bytes / compiled.total - 1
            total = f"{format_bytes(self.predicted_bytes)} ({error:+.1%})"
            table.add_row("total", total, format_bytes(compiled.total))
            if compiled.peak_memory_in_bytes:
                table.add_row("of these at once", "", format_bytes(compiled.needed))
        else:
            table.add_row("total", format_bytes(self.predicted_bytes))
        return table

    def _sent_table(self) -> Table:
        rates = self.forecast.topology.rates(self.forecast.mesh)
        source = "the compiled program" if self.compiled else "arithmetic"
        table = Table(title=f"collectives of a step, by {source}", title_justify="left")
        for name in ("kind", "over", "rides", "of"):
            table.add_column(name, overflow="fold")
        for name in ("runs", "a chip sends"):
            table.add_column(name, justify="right")
        found = list(self.compiled.sent if self.compiled else self.messages)
        shown = [one for one in found if one.sent >= 2**20 or not self.compiled]
        for one in shown:
            runs = "" if one.count is None else str(one.count)
            table.add_row(
                one.kind,
                " x ".join(one.axes),
                _rides(one, rates),
                one.what,
                runs,
                format_bytes(one.sent),
            )
        if rest := len(found) - len(shown):
            small = sum(one.sent for one in found if one not in shown)
            table.add_row(f"{rest} more", "", "", "each less than 1 MiB", "", format_bytes(small))
        table.add_section()
        table.add_row("total", "", "", "", "", format_bytes(sum(one.sent for one in found)))
        return table

    def _phases_table(self) -> Table:
        table = Table(
            title="roofline of a step on one chip (a model, not a measurement)", title_justify="left"
        )
        table.add_column("phase")
        for name in ("TFLOP", *(f"{limit} ms" for limit in LIMITS)):
            table.add_column(name, justify="right")
        table.add_column("limited by")
        for phase, times in zip(self.forecast.phases, self.forecast.times, strict=True):
            limit = LIMITS[times.index(max(times))]
            done = phase.flops * phase.stretch
            table.add_row(phase.name, f"{done / 1e12:.4g}", *(f"{1e3 * t:.4g}" for t in times), limit)
        table.add_section()
        sums = (f"{1e3 * sum(t[i] for t in self.forecast.times):.4g}" for i in range(3))
        table.add_row("total", f"{self.forecast.hardware_flops / 1e12:.4g}", *sums)
        return table

    def _prediction(self) -> str:
        forecast = self.forecast
        peak = f"{forecast.topology.chip.name}'s published {forecast.topology.chip.flops / 1e12:.0f} TFLOP/s"
        lines = [
            f"predicted, not measured: {_seconds(forecast.seconds)} a step, {forecast.utilisation():.1%} of {peak} "
            f"(model FLOPs); {_seconds(forecast.seconds_apart)} and "
            f"{forecast.utilisation(forecast.seconds_apart):.1%} if messages overlap with nothing",
            f"  {forecast.tokens_per_second:,.0f} tokens/s, {forecast.tokens_per_chip_hour:,.0f} tokens a chip-hour; "
            f"model FLOPs {forecast.model_flops:.4g} a step, executed {forecast.hardware_flops:.4g} a chip",
        ]
        if self.compiled:
            lines += self._compiled_lines(self.compiled)
        lines += [f"  {name}: {text}" for name, text in self.figures]
        lines += [forecast.limit(), f"Assumed: {'; '.join(ASSUMPTIONS)}."]
        return "\n".join([*lines, self._sources()])

    def _compiled_lines(self, compiled: Compiled) -> Iterator[str]:
        """What the roofline counts, beside the same of the compiled program."""
        if compiled.flops:
            share = compiled.flops / self.forecast.hardware_flops - 1
            yield f"  the compiled program's products: {compiled.flops:.4g} FLOPs a chip ({share:+.1%})"
        else:
            yield "  the compiled program has no products: those of a single row are written as sums"
        sent, modelled = (sum(one.sent for one in ones) for ones in (compiled.sent, self.messages))
        if sent or modelled:
            error = f" ({sent / modelled - 1:+.1%})" if modelled else ""
            yield (
                f"  the compiled program sends {format_bytes(sent)} a chip, the roofline's network "
                f"{format_bytes(modelled)}{error}"
            )

    def _sources(self) -> str:
        """What was compiled, and what is a model."""
        if self.compiled is None:
            return "Compiled: nothing. Everything above is a model."
        return (
            f"Compiled ({self.compiled.compiler}): the column of the compiler, the collectives, the program's "
            "products. A model: the column of arithmetic, the roofline and every time and rate that follows from it."
        )

    def save_picture(self, path: Path) -> None:
        """Draws memory against the chip's, and the step's phases by what limits them.

        Args:
            path: of the picture; its ending says the format.

        Raises:
            ValueError: as `check_picture`.
            OSError: the file cannot be written.
        """
        check_picture(path)
        from matplotlib.figure import Figure

        forecast, hbm = self.forecast, self.forecast.topology.chip.hbm_bytes / GIB
        figure = Figure(figsize=(9, 4.4), dpi=144, layout="constrained")
        memory, time = figure.subplots(2, 1, height_ratios=(2, 3))
        bars = {"arithmetic": dict(self.memory)}
        if self.compiled:
            arguments, temporaries = self.compiled.arguments, self.compiled.temp_size_in_bytes
            known = {name: arguments[name] for name in self.memory if name in arguments}
            bars["compiler"] = {**known, "all temporaries": temporaries}
        colors: dict[str, str] = {}
        for bar, sizes in bars.items():
            left = 0.0
            for name, size in sizes.items():
                new = name not in colors
                color = colors.setdefault(name, COLORS[len(colors) % len(COLORS)])
                memory.barh(bar, size / GIB, left=left, color=color, label=name if new else None)
                left += size / GIB
        memory.axvline(hbm, color="black", linewidth=1)
        memory.text(
            hbm, 1.02, f"{hbm:.1f} GiB", ha="right", va="bottom", transform=memory.get_xaxis_transform()
        )
        memory.set_xlabel("GiB of one chip")
        memory.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
        names = [phase.name for phase in forecast.phases]
        for i, limit in enumerate(LIMITS):
            lengths = [1e3 * times[i] for times in forecast.times]
            places = [at + 0.27 * (i - 1) for at in range(len(names))]
            time.barh(places, lengths, height=0.25, color=("#08519c", "#e6550d", "#31a354")[i], label=limit)
        time.set_yticks(range(len(names)), names, fontsize=7)
        time.invert_yaxis()
        time.set_xlabel("ms of a step, predicted by the roofline")
        time.legend(frameon=False, fontsize=7)
        figure.suptitle(f"{self.title}\n{forecast.topology}, {self.layout}", fontsize=9)
        figure.savefig(path)


def check_picture(path: Path | None) -> None:
    """Refuses a picture that cannot be drawn, before anything is compiled for it.

    Args:
        path: of --picture; None asks for none.

    Raises:
        ValueError: its name ends in another format than those of PICTURES.
    """
    if path is not None and path.suffix not in PICTURES:
        raise ValueError(f"--picture {path}: its name ends in {' or '.join(PICTURES)}")


def show(page: Any) -> None:
    """Prints what rich can render, at least as wide as its tables where the output is no terminal."""
    found = Console(highlight=False)
    width = found.width if found.is_terminal else max(found.width, 120)
    Console(highlight=False, markup=False, width=width).print(page)


def _or_dash(size: float | None) -> str:
    return "" if size is None else format_bytes(size)


def _rides(one: Sent, rates: Mapping[str, Link]) -> str:
    """What carries it. An axis that is cut at a slice's end has a part inside, which the compiler tells apart."""
    if one.crosses:
        return "DCN"
    kinds = dict.fromkeys(rates[axis].kind for axis in one.axes if axis in rates)
    return ", ".join("ICI" if one.crosses is False and kind == "DCN" else kind for kind in kinds)


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
