"""A study on disk: what is done is known from the folder alone."""

import json
import os

import pytest

from tests.small_study import arm, small_study
from tests.sweeps import end
from train.sweeping import study as studies
from train.sweeping.study import RunOf, is_locked, lock, open_study, write_whole


def test_a_study_is_read_back(tmp_path):
    study = small_study(tmp_path / "study")
    study.save()
    found = open_study(tmp_path / "study")

    assert (found.seeds, found.baseline, found.metric) == (study.seeds, "a=2", "eval_loss")
    assert [one.settings for one in found.arms] == [one.settings for one in study.arms]
    assert found.arms[0].tokens(10) == 10 * 8 * 16
    assert os.listdir(tmp_path / "study") == ["sweep.json"]


def test_a_folder_that_is_no_study(tmp_path):
    with pytest.raises(OSError, match=r"no study there \(sweep.json is missing\)"):
        open_study(tmp_path)
    (tmp_path / "sweep.json").write_text('{"arms": []')
    with pytest.raises(ValueError, match=r"sweep\.json: cannot be read"):
        open_study(tmp_path)


def test_runs_take_every_arm_before_the_next_seed(tmp_path):
    names = [run.name for run in small_study(tmp_path, seeds=(0, 5)).runs]
    assert names == ["a=1 seed 0", "a=2 seed 0", "a=3 seed 0", "a=1 seed 5", "a=2 seed 5", "a=3 seed 5"]


def test_how_a_run_stands(tmp_path):
    run = small_study(tmp_path).runs[0]
    assert (run.look().status, run.look().step, run.is_done()) == ("waiting", 0, False)
    end(run, {"eval_loss": 2.5})
    look = run.look()
    assert (look.status, look.step, look.seconds, run.is_done()) == ("done", 10, 7.0, True)
    assert look.last == {"loss": 2.0, "eval_loss": 2.5}


def test_a_run_of_fewer_steps_is_not_done(tmp_path):
    end(small_study(tmp_path).runs[0], {})
    longer = RunOf(arm("a=1", steps=20), 0, small_study(tmp_path).runs[0].folder)
    assert (longer.is_done(), longer.look().status) == (False, "waiting")


def test_a_run_that_nobody_runs_was_cut_off(tmp_path):
    run = small_study(tmp_path).runs[0]
    end(run, {}, status="running")
    assert run.look().status == "stopped"
    held = lock(run.folder)
    assert lock(run.folder) is None
    assert (run.look().status, is_locked(run.folder)) == ("running", True)
    os.close(held)
    assert run.look().status == "stopped"


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    run = small_study(tmp_path).runs[0]
    end(run, {})
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')
    assert [line["step"] for line in run.lines()] == [1, 10]


def test_a_batch_that_grows_counts_its_tokens(tmp_path):
    grows = studies.Arm("a", "a", {}, {}, 1, 10, (8, [2, 2, 24], 16))
    assert grows.tokens(1) == 2 * 16
    assert json.dumps(grows.batch)


@pytest.mark.parametrize(
    ("metric", "higher"),
    [("eval_loss", False), ("eval_perplexity", False), ("eval_f1", True), ("eval_mse", False)],
)
def test_what_is_best(tmp_path, metric, higher):
    assert small_study(tmp_path, metric=metric).higher_is_better is higher


def test_a_file_appears_whole(tmp_path, monkeypatch):
    file = tmp_path / "x.json"
    write_whole(file, "old")

    def cut(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", cut)
    with pytest.raises(KeyboardInterrupt):
        write_whole(file, "new")
    assert file.read_text() == "old"
