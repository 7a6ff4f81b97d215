"""The page of a run: one HTML file that needs nothing else, with curves, settings, surroundings and checkpoints."""

import datetime
import html
import importlib.metadata
import io
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from parallel import checkpoint
from train.goodput import describe, shares_of

PACKAGES = ("flaxtron", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy")

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .15rem 1rem .15rem 0; text-align: left; vertical-align: top; }
code, td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
figure { margin: 0; background: white; } figure svg { width: 100%; height: auto; }
"""


def write_page(workdir: str | os.PathLike[str], config: Mapping[str, str]) -> Path:
    """Writes WORKDIR/run.html from the files of a run.

    Args:
        workdir: the run's folder: metrics.jsonl, goodput.json, checkpoints.
        config: its settings, name -> value.

    Returns:
        The page's path.
    """
    workdir = Path(workdir)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    name = html.escape(workdir.resolve().name)
    parts = [
        f"<h1>{name}</h1><p>{html.escape(_summary(workdir, lines))}</p>",
        f"<figure>{draw(lines)}</figure>",
        "<h2>Last values</h2>" + _table(_last(lines).items()),
        "<h2>Checkpoints</h2>" + _table(_checkpoints(workdir), ("step", "state", "batches", "bytes")),
        "<h2>Settings</h2>" + _table(config.items()),
        "<h2>Surroundings</h2>" + _table(_surroundings().items()),
    ]
    text = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>'
    page = workdir / "run.html"
    aside = page.with_suffix(".tmp")
    aside.write_text(text + "\n".join(parts) + "</html>\n", encoding="utf-8")
    os.replace(aside, page)
    return page


def draw(lines: Sequence[Mapping[str, Any]]) -> str:
    """The curves of a run as an SVG element.

    Args:
        lines: of metrics.jsonl.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    modules = sorted({name for line in lines for name in line if name.startswith("grad_norm/")})
    panels = {
        "loss": ["loss", "eval_loss"],
        "gradient norm": ["grad_norm", *modules],
        "learning rate": ["learning_rate"],
        "tokens per second": ["tokens_per_second"],
    }
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "run"}):
        figure = Figure(figsize=(11, 7), layout="constrained")
        for axes, (title, names) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
            for name in names:
                points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
                if points:
                    label = name.removeprefix("grad_norm/").replace("_", " ")
                    axes.plot(*zip(*points, strict=True), label=label, linewidth=1.4)
            axes.set_title(title, loc="left", fontsize=11)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            if title == "gradient norm" and axes.lines:
                axes.set_yscale("log")
            if len(axes.lines) > 1:
                axes.legend(frameon=False, fontsize=8)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _summary(workdir: Path, lines: Sequence[Mapping[str, Any]]) -> str:
    if not lines:
        return "no steps yet"
    hours = datetime.timedelta(seconds=round(lines[-1]["time"] - lines[0]["time"]))
    ended = datetime.datetime.fromtimestamp(lines[-1]["time"], datetime.UTC)
    text = f"{lines[-1]['step']:,} steps, {hours} from the first line to the last, {ended:%Y-%m-%d %H:%M} UTC"
    record = workdir / "goodput.json"
    if record.exists():
        sessions = json.loads(record.read_text())
        starts = f"{len(sessions)} starts" if len(sessions) > 1 else "1 start"
        text += f"; {starts}: {describe(shares_of(sessions))}"
    return text


def _last(lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    values: dict[str, Any] = {}
    for line in lines:
        values |= line
    return {name: f"{value:,.6g}" for name, value in values.items() if value is not None and name != "time"}


def _checkpoints(workdir: Path) -> Iterable[Sequence[str]]:
    folder = workdir / checkpoint.CHECKPOINTS
    for step in checkpoint.finished_steps(folder):
        place = folder / str(step)
        size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
        try:
            told = json.loads((place / "run" / "run.json").read_text())["certificate"]
            hashes = [told["whole"], told["batches"]["chain"]]
        except (OSError, KeyError, ValueError):
            hashes = ["", ""]
        yield (str(step), *(text[:16] for text in hashes), f"{size:,}")


def _surroundings() -> dict[str, str]:
    found = {"Python": platform.python_version(), "system": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    kinds = f"{jax.device_count()} of {jax.devices()[0].device_kind}"
    return found | {"devices": kinds, "processes": str(jax.process_count())}


def _table(rows: Iterable[Sequence[str]], heads: Sequence[str] = ()) -> str:
    head = "<tr>" + "".join(f"<th>{html.escape(text)}</th>" for text in heads) + "</tr>" if heads else ""
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table>{head}{body}</table>"
