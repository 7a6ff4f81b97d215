"""benchmarks/kills.py: two of its runs; the command runs all twenty."""

import json

import pytest

from benchmarks import kills


@pytest.mark.long
def test_killed_runs_end_as_if_nothing_had_been(tmp_path):
    ledger = tmp_path / "ledger"
    with pytest.raises(SystemExit) as end:
        kills.main(["kill", "--runs", "2", "--ledger", str(ledger)])
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert end.value.code == 0, lines
    assert [line["ok"] for line in lines] == [True, True]


def test_a_half_written_line_is_no_loss(tmp_path):
    home = kills.Home(tmp_path)
    run = tmp_path / "run"
    (run / "checkpoints" / "3").mkdir(parents=True)
    (run / "checkpoints" / "6.orbax-checkpoint-tmp").mkdir()
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.5}\n{"step": 1, "eval_loss": 2}\n{"step": 2, "lo'
    )
    assert home.losses("run") == {1: 2.5}
    assert home.saved("run") == 0
    (run / "checkpoints" / "3" / "commit_success.txt").write_text("")
    assert home.saved("run") == 3
    assert home.is_saving("run", 3)
    assert not home.is_saving("run", 6)
