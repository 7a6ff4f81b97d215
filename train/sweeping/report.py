"""The report of a study: a table on the terminal, Markdown, two CSV files, a picture and one HTML page."""

import base64
import csv
import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from train.sweeping.board import clock, make_console, say
from train.sweeping.curves import draw_study
from train.sweeping.statistics import Estimate
from train.sweeping.study import DONE, FAILED, LOG, Study, write_whole
from train.sweeping.summary import ArmRow, Summary, speed_of, summarize

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2rem; }
table { border-collapse: collapse; } th { text-align: left; }
td, th { padding: .2rem 1.2rem .2rem 0; vertical-align: top; border-bottom: 1px solid #8884; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
tr.best td { font-weight: 600; } img { max-width: 100%; background: white; } code { overflow-wrap: anywhere; }
.failed { color: #c33; } .note { border-left: 3px solid #d90; padding-left: .8rem; margin: .4rem 0; }
"""


def make_report(study: Study, console: Console | None = None) -> int:
    """Writes the report of whatever is done into the study's folder and prints its table.

    Args:
        study: done or not.
        console: None is standard output.

    Returns:
        1 if a run failed, else 0.
    """
    summary, folder = summarize(study), study.folder
    failed = [(run, look) for run, look in summary.runs if look.status == FAILED]
    if any(row.done for row in summary.arms):
        picture = draw_study(summary)
        write_whole(folder / "arms.csv", _csv(arm_records(summary)))
        write_whole(folder / "runs.csv", _csv(run_records(summary)))
        write_whole(folder / "curves.png", picture)
        write_whole(folder / "report.md", as_markdown(summary))
        write_whole(folder / "report.html", as_html(summary, picture))
        console = console or make_console()
        console.print(as_table(summary, console.width))
    for note in summary.notes:
        say(f"note: {note}")
    for run, look in failed:
        say(f"failed: {run.name}: {look.error}; log {run.folder / LOG}")
    if any(row.done for row in summary.arms):
        say(f"report: {folder / 'report.html'}  curves.png  arms.csv  runs.csv  report.md")
    return 1 if failed else 0


WIDE = 130
"""Columns of a terminal that has room for all of the table."""
LESS = ("parameters", "tokens", "tokens/s", "time")
HEADS = ("arm", "runs", "metric", "difference", "p", "p (Holm)", "parameters", "tokens", "tokens/s", "time")


def cells(row: ArmRow, summary: Summary) -> list[str]:
    """An arm's row as text, in the order of HEADS."""
    name = row.arm.name + (" (baseline)" if row.arm.name == summary.study.baseline else "")
    difference = row.difference
    return [
        name,
        f"{row.done}" + (f" of {row.count}" if row.done < row.count else ""),
        _estimate(row.value),
        _estimate(difference.estimate, "+") if difference else "",
        _p(difference.p if difference else None),
        _p(difference.holm if difference and summary.num_compared > 1 else None),
        f"{row.arm.parameters:,}",
        f"{row.arm.tokens(row.arm.num_steps):,}",
        "" if row.speed is None else f"{row.speed:,.0f}",
        "" if row.seconds is None else clock(row.seconds),
    ]


def as_table(summary: Summary, width: int = WIDE) -> Table:
    """The arms, for a terminal: what a narrow one has no room for is in the other files."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    heads, rows = _shown(summary)
    kept = [i for i, head in enumerate(heads) if width >= WIDE or head not in LESS]
    for i in kept:
        table.add_column(heads[i], justify="left" if heads[i] == "arm" else "right", overflow="fold")
    for row, texts in zip(summary.arms, rows, strict=True):
        table.add_row(*(Text(texts[i]) for i in kept), style="bold" if row.arm.name == summary.best else "")
    return table


def as_markdown(summary: Summary) -> str:
    """The arms as a Markdown table, and the notes."""
    heads, rows = _shown(summary)
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for row, texts in zip(summary.arms, rows, strict=True):
        texts = [text.replace("|", r"\|") for text in texts]
        if row.arm.name == summary.best:
            texts[0] = f"**{texts[0]}**"
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join([*lines, "", *(f"- {note}" for note in summary.notes)]).rstrip() + "\n"


def arm_records(summary: Summary) -> list[dict[str, Any]]:
    """A record for each arm, for arms.csv."""
    records = []
    for row in summary.arms:
        value, difference = row.value, row.difference
        record: dict[str, Any] = {"arm": row.arm.name, **row.arm.settings}
        record |= {"baseline": int(row.arm.name == summary.study.baseline), "metric": summary.study.metric}
        record |= {"done": row.done, "failed": row.failed, "runs": row.count}
        record |= _numbers("", value) | _numbers("difference_", difference.estimate if difference else None)
        record |= {
            "p": difference.p if difference else None,
            "p_holm": difference.holm if difference else None,
        }
        record |= {"parameters": row.arm.parameters, "tokens": row.arm.tokens(row.arm.num_steps)}
        record |= {"seconds": row.seconds, "tokens_per_second": row.speed}
        records.append(record)
    return records


def run_records(summary: Summary) -> list[dict[str, Any]]:
    """A record for each run, for runs.csv: with the last value of everything that it measured."""
    records = []
    for run, look in summary.runs:
        record: dict[str, Any] = {"arm": run.arm.name, "seed": run.seed, **run.arm.settings}
        record |= {"status": look.status, "step": look.step, "num_steps": run.arm.num_steps}
        record |= {"tokens": run.arm.tokens(look.step), "seconds": look.seconds or None}
        record |= {"median_tokens_per_second": speed_of(run), "parameters": run.arm.parameters}
        record |= {name: value for name, value in look.last.items() if not name.startswith("grad_norm/")}
        record |= {"folder": str(run.folder), "error": look.error}
        records.append(record)
    return records


def as_html(summary: Summary, picture: bytes) -> str:
    """The whole report as a page that needs no other file.

    Args:
        summary: of the study.
        picture: the curves, PNG.
    """
    study = summary.study
    title = html.escape(study.folder.resolve().name)
    heads, rows = _shown(summary)
    best = [row.arm.name == summary.best for row in summary.arms]
    image = base64.b64encode(picture).decode()
    done = sum(look.status == DONE for _, look in summary.runs)
    seconds = sum(look.seconds for _, look in summary.runs)
    arms = [
        (row.arm.name, "\n".join(f"{k} = {v}" for k, v in row.arm.settings.items())) for row in summary.arms
    ]
    shared = _shared_config(study)
    parts = [
        f"<h1>{title}</h1><p>{len(study.arms)} arms, {len(study.seeds)} seeds, {done} of {len(summary.runs)} runs "
        f"done, {clock(seconds)} of computing. Compared: {html.escape(study.metric)} after the last step, mean over "
        "seeds with its 95 % interval; differences are paired by seed.</p>",
        *(f'<p class="note">{html.escape(note)}</p>' for note in summary.notes),
        _html_table(heads, rows, ["best" if one else "" for one in best]),
        f'<p><img alt="curves and final values" src="data:image/png;base64,{image}"></p>',
        "<h2>Runs</h2>" + _runs_table(summary),
        "<h2>Arms</h2>" + _html_table(("arm", "settings"), arms),
        f"<h2>Command</h2><pre><code>{html.escape(study.command)}</code></pre>",
        "<h2>Settings of all arms</h2>" + _html_table(("setting", "value"), shared.items()),
    ]
    head = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    )
    return head + "\n".join(parts) + "</html>\n"


def _shown(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Heads and rows without columns that are empty everywhere."""
    rows = [cells(row, summary) for row in summary.arms]
    kept = [i for i in range(len(HEADS)) if any(row[i] for row in rows)]
    heads = [summary.study.metric if HEADS[i] == "metric" else HEADS[i] for i in kept]
    return heads, [[row[i] for i in kept] for row in rows]


def _runs_table(summary: Summary) -> str:
    heads = ("run", "status", "step", summary.study.metric, "time", "files")
    rows = []
    for run, look in summary.runs:
        value = look.last.get(summary.study.metric)
        place = f"{run.arm.folder}/seed-{run.seed}"
        files = [f for f in ("run.html", "log.txt", "config.gin") if (run.folder / f).exists()]
        links = " ".join(f'<a href="{html.escape(f"{place}/{file}")}">{file}</a>' for file in files)
        status = f'<span class="{look.status}">{look.status}</span> {html.escape(look.error)}'
        shown = "" if value is None else f"{value:.4f}"
        rows.append((html.escape(run.name), status, f"{look.step}", shown, clock(look.seconds), links))
    return _html_table(heads, rows, raw=True)


def _shared_config(study: Study) -> dict[str, str]:
    first = study.arms[0].config
    return {k: v for k, v in first.items() if all(arm.config.get(k) == v for arm in study.arms)}


def _html_table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], classes: Sequence[str] = (), raw: bool = False
) -> str:
    body = []
    for i, row in enumerate(rows):
        texts = row if raw else [html.escape(text).replace("\n", "<br>") for text in row]
        mark = f' class="{classes[i]}"' if classes and classes[i] else ""
        body.append(f"<tr{mark}>" + "".join(f"<td>{text}</td>" for text in texts) + "</tr>")
    return f"<table><tr>{''.join(f'<th>{html.escape(h)}</th>' for h in heads)}</tr>{''.join(body)}</table>"


def _csv(records: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for record in records for name in record))
    names.sort(key=lambda name: name in ("folder", "error"))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _numbers(prefix: str, value: Estimate | None) -> dict[str, float | None]:
    names = {"mean": "mean", "deviation": "sd", "low": "low", "high": "high"}
    return {f"{prefix}{short}": getattr(value, name) if value else None for name, short in names.items()}


def _estimate(value: Estimate | None, sign: str = "") -> str:
    if value is None:
        return ""
    return f"{value.mean:{sign}.4f}" + ("" if value.half is None else f" ± {value.half:.4f}")


def _p(p: float | None) -> str:
    return "" if p is None else "<0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.1 else f"{p:.2f}"
