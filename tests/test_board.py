"""What is seen of a study while it runs."""

import io
import os

import pytest
from rich.console import Console

from tests.small_study import VALUES, small_study
from tests.sweeps import end, finish
from train.sweeping.board import Board, clock, make_console
from train.sweeping.study import lock


@pytest.fixture
def study(tmp_path):
    study = small_study(tmp_path, seeds=(0, 1))
    finish(study, {"a=1": VALUES["a=1"]})
    return study


def board(study, terminal=False):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    todo = [run for run in study.runs if not run.is_done()]
    return Board(study, todo, console), console


def test_a_line_for_each_event_where_there_is_no_terminal(study):
    seen, console = board(study)
    run = study.runs[1]
    with seen:
        assert seen.eta() is None
        end(run, {}, status="running")
        held = lock(run.folder)
        seen.tick(now=True)
        os.close(held)
        finish(study, {"a=2": {0: 2.0}})
        seen.tick(now=True)
        seen.tick(now=True)
        assert seen.eta() > 0
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "[2/6] started  a=2 seed 0, from step 10"
    assert lines[1].startswith("[3/6] done     a=2 seed 0: eval_loss 2.0000, 0:00:07")
    assert len(lines) == 2


def test_a_failure_is_said_with_its_log(study):
    seen, console = board(study)
    with seen:
        end(study.runs[2], {}, status="failed")
    assert f"failed   a=3 seed 0: boom; log {study.runs[2].folder / 'log.txt'}" in console.file.getvalue()


def test_what_an_earlier_start_left_is_not_news(study):
    """Until this start has begun it too, by whatever clock the machine has that it runs on."""
    end(study.runs[2], {}, status="failed")
    seen, console = board(study)
    with seen:
        seen.tick(now=True)
        assert console.file.getvalue() == ""
        end(study.runs[2], {}, status="failed", began=7.0)
        seen.tick(now=True)
    assert "failed   a=3 seed 0: boom" in console.file.getvalue()


def test_the_table_of_a_terminal(study):
    seen, console = board(study, terminal=True)
    end(study.runs[2], {}, status="failed")
    seen.tick(now=True)
    console.print(seen.table())
    shown = console.file.getvalue()
    for words in ("a=2 *", "2/2", "failed 0", "2.6000", "2 of 6 runs"):
        assert words in shown
    assert "[/]" not in shown
    with seen:
        seen.tick(now=True)
    assert seen._live is None


def test_a_notebook_is_no_terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as its kernel sets it
    assert not make_console().is_terminal
    assert make_console().width == 160


def test_a_clock():
    assert clock(75.4) == "0:01:15"
