"""train/cli.py: errors in one line, signals between steps."""

import json
import os
import signal

import pytest
from jax.experimental import multihost_utils

from train import cli
from train.data.sources import find_files


def test_our_errors_become_one_line(capsys, monkeypatch):
    monkeypatch.delenv("FLAXTRON_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as stopped, cli.user_errors():
        find_files("/nowhere/at/all")

    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: data.path = '/nowhere/at/all': no such file or folder\n"


def test_only_the_first_line_is_shown(capsys):
    with pytest.raises(SystemExit), cli.user_errors():
        raise OSError("first\nsecond")
    assert capsys.readouterr().err == "error: first\n"


def test_defects_keep_their_traceback(monkeypatch):
    with pytest.raises(json.JSONDecodeError), cli.user_errors():
        json.loads("{")  # a ValueError that is not ours
    with pytest.raises(KeyError), cli.user_errors():
        raise KeyError("x")
    monkeypatch.setenv("FLAXTRON_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError), cli.user_errors():
        find_files("/nowhere/at/all")


def test_ctrl_c_outside_the_loop_says_how_to_go_on(capsys):
    with pytest.raises(SystemExit) as stopped, cli.user_errors():
        raise KeyboardInterrupt
    assert stopped.value.code == 130
    assert "run the same command again" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_and_a_second_ctrl_c_interrupts(number):
    before = signal.getsignal(number)
    with cli.StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.exit_code == 128 + number
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(number) is before


def test_several_processes_stop_where_they_agree(monkeypatch):
    monkeypatch.setattr(cli, "_several_processes", lambda: True)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: step == 7)
    terminated = signal.getsignal(signal.SIGTERM)
    with cli.StopRequest() as stop:
        assert signal.getsignal(signal.SIGTERM) is terminated  # jax's
        assert [stop.after(step) for step in (6, 7, 8)] == [False, True, True]
        assert stop.exit_code == 128 + signal.SIGTERM
