"""A study through submitit: on a stand-in for SLURM's commands that runs the array's tasks, and on submitit's own."""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sweeps import PYTHON, job, starts, steps_of, wait_for, write_home
from train.sweeping import on_slurm
from train.sweeping.on_slurm import Runner, make_executor

# As much of SLURM as submitit asks for: sbatch reads the file's options, keeps it, and runs the tasks of its array, as
# many at a time as it says; srun runs what follows its options; sacct knows how tasks stand; scancel ends queued ones.
SBATCH = """#!{python}
import os, re, subprocess, sys
script = open(sys.argv[1]).read()
home = os.environ["FAKE_SLURM"]
open(home + "/sbatch.sh", "w").write(script)
last, most = map(int, re.search(r"--array=0-(\\d+)%(\\d+)", script).groups())
work = f'''
cd {{home}}
for i in $(seq 0 {{last}}); do
  test -e {{home}}/cancelled-$i && continue
  touch {{home}}/started-$i
  export SLURM_JOB_ID=$((100 + i)) SLURM_ARRAY_JOB_ID=77 SLURM_ARRAY_TASK_ID=$i SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1
  export SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_JOB_NODELIST=here
  (bash {{home}}/sbatch.sh; touch {{home}}/done-$i) &
  while test $(jobs -r | wc -l) -ge {{most}}; do sleep 0.05; done
done
wait
'''
subprocess.Popen(["bash", "-c", work], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
print("Submitted batch job 77")
"""
SRUN = """#!/bin/bash
while [ "${1#--}" != "$1" ]; do case $1 in --output|--error) shift 2;; *) shift;; esac; done
exec "$@"
"""
SACCT = """#!/bin/bash
echo 'JobID|State|NodeList'
for i in 0 1 2 3; do
  state=PENDING
  for found in started:RUNNING cancelled:CANCELLED done:COMPLETED; do
    test -e $FAKE_SLURM/${found%:*}-$i && state=${found#*:}
  done
  echo "77_$i|$state|here"
done
"""
SCANCEL = """#!/bin/bash
touch $FAKE_SLURM/cancelled-${1#77_}
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A folder whose commands stand in for SLURM's, first on the PATH."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    commands = {
        "sbatch": SBATCH.format(python=sys.executable),
        "srun": SRUN,
        "sacct": SACCT,
        "scancel": SCANCEL,
    }
    for name, text in commands.items():
        file = folder / name
        file.write_text(text)
        file.chmod(file.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(folder))
    return folder


def test_options_become_sbatchs(tmp_path, slurm):
    given = ["partition=gpu", "time=90", "account=me", "mem-per-cpu=4G", "licenses=x@y:2"]
    executor, is_local = make_executor(
        tmp_path / "study" / "slurm", {"cpus_per_task": 4, "gpus_per_node": 0}, given, 3
    )
    text = executor._executor._make_submission_file_text("run", "uid")

    assert not is_local
    for line in (
        "partition=gpu",
        "time=90",
        "account=me",
        "cpus-per-task=4",
        "job-name=study",
        "signal=USR2@90",
    ):
        assert f"#SBATCH --{line}\n" in text
    assert "#SBATCH --mem-per-cpu=4G\n" in text
    assert re.search(r"#SBATCH --licenses=['\"]?x@y:2", text)
    assert "gpus" not in text
    assert executor._executor.parameters["array_parallelism"] == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["partition"], "--slurm partition: write it as NAME=VALUE"),
        (["time=1h"], "--slurm time=1h: it is in minutes"),
        (["cluster=x"], "--slurm cluster=x: it is slurm, local or debug"),
    ],
)
def test_options_that_cannot_be_read(tmp_path, slurm, given, message):
    with pytest.raises(ValueError, match=message):
        make_executor(tmp_path, {}, given, None)


def test_what_is_not_here_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="there is no srun here: start from a login node"):
        make_executor(tmp_path, {}, [], None)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match=r"submitit is not installed: pip install 'flaxtron\[sweep\]'"):
        make_executor(tmp_path, {}, [], None)


def test_a_job_that_slurm_is_about_to_end_saves_and_is_queued_again(tmp_path):
    one, runner = job(write_home(tmp_path / "home"), PACE="0.05"), Runner()
    again = []

    def ask(process):
        runner._keep(process)
        wait_for(lambda: (Path(one.folder) / "saved").exists())
        again.append(runner.checkpoint(one))

    assert on_slurm.run_to_end(one, on_start=ask) == "stopped"
    delayed = again[0]
    assert delayed.args == (one,)
    assert delayed.function(*delayed.args) == "done"
    assert starts(one.folder)[1] > 0
    assert steps_of(one.folder) == list(range(1, 11))


def start_study(home, *flags):
    command = [*PYTHON, "-m", "train.sweep", "--gin_file=tiny.gin", "--workdir=study"]
    command += ["--vary=GPTJ.rotary_dim=4,8", "--launcher=slurm", *flags]
    return subprocess.Popen(
        command, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def study(home, *flags):
    process = start_study(home, "--seeds=2", *flags)
    said, _ = process.communicate(timeout=400)
    states = [
        json.loads(file.read_text())["status"] for file in sorted((home / "study").glob("*/seed-*/run.json"))
    ]
    return process.returncode, said, states


@pytest.mark.long
def test_a_study_as_a_job_array(tmp_path, slurm, monkeypatch):
    home = write_home(tmp_path / "home")
    monkeypatch.setenv("BAD_SEED", "1")
    code, said, states = study(home, "--jobs=2", "--slurm=partition=gpu")

    assert code == 1, said
    assert states == ["done", "failed", "done", "done"]
    assert "submitted as SLURM job 77" in said
    assert "failed: rotary_dim=4 seed 1: step 3" in said
    script = (slurm / "sbatch.sh").read_text()
    assert "#SBATCH --array=0-3%2\n" in script
    assert "#SBATCH --partition=gpu\n" in script
    assert "srun --unbuffered" in script


@pytest.mark.long
def test_a_rehearsal_with_processes_of_this_machine(tmp_path):
    home = write_home(tmp_path / "home")
    code, said, states = study(home, "--jobs=2", "--slurm=cluster=local")
    assert code == 0, said
    assert states == ["done"] * 4
    assert "rotary_dim=8 (baseline)" in said


@pytest.mark.long
def test_ctrl_c_takes_what_is_queued_out_of_the_queue(tmp_path, slurm, monkeypatch):
    home = write_home(tmp_path / "home")
    monkeypatch.setenv("PACE", "1")
    process = start_study(home, "--seeds=2", "--jobs=1")
    saved = home / "study" / "rotary_dim=4" / "seed-0" / "saved"
    wait_for(saved.exists)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "stopped: 4 of 4 runs are left" in said
    assert sorted(path.name for path in slurm.glob("cancelled-*")) == [f"cancelled-{i}" for i in (1, 2, 3)]
    assert 0 < int(saved.read_text()) < 10


@pytest.mark.long
def test_slurm_itself(tmp_path, monkeypatch):
    """A study on SLURM, where there is one here; its time is said to be up in the middle, and it is queued again."""
    found = shutil.which("sinfo") and subprocess.run(
        ["sinfo", "-h"], capture_output=True, text=True, timeout=60
    )
    if not found or found.returncode or not found.stdout.strip():
        pytest.skip("no SLURM here")
    home = write_home(tmp_path / "home")
    monkeypatch.setenv("PACE", "1")
    process = start_study(home, "--seeds=1", "--jobs=2", "--cpus_per_run=1")
    folders = [home / "study" / arm / "seed-0" for arm in ("rotary_dim=4", "rotary_dim=8")]
    wait_for(lambda: all((folder / "saved").exists() for folder in folders))
    (script,) = (home / "study" / "slurm").glob("*_submission.sh")
    subprocess.run(["scancel", "--signal=USR2", script.name.partition("_")[0]], check=True, timeout=60)
    said, _ = process.communicate(timeout=500)
    assert process.returncode == 0, said
    for folder in folders:
        first, again = starts(folder)
        assert first == 0 < again
        assert steps_of(folder) == list(range(1, 11))
