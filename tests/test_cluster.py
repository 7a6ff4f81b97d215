"""parallel/cluster.py: real processes on this machine, that meet, train as one does, and say who is missing."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

import parallel
from parallel import cluster
from tests import small_tokenizers
from tests.cluster_process import run
from tests.test_train_main import TINY
from train.experiment import Experiment

ROOT = Path(__file__).parents[1]
STEPS = 8
LIMIT = 180  # seconds; only a hang takes so long
JOIN = "import parallel; parallel.initialize(timeout=float('{}'))"

FINE_TUNING = {
    "train.num_steps": "4",
    "train.global_batch_size": "8",
    "train.log_every": "1",
    "train.sequence_length": "16",
    "train.model_class": "'MegatronBertForSequenceClassification'",
    "train.preset": "'tiny-megatron-bert'",
    "train.optimizer": "@adamw()",
    "mesh.data": "2",
    "task.train_file": "'a.jsonl'",
    "task.tokenizer": "'words'",
}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def processes(commands, count=None, devices=2, cwd=ROOT):
    """Starts {process id: arguments of python} as one cluster of `count`, found by the environment."""
    address, started = f"127.0.0.1:{free_port()}", {}
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    try:
        for number, command in commands.items():
            surroundings = os.environ | {
                "XLA_FLAGS": flags,
                "PYTHONPATH": str(ROOT),
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(count or len(commands)),
                "JAX_PROCESS_ID": str(number),
            }
            started[number] = subprocess.Popen(
                [sys.executable, *command],
                cwd=cwd,
                env=surroundings,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        yield started
    finally:
        for process in started.values():
            process.kill()
            process.communicate()


def results(commands, **options):
    """{process id: (exit code, lines printed, lines of errors)}; what gloo says of its connections is left out."""
    with processes(commands, **options) as started:
        found = {}
        for number, process in started.items():
            out, error = process.communicate(timeout=LIMIT)
            lines = [line for line in out.splitlines() if line and not line.startswith("[Gloo]")]
            found[number] = (process.returncode, lines, error.splitlines())
        return found


@pytest.mark.parametrize(
    ("count", "devices", "mesh"),
    [(2, 4, "data=2,fsdp=2,tensor=2"), pytest.param(4, 1, "data=2,fsdp=2", marks=pytest.mark.long)],
    ids=lambda value: str(value).replace(",", " "),
)
def test_several_processes_train_as_one_does(count, devices, mesh):
    command = ["-m", "tests.cluster_process", mesh, str(STEPS)]
    found = results(dict.fromkeys(range(count), command), devices=devices)

    assert {code for code, _, _ in found.values()} == {0}, found
    reports = {number: json.loads(lines[-1]) for number, (_, lines, _) in found.items()}
    for number, report in reports.items():
        assert (report.pop("process"), report.pop("processes")) == (number, count)
        assert report.pop("devices") == count * devices
        assert report == reports[0]  # all processes saw the same numbers
    with pytest.MonkeyPatch.context() as patch:
        whole = jax.devices()[: count * devices]
        patch.setattr(jax, "devices", lambda: whole)
        alone = run(parallel.parse_mesh(mesh), STEPS)
    # gloo sums in another order than one process does: the last bit may differ.
    for name, values in reports[0].items():
        np.testing.assert_allclose(values, alone[name], rtol=1e-6, err_msg=name)


def home_of(folder):
    """A folder with a corpus and tiny.gin."""
    (folder / "corpus").mkdir()
    for i in range(60):
        (folder / "corpus" / f"{i:02}.txt").write_text(f"document {i}: the square of {i} is {i * i}. " * 10)
    (folder / "tiny.gin").write_text(TINY)
    return folder


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.long
def test_a_run_of_two_processes_goes_on_where_it_stopped(tmp_path, monkeypatch):
    home = home_of(tmp_path)

    def train(steps):
        params = [f"train.num_steps={steps}", "data.validation_fraction=0.0", "mesh.data=1", "mesh.tensor=1"]
        command = ["-m", "train", "--gin_file=tiny.gin", *(f"--gin_param={param}" for param in params)]
        return results({0: command, 1: command}, devices=1, cwd=home)

    first = train(1)
    assert [first[number][::2] for number in (0, 1)] == [(0, []), (0, [])]
    assert "done: step 1" in first[0][1]
    assert first[1][1] == []  # process 0 speaks for all
    monkeypatch.chdir(home)
    model = Experiment(["tiny.gin"]).model
    written = parallel.restore_params("run", model)  # by one process, on one device

    second = train(2)
    assert "going on from step 1 of 2" in second[0][1]
    assert sorted(losses(home / "run")) == [1, 2]
    assert parallel.latest_checkpoint("run").name == "2"
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), written, parallel.restore_params("run", model))
    assert all(jax.tree.leaves(moved))


def test_who_does_not_come_is_named_by_all():
    start = time.monotonic()
    found = results({0: ["-c", JOIN.format(4)], 2: ["-c", JOIN.format(4)]}, count=4)

    assert time.monotonic() - start < LIMIT / 2
    for code, lines, errors in found.values():
        assert code == 1
        assert not lines
        assert "processes 1, 3 of 4 are missing: not at 127.0.0.1:" in errors[-1]
        assert "within 4 s" in errors[-1]


def test_process_zero_is_missed_too(tmp_path):
    command = ["-m", "train", "--gin_file=tiny.gin", "--start_timeout=1"]
    found = results({1: command}, count=2, cwd=home_of(tmp_path))
    code, lines, errors = found[1]
    assert (code, lines) == (2, [])
    assert len(errors) == 1
    assert errors[0].startswith("error: process 0 of 2 is missing: not at 127.0.0.1:")


def test_what_fails_in_all_ends_all_at_once():
    fail = (
        "import parallel; from train.cli import user_errors\n"
        "with user_errors():\n    parallel.initialize(timeout=60)\n    {}"
    )
    known, unknown = fail.format("raise OSError('no such text')"), fail.format("raise KeyError('a defect')")
    start = time.monotonic()
    found = results({0: ["-c", known], 1: ["-c", unknown]})

    assert time.monotonic() - start < LIMIT / 2  # and not the minutes that they would wait for each other
    assert [code for code, _, _ in found.values()] == [2, 1]
    assert found[0][2] == ["error: no such text"]
    assert found[1][2][-1] == "KeyError: 'a defect'"


@pytest.fixture
def joined(monkeypatch):
    """What jax.distributed is started with; nothing is started."""
    calls = []
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "JAX_COORD"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(cluster, "_roll_call", lambda *_: None)
    monkeypatch.setattr(cluster, "_backend_in_use", lambda: False)
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *args, **options: calls.append((*args, options))
    )
    return calls


def test_alone_there_is_nothing_to_join(joined):
    parallel.initialize()
    parallel.initialize("10.0.0.1:8476", 1, 0)
    assert joined == []


def test_arguments_win_over_the_environment(joined, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "node1:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    parallel.initialize()
    parallel.initialize(process_id=3)
    parallel.initialize(num_processes=1)
    assert [call[:3] for call in joined] == [("node1:1234", 4, 0), ("node1:1234", 4, 3)]


def test_slurm_and_open_mpi_are_found(joined, monkeypatch):
    step = {
        "JOB_ID": "7",
        "STEP_NODELIST": "node[003-004],other",
        "NTASKS": "4",
        "PROCID": "2",
        "LOCALID": "1",
    }
    with monkeypatch.context() as patch:
        for name, value in step.items():
            patch.setenv(f"SLURM_{name}", value)
        parallel.initialize()
        parallel.initialize(num_processes=1)  # one task of a job may run alone
        patch.setenv("SLURM_NTASKS", "1")
        patch.setenv("SLURM_PROCID", "0")
        parallel.initialize()
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911")
    for name, value in {"SIZE": "3", "RANK": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    parallel.initialize()

    slurm, mpi = joined
    assert (slurm[0].partition(":")[0], *slurm[1:3]) == ("node003", 4, 2)
    assert slurm[3]["local_device_ids"] == [1]
    assert (mpi[0].partition(":")[0], *mpi[1:3]) == ("10.96.0.1", 3, 1)


@pytest.mark.parametrize(
    ("address", "count", "number", "message"),
    [
        ("node1:1234", None, None, "coordinator_address=node1:1234 without num_processes and process_id"),
        (None, 4, None, "num_processes=4 without coordinator_address and process_id"),
        ("node1:1234", 4, 4, "process_id=4 with num_processes=4: processes count from 0"),
        ("node1:1234", 0, 0, "process_id=0 with num_processes=0"),
        ("node1:1234", 1, 1, "process_id=1 with num_processes=1"),
        ("node1", 2, 0, "coordinator_address='node1': write it as HOST:PORT"),
    ],
)
def test_what_does_not_go_together(joined, address, count, number, message):
    with pytest.raises(ValueError, match=message):
        parallel.initialize(address, count, number)
    assert joined == []


def test_a_variable_that_is_no_number(joined, monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "four")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES='four': it is a whole number"):
        parallel.initialize()


def test_it_has_to_come_first():
    assert jax.devices()
    with pytest.raises(ValueError, match="comes too late to join 2 processes"):
        parallel.initialize("127.0.0.1:1", 2, 0)


def call_the_roll(*members, before=lambda address: None, timeout=2.0):
    """The outcome for each (process id, count) of a cluster, as a text: "" or what is wrong."""
    address = f"127.0.0.1:{free_port()}"

    def outcome(member):
        try:
            cluster._roll_call(cluster._Cluster(address, member[1], member[0]), timeout)
        except ConnectionError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(members) + 1) as pool:
        done = [pool.submit(outcome, member) for member in members]
        pool.submit(before, address).result()
        return [future.result() for future in done]


def test_all_are_there():
    assert call_the_roll((0, 3), (1, 3), (2, 3), timeout=30) == ["", "", ""]


def test_two_of_one_number_are_refused():
    assert set(call_the_roll((0, 3), (1, 3), (1, 3), timeout=30)) == {
        "process_id=1 is taken: two processes say that they are process 1"
    }


def test_those_who_count_differently_are_refused():
    told = call_the_roll((0, 3), (1, 2), timeout=30)
    assert set(told) == {"process 1 counts num_processes=2, process 0 counts 3"}


def test_strangers_do_not_count_and_the_restarted_count_once():
    def visit(address):
        host, port = address.split(":")
        for text in (b"GET / HTTP/1.1\r\n\r\n", b"flaxtron 1 3\n", b"flaxtron 1 3\n"):
            for _ in range(200):
                with contextlib.suppress(OSError), socket.create_connection((host, int(port))) as line:
                    line.sendall(text)
                    break
                time.sleep(0.02)

    told = call_the_roll((0, 3), before=visit)
    assert told[0].startswith("process 2 of 3 is missing: not at 127.0.0.1:")


def test_a_port_in_use_is_named():
    with socket.create_server(("", 0)) as taken:
        number = taken.getsockname()[1]
        with pytest.raises(
            OSError, match=f"process 0 cannot listen on port {number}: Address already in use"
        ):
            cluster._roll_call(cluster._Cluster(f"127.0.0.1:{number}", 2, 0), 1)


@pytest.mark.long
def test_two_processes_fine_tune_as_one_does(tmp_path):
    rows = [
        {"text": ("the fox", "the lazy dog")[i % 2] + " jumps" * (i % 3), "label": "ab"[i % 2]}
        for i in range(40)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "words").mkdir()
    small_tokenizers.save(small_tokenizers.bert(), tmp_path / "words", **small_tokenizers.BERT_PURPOSES)
    found = {}
    for count in (1, 2):
        settings = FINE_TUNING | {"train.workdir": f"'{count}'"}
        command = ["-m", "train", *(f"--gin_param={key}={value}" for key, value in settings.items())]
        said = results(dict.fromkeys(range(count), command), devices=2 // count, cwd=tmp_path)
        assert {code for code, _, _ in said.values()} == {0}, said
        lines = [
            json.loads(line) for line in (tmp_path / str(count) / "metrics.jsonl").read_text().splitlines()
        ]
        found[count] = [line["loss"] for line in lines if "loss" in line]
        found[count] += [line["eval_loss"] for line in lines if "eval_loss" in line]
        texts = [
            json.loads(line)
            for line in (tmp_path / str(count) / "predictions.jsonl").read_text().splitlines()
        ]
        found[f"labels {count}"] = [{k: v for k, v in text.items() if isinstance(v, str)} for text in texts]
    assert len(found[1]) == 5
    np.testing.assert_allclose(found[2], found[1], rtol=1e-6)
    assert found["labels 2"] == found["labels 1"]
    assert len(found["labels 1"]) > 4
