"""The progress bar is for terminals."""

import sys

from inference.progress import progress_bar


def test_bars_are_shown_on_terminals_alone(monkeypatch, capsys):
    with progress_bar("work", 2) as advance:
        advance(1)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress_bar("work", 2, show=False) as advance:
        advance(2)
    assert capsys.readouterr().err == ""
    with progress_bar("work", 2) as advance:
        advance(2)
    assert "2/2" in capsys.readouterr().err
