"""What a command line makes of an error."""

from pathlib import Path

import pytest

import modelzoo
from modelzoo.errors import user_errors


def test_our_value_error_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped, user_errors():
        modelzoo.get_config("gpt-k")
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: unknown preset 'gpt-k'")
    assert error.count("\n") == 1


def test_somebody_elses_value_error_keeps_its_traceback():
    with pytest.raises(ValueError, match="invalid literal"), user_errors():
        int("no number")


def test_everything_keeps_it_on_request(monkeypatch):
    monkeypatch.setenv("FLAXTRON_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError), user_errors():
        Path("/nowhere/at/all").read_text()


def test_ctrl_c_says_what_it_left(capsys):
    with pytest.raises(SystemExit) as stopped, user_errors("nothing was written"):
        raise KeyboardInterrupt
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "nothing was written\n"
