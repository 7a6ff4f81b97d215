"""Runs of a study as processes of this machine: so many at a time, each with its share."""

import os
from pathlib import Path

import pytest

from tests.sweeps import job, starts, wait_for, write_home
from train.sweeping import local
from train.sweeping.running import Process, Watch
from train.sweeping.study import is_locked


@pytest.fixture
def home(tmp_path):
    return write_home(tmp_path / "home")


def statuses(jobs):
    import json

    return [json.loads((Path(one.folder) / "run.json").read_text())["status"] for one in jobs]


def test_a_failed_run_does_not_stop_the_rest(home):
    jobs = [job(home, seed, BAD_SEED="1") for seed in range(4)]
    most = []

    def tick():
        most.append(sum(is_locked(Path(one.folder)) for one in jobs if Path(one.folder).exists()))

    local.run_here(jobs, 2, Watch(tick, lambda: 0, pytest.fail))

    assert statuses(jobs) == ["done", "failed", "done", "done"]
    assert max(most) <= 2


def test_a_request_to_stop_reaches_what_runs_and_starts_nothing_more(home):
    jobs = [job(home, seed, PACE="0.05") for seed in range(3)]
    saved = Path(jobs[0].folder) / "saved"

    local.run_here(jobs, 1, Watch(lambda: None, lambda: int(saved.exists()), pytest.fail))

    assert statuses(jobs[:1]) == ["stopped"]
    assert not Path(jobs[1].folder).exists()


def test_what_is_still_ending_is_waited_for(home):
    one, told = job(home, PACE="0.02"), []
    before = Process(one)
    wait_for(lambda: (Path(one.folder) / "saved").exists())

    local.run_here([one], 1, Watch(before.ended, lambda: 0, told.append))

    assert told == ["arm seed 0 is still ending from an earlier start; it is waited for"]
    assert starts(one.folder) == [0, 10]


def test_shares_of_a_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4, 5}, raising=False)
    monkeypatch.setattr(local, "visible_gpus", lambda _: [])
    assert local.shares(1) == [({}, ())]
    assert local.shares(2) == [({}, (0, 1, 2)), ({}, (3, 4, 5))]
    assert [cores for _, cores in local.shares(8)][-2:] == [(0,), (1,)]

    monkeypatch.setattr(local, "visible_gpus", lambda _: ["0", "1", "2", "3"])
    assert [found["CUDA_VISIBLE_DEVICES"] for found, _ in local.shares(2)] == ["0,1", "2,3"]
    monkeypatch.setattr(local, "visible_gpus", lambda _: ["7"])
    assert local.shares(2)[1][0] == {"CUDA_VISIBLE_DEVICES": "7", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.45"}


def test_gpus_that_a_run_would_see():
    assert local.visible_gpus({"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "0"}) == []
    assert local.visible_gpus({"CUDA_VISIBLE_DEVICES": "1,3"}) == ["1", "3"]
    assert local.visible_gpus({"JAX_PLATFORMS": "cuda,cpu", "CUDA_VISIBLE_DEVICES": ""}) == []
