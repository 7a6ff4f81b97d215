"""The report of a study: table, Markdown, CSV, picture and page, of whatever is done."""

import csv
import re

from tests.small_study import VALUES, small_study
from tests.sweeps import end, finish
from train.sweeping.report import as_markdown, as_table, make_report
from train.sweeping.summary import summarize


def report(study, capsys):
    code = make_report(study)
    return code, capsys.readouterr().out


def rows(file):
    with file.open() as text:
        return list(csv.DictReader(text))


def test_a_finished_study(tmp_path, capsys):
    study = small_study(tmp_path)
    finish(study, VALUES)
    code, out = report(study, capsys)

    assert code == 0
    assert {"report.html", "report.md", "arms.csv", "runs.csv", "curves.png"} <= {
        f.name for f in tmp_path.iterdir()
    }
    assert not list(tmp_path.glob(".*tmp"))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert re.search(
        r"a=1 +3 +2\.6000 ± 0\.2484 +\+0\.4667 ± 0\.1434 +0\.0051 +0\.0101 +1,234 +1,280 +0:00:07", out
    )
    assert "a=2 (baseline)" in out


def test_the_csv_files(tmp_path, capsys):
    study = small_study(tmp_path)
    finish(study, VALUES)
    end(study.runs[-1], {}, status="failed")
    code, out = report(study, capsys)

    runs, arms = rows(tmp_path / "runs.csv"), rows(tmp_path / "arms.csv")
    assert code == 1
    assert len(runs) == 9
    assert len(arms) == 3
    assert (runs[0]["arm"], runs[0]["seed"], runs[0]["GPTJ.a"], runs[0]["eval_loss"]) == (
        "a=1",
        "0",
        "1",
        "2.5",
    )
    assert (runs[-1]["status"], runs[-1]["error"]) == ("failed", "boom")
    assert (arms[0]["mean"], arms[1]["baseline"], arms[2]["done"]) == ("2.6", "1", "2")
    assert float(arms[0]["difference_mean"]) > 0.4
    assert f"failed: a=3 seed 2: boom; log {study.runs[-1].folder / 'log.txt'}" in out


def test_the_page_needs_no_other_file(tmp_path, capsys):
    study = small_study(tmp_path)
    finish(study, VALUES)
    report(study, capsys)
    page = (tmp_path / "report.html").read_text()

    assert 'src="data:image/png;base64,' in page
    assert not re.search(r'(src|href)="https?:', page)
    assert page.count("seed-") >= 0
    assert "python -m train.sweep" in page
    assert '<tr class="best"><td>a=2 (baseline)</td>' in page
    assert "<td>GPTJ.a = 3</td>" in page


def test_one_seed_has_no_intervals(tmp_path, capsys):
    study = small_study(tmp_path, seeds=(0,))
    finish(study, VALUES)
    _, out = report(study, capsys)
    assert "±" not in out
    assert "note: One seed" in out
    assert as_markdown(summarize(study)).splitlines()[0].count("p |") == 0


def test_a_narrow_terminal_shows_less(tmp_path):
    study = small_study(tmp_path)
    finish(study, VALUES)
    wide, narrow = (as_table(summarize(study), width) for width in (160, 80))
    assert [column.header for column in narrow.columns] == [
        "arm",
        "runs",
        "eval_loss",
        "difference",
        "p",
        "p (Holm)",
    ]
    assert len(wide.columns) == 9  # no run told its tokens a second


def test_one_comparison_needs_no_correction(tmp_path):
    study = small_study(tmp_path)
    finish(study, {name: VALUES[name] for name in ("a=1", "a=2")})
    assert "Holm" not in as_markdown(summarize(study))


def test_nothing_done_is_no_report(tmp_path, capsys):
    study = small_study(tmp_path)
    code, out = report(study, capsys)
    assert code == 0
    assert "0 of 9 runs are done" in out
    assert not (tmp_path / "report.html").exists()


def test_markdown(tmp_path):
    study = small_study(tmp_path)
    finish(study, VALUES)
    lines = as_markdown(summarize(study)).splitlines()
    assert lines[0].startswith("| arm | runs | eval_loss | difference | p | p (Holm) |")
    assert lines[1].count("|") == lines[0].count("|")
    assert lines[3].startswith("| **a=2 (baseline)** | 3 |")
