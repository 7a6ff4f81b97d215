"""One run of a study as a process: how it ends is noted, it stops when asked or when the study is gone, and goes on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sweeps import PYTHON, job, starts, steps_of, wait_for, write_home
from train.sweeping.running import Process, last_error, run_to_end
from train.sweeping.study import Arm, RunOf, is_locked, lock


@pytest.fixture
def home(tmp_path):
    return write_home(tmp_path / "home")


def state(one):
    return json.loads((Path(one.folder) / "run.json").read_text())


def wait(process):
    wait_for(lambda: process.ended() is not None)
    return process.ended()


def test_a_run_that_ends_well(home):
    one = job(home)
    process = Process(one)
    assert state(one)["status"] == "running"
    assert is_locked(Path(one.folder))

    assert wait(process) == "done"
    assert (state(one)["status"], state(one)["exit_code"], state(one)["num_steps"]) == ("done", 0, 10)
    assert steps_of(one.folder) == list(range(1, 11))
    assert not is_locked(Path(one.folder))
    log = (Path(one.folder) / "log.txt").read_text()
    assert "-m train --gin_file=tiny.gin" in log
    assert log.endswith("step 10\n")


def test_the_folder_holds_the_command(home):
    one = job(home, MEANS="it's here")
    assert run_to_end(one) == "done"
    script = Path(one.folder) / "command.sh"
    assert "GPTJ.rotary_dim=4" in script.read_text()
    assert "export MEANS=" in script.read_text()

    (Path(one.folder) / "saved").unlink()
    done = subprocess.run(["sh", str(script)], cwd="/", capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "step 10\n")


def test_a_run_that_fails_says_why(home):
    one = job(home, seed=3, BAD_SEED="3")
    assert run_to_end(one) == "failed"
    assert state(one)["error"] == "step 3: its loss or gradient is not a finite number"
    assert state(one)["exit_code"] == 1


def test_a_run_stops_when_asked_and_goes_on(home):
    one = job(home, PACE="0.05")
    process = Process(one)
    wait_for(lambda: (Path(one.folder) / "saved").exists())
    process.stop()
    process.stop()  # a second time changes nothing
    assert wait(process) == "stopped"
    reached = len(steps_of(one.folder))
    assert 0 < reached < 10

    assert run_to_end(one) == "done"
    assert starts(one.folder) == [0, reached]
    assert steps_of(one.folder) == list(range(1, 11))


def test_signals_that_are_meant_for_submitit_do_not_end_a_run(home):
    """SLURM sends them to every process of a job."""
    one = job(home, PACE="0.05")
    process = Process(one)
    wait_for(lambda: (Path(one.folder) / "saved").exists())
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        os.killpg(process._process.pid, number)
    assert wait(process) == "done"


def test_a_run_ended_at_once_by_someone_else_has_failed(home):
    one = job(home, PACE="0.05")
    process = Process(one)
    wait_for(lambda: (Path(one.folder) / "saved").exists())
    os.kill(process._process.pid, signal.SIGKILL)
    assert wait(process) == "failed"
    assert state(one)["error"] == "ended by SIGKILL (out of memory?)"


def test_a_run_is_running_until_its_end_is_noted(home):
    """A study that looks in between must not take it for one that was cut off."""
    one = job(home)
    process = Process(one)
    process._process.wait()
    arm = Arm("arm", "arm", {}, {}, 1, 10, (1, None, 1))
    run = RunOf(arm, 0, Path(one.folder))
    assert run.look().status == "running"
    assert process.ended() == "done"
    assert run.look().status == "done"
    assert not is_locked(Path(one.folder))


def test_a_start_that_breaks_off_leaves_its_folder_to_the_next(home):
    """As a worker of Ray does, whose process goes on to other tasks."""
    one, begun = job(home, PACE="0.05"), []

    def break_off(process):
        begun.append(process)
        wait_for(lambda: (Path(one.folder) / "saved").exists())
        process.ended = lambda: 1 / 0

    with pytest.raises(ZeroDivisionError):
        run_to_end(one, on_start=break_off)
    begun[0]._process.wait()
    assert not is_locked(Path(one.folder))
    assert run_to_end(one) == "done"


def test_a_folder_is_one_runs_alone(home):
    one = job(home, PACE="0.05")
    process = Process(one)
    with pytest.raises(BlockingIOError, match="still ending"):
        Process(one)
    process.stop(at_once=True)
    assert wait(process) == "stopped"
    held = lock(Path(one.folder))
    assert held is not None
    os.close(held)


def test_a_stop_file_stops_a_run(home):
    one = job(home, PACE="0.05")

    def stop(process):
        wait_for(lambda: (Path(one.folder) / "saved").exists())
        Path(one.stop).write_text("")

    assert run_to_end(one, on_start=stop) == "stopped"
    assert run_to_end(one) == "stopped"  # while the file is there nothing starts
    assert len(starts(one.folder)) == 1


def test_a_folder_that_is_not_there_is_not_shared(home):
    one = job(home)
    (home / "study").rmdir()
    with pytest.raises(OSError, match="does not see .*study.*--workdir in a folder that all machines share"):
        run_to_end(one)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's end")
def test_a_run_whose_study_is_killed_saves_and_ends(home):
    one = job(home, steps=400, PACE="0.02")
    code = "import time; from pathlib import Path; from tests.sweeps import job"
    code += "; from train.sweeping.running import Process"
    code += f"; Process(job(Path({str(home)!r}), steps=400, PACE='0.02')); time.sleep(60)"
    study = subprocess.Popen(
        [*PYTHON, "-c", code], env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    )
    wait_for(lambda: (Path(one.folder) / "saved").exists())
    study.kill()
    study.wait()

    wait_for(lambda: not is_locked(Path(one.folder)))
    saved = int((Path(one.folder) / "saved").read_text())
    assert saved == steps_of(one.folder)[-1]
    assert saved < 400
    assert state(one)["status"] == "running"  # nobody was there to note it


def test_the_line_that_says_what_went_wrong(tmp_path):
    log = tmp_path / "log.txt"
    for text, found in [
        ("error: first\nTraceback\nerror: train.x = 1\n\n", "train.x = 1"),
        ("Traceback (most recent call last):\n  File 'x'\njax.JaxError: OUT\nmore\n", "jax.JaxError: OUT"),
        ("only words\n", "only words"),
        ("", "exit code 3, nothing said"),
    ]:  # fmt: skip
        log.write_text(text)
        assert last_error(log, 0, 3) == found
    log.write_text("error: of an earlier start\nfine now\n")
    assert last_error(log, len("error: of an earlier start\n"), 1) == "fine now"
