"""A study on a real Ray cluster of two nodes, of which one is lost on the way; the runs are stand-ins."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sweeps import PYTHON, job, starts, steps_of, wait_for, write_home
from train.sweeping import on_ray
from train.sweeping.running import Watch

ROOT = Path(__file__).parents[1]


def test_ray_is_asked_for_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"ray is not installed: pip install 'flaxtron\[sweep\]'"):
        on_ray.run_on_ray([], None, None, {}, Watch(lambda: None, lambda: 0, print))


def test_what_no_node_can_hold_is_an_error():
    nodes = [
        {"Alive": True, "Resources": {"CPU": 4.0}},
        {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
    ]
    on_ray._check_resources(nodes, {"num_cpus": 4, "num_gpus": 0})
    with pytest.raises(ValueError, match="--cpus_per_run 8: no node of the Ray cluster has more than 4"):
        on_ray._check_resources(nodes, {"num_cpus": 8, "num_gpus": 0})
    with pytest.raises(ValueError, match="--gpus_per_run 1: .* more than 0"):
        on_ray._check_resources(nodes, {"num_cpus": 1, "num_gpus": 1})


def states(home):
    return [
        json.loads(file.read_text())["status"] for file in sorted((home / "study").glob("*/seed-*/run.json"))
    ]


def all_starts(home):
    return sum(len(starts(file.parent)) for file in (home / "study").glob("*/seed-*/starts"))


@pytest.fixture
def cluster():
    """(the cluster's program, its address)."""
    assert importlib.util.find_spec("ray"), "the extra `sweep` brings ray"
    environment = {
        **os.environ,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_health_check_period_ms": "500",
        "PACE": "0.3",
    }
    program = subprocess.Popen(
        [sys.executable, "-m", "tests.ray_cluster"],
        cwd=ROOT, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address = next(line.split()[1] for line in program.stdout if line.startswith("address "))
    yield program, address
    program.stdin.close()
    program.wait(120)
    program.stdout.close()


@pytest.mark.long
def test_a_study_survives_a_node_and_its_own_end(tmp_path, cluster):
    program, address = cluster
    home = write_home(tmp_path / "home")
    command = [
        *PYTHON,
        "-m",
        "train.sweep",
        "--gin_file=tiny.gin",
        "--workdir=study",
        "--vary=GPTJ.rotary_dim=2,4,8",
    ]
    command += ["--seeds=2", "--launcher=ray", f"--address={address}"]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}

    def begin():
        return subprocess.Popen(
            command, cwd=home, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    # Two nodes of one CPU: two runs at a time. Ctrl-C reaches the runs through the study's stop file.
    study = begin()
    wait_for(lambda: states(home).count("running") == 2)
    wait_for(lambda: len(list((home / "study").glob("*/seed-*/saved"))) == 2)
    study.terminate()
    out, _ = study.communicate(timeout=240)
    assert study.returncode == 143, out
    assert states(home) == ["stopped", "stopped"]
    assert "6 of 6 runs are left; run the same command again" in out

    # The second start goes on; then a node is lost with the run on it, which goes on on the other.
    study = begin()
    wait_for(lambda: states(home).count("running") == 2)
    wait_for(lambda: all_starts(home) == 2 + 2)
    program.stdin.write("remove\n")
    program.stdin.flush()
    out, _ = study.communicate(timeout=240)
    assert study.returncode == 0, out
    assert states(home) == ["done"] * 6
    for file in (home / "study").glob("*/seed-*/run.json"):
        assert steps_of(file.parent) == list(range(1, 11))
    assert all_starts(home) >= 6 + 2 + 1
    assert "rotary_dim=8 (baseline)" in out


@pytest.mark.long
def test_a_cluster_that_does_not_answer_is_one_line(tmp_path, monkeypatch, capsys):
    home = write_home(tmp_path / "home")
    command = [*PYTHON, "-m", "train.sweep", "--gin_file=tiny.gin", "--launcher=ray", "--address=auto"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"RAY_TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --address auto: no Ray cluster"), done.stderr


def test_jobs_travel(tmp_path):
    import pickle

    one = job(write_home(tmp_path / "home"))
    assert pickle.loads(pickle.dumps(one)) == one
