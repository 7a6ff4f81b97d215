"""`python -m train.sweep`: whole studies of a stand-in for a run, killed and resumed; `make long` takes real ones."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.sweeps import PYTHON, starts, steps_of, wait_for, write_home
from train import sweep

ROOT = Path(__file__).parents[1]
VARY = "--vary=GPTJ.rotary_dim=2,4,6,8"


@pytest.fixture
def home(tmp_path, monkeypatch):
    home = write_home(tmp_path / "home")
    monkeypatch.chdir(home)
    return home


def study(*args, code=0):
    if code == 0:
        return sweep.main(["--gin_file=tiny.gin", "--workdir=study", *args])
    with pytest.raises(SystemExit) as ended:
        sweep.main(["--gin_file=tiny.gin", "--workdir=study", *args])
    assert ended.value.code == code
    return None


def folders(home):
    return sorted(file.parent for file in (home / "study").glob("*/seed-*/run.json"))


def states(home):
    return [json.loads((folder / "run.json").read_text())["status"] for folder in folders(home)]


def test_a_study_from_end_to_end(home, capsys):
    study(VARY, "--seeds=3", "--dry_run")
    out = capsys.readouterr().out
    assert "arm rotary_dim=8 (baseline): " in out
    assert "run rotary_dim=2 seed 2: waiting, study/rotary_dim=2/seed-2" in out
    assert "4 arms x 3 seeds = 12 runs" in out
    assert not (home / "study").exists()

    study(VARY, "--seeds=3", "--jobs=4")
    out = capsys.readouterr().out
    assert "compared by eval_loss with rotary_dim=8" in out
    assert "[12/12] done" in out
    assert states(home) == ["done"] * 12
    assert "rotary_dim=8 (baseline)" in out
    assert (home / "study" / "report.html").exists()

    study(VARY, "--seeds=3")
    assert "12 done before" in capsys.readouterr().out
    assert all(starts(folder) == [0] for folder in folders(home))

    (home / "study" / "report.html").unlink()
    sweep.main(["--report", "--workdir=study"])
    assert (home / "study" / "report.html").exists()

    study("--vary=GPTJ.rotary_dim=8,2", "--seeds=4", "--jobs=2")  # fewer arms, a seed more
    assert "6 done before" in capsys.readouterr().out
    assert len(folders(home)) == 14


def test_a_failed_run_is_reported_and_tried_again(home, capsys, monkeypatch):
    monkeypatch.setenv("BAD_SEED", "1")
    study("--vary=GPTJ.rotary_dim=4,8", "--seeds=2", code=1)
    out = capsys.readouterr().out
    log = "study/rotary_dim=4/seed-1/log.txt"
    assert (
        f"failed: rotary_dim=4 seed 1: step 3: its loss or gradient is not a finite number; log {log}" in out
    )
    assert sorted(states(home)) == ["done", "done", "done", "failed"]
    assert "3 of 4 runs are done, 1 failed" in out

    monkeypatch.delenv("BAD_SEED")
    study("--vary=GPTJ.rotary_dim=4,8", "--seeds=2")
    assert "3 done before" in capsys.readouterr().out
    assert states(home) == ["done"] * 4


def begin(*args, **variables):
    """The study as a process of its own."""
    command = [*PYTHON, "-m", "train.sweep", "--gin_file=tiny.gin", "--workdir=study", *args]
    return subprocess.Popen(command, env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True)


def whole(home):
    """Every run took every step once, in as many starts as it was given."""
    assert states(home) == ["done"] * 12
    assert all(steps_of(folder) == list(range(1, 11)) for folder in folders(home))


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_twelve_runs_cut_off_half_way_lose_nothing(home, number, capsys):
    process = begin(VARY, "--seeds=3", "--jobs=2", PACE="0.05")
    wait_for(lambda: states(home).count("done") >= 5)
    process.send_signal(number)
    out, _ = process.communicate(timeout=240)
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        assert "runs are left; run the same command again to go on" in out
    done = [folder for folder in folders(home) if "done" in (folder / "run.json").read_text()]
    assert 5 <= len(done) < 12

    study(VARY, "--seeds=3", "--jobs=4")

    whole(home)
    assert all(len(starts(folder)) == 1 for folder in done)
    assert max(len(starts(folder)) for folder in folders(home)) <= 2


def test_one_start_at_a_time_and_a_second_signal_ends_its_runs_at_once(home, capsys):
    process = begin("--vary=GPTJ.rotary_dim=2", PACE="30")
    run = home / "study" / "rotary_dim=2" / "seed-0"
    wait_for((run / "starts").exists)
    study("--vary=GPTJ.rotary_dim=2", code=2)
    assert "error: study: another start of this study is running" in capsys.readouterr().err

    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # the stand-in sleeps
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130
    assert json.loads((run / "run.json").read_text())["exit_code"] == -signal.SIGKILL


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--vary=GPTJ.rotary=1"], "unknown setting GPTJ.rotary"),
        (["--vary=GPTJ.rotary_dim='8'"], "str does not fit"),
        (
            ["--vary=GPTJ.rotary_dim=4", "--vary=GPTJ.n_layer=1,2", "--paired"],
            "--paired takes as many values",
        ),
        (["--vary=GPTJ.n_layer=1,2", "--gin_param=data.validation_fraction=0.0"], "nothing is held out"),
        (["--seeds=x"], "--seeds x: write a count"),
        (["--seeds=0"], "sweep.seeds = 0"),
        (["--jobs=0"], "--jobs 0"),
        (["--launcher=slurm", "--gpus_per_run=0.5"], "--gpus_per_run 0.5: it is a whole number"),
        (["--address=auto"], "--address is for --launcher ray"),
        (["--gin_file=nothing.gin"], "nothing.gin: no such gin file"),
        (["--baseline=z"], "--baseline 'z': the arms are base"),
        (["--paired", "--alone"], "both on"),
        (["--launcher=slurm", "--vary=GPTJ.n_layer=1"], "there is no srun here"),
    ],
)
def test_every_slip_is_one_line_before_any_run(home, capsys, args, message, monkeypatch):
    monkeypatch.setenv("PATH", "")
    study(*args, code=2)
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1, error
    assert message in error[0]
    assert not (home / "study").exists()


@pytest.mark.parametrize(("launcher", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_launcher_that_is_not_installed(home, capsys, monkeypatch, launcher, package):
    monkeypatch.setitem(sys.modules, package, None)
    study("--vary=GPTJ.n_layer=1", f"--launcher={launcher}", code=2)
    assert f"--launcher {launcher}: the package {package} is not installed" in capsys.readouterr().err
    assert not (home / "study").exists()


def test_a_report_needs_a_study(home, capsys):
    for args, message in (
        (["--report", "--workdir=x"], "no study there"),
        ([], "nothing to study: give --gin_file"),
    ):
        with pytest.raises(SystemExit) as ended:
            sweep.main(args)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


# --- real runs

REAL = """
train.num_steps = 4
train.log_every = 1
train.eval_every = 2
train.checkpoint_every = 2
train.eval_batches = 1
"""


@pytest.mark.long
def test_real_runs_killed_half_way_lose_nothing(tmp_path):
    """Four runs; `python -m benchmarks.sweeps kill` takes twelve."""
    home = write_home(tmp_path / "home")
    shutil.rmtree(home / "train")
    (home / "tiny.gin").write_text((home / "tiny.gin").read_text() + REAL)
    for number in range(40):
        (home / "corpus" / f"{number}.txt").write_text(f"text number {number}, {number * number} " * 20)
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
    command = [sys.executable, "-m", "train.sweep", "--gin_file=tiny.gin", "--workdir=study"]
    command += ["--vary=GPTJ.rotary_dim=4,8", "--seeds=2", "--jobs=2"]
    environment = {**os.environ, "XLA_FLAGS": flags}
    del environment["JAX_COMPILATION_CACHE_DIR"]  # the study has its own
    process = subprocess.Popen(command, cwd=home, env=environment, stdout=subprocess.DEVNULL)
    wait_for(lambda: states(home).count("done") >= 1, 300)
    process.kill()
    process.wait()
    before = {
        folder: (folder / "metrics.jsonl").read_text() for folder in folders(home) if "done" in read(folder)
    }

    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=300)

    assert done.returncode == 0, done.stdout + done.stderr
    assert states(home) == ["done"] * 4
    assert before
    assert all((folder / "metrics.jsonl").read_text() == text for folder, text in before.items())
    for folder in folders(home):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == list(range(1, 5))
        assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4]
    assert len(list((home / "study" / "compile-cache").iterdir())) > 0


def read(folder):
    return (folder / "run.json").read_text()
