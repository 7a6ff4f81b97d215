"""A run with an average, skipped steps, growing batches and a shaped loss, from gin: resumed, replayed, refused."""

import json
import re

import jax
import numpy as np
import pytest

import parallel
from tests.test_train_main import TINY, write_corpus
from train import __main__ as entry
from train import verify
from train.experiment import Experiment

OPTIONS = """
mesh.data = 1
mesh.fsdp = 1
mesh.tensor = 1
train.optimizer = @muon()
muon.learning_rate = @warmup_stable_decay()
warmup_stable_decay.peak = 1e-2
train.ema = 0.9
train.skip_nonfinite = 2
train.batch_rampup = (2, 2, 12)
train.label_smoothing = 0.1
train.z_loss = 1e-3
train.checkpoint_every = 3
train.keep_checkpoints = 9
"""


pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a finished run."""
    home = tmp_path_factory.mktemp("home")
    write_corpus(home / "corpus")
    (home / "tiny.gin").write_text(TINY + OPTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        run("train.workdir='whole'")
    return home


def run(*params):
    entry.main(["--gin_file=tiny.gin", *(f"--gin_param={param}" for param in params)])


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.long
def test_resumed_it_is_the_run_that_was_not_cut(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    run("train.workdir='run'", "train.num_steps=3", "warmup_stable_decay.num_steps=6")
    run("train.workdir='run'", "warmup_stable_decay.num_steps=6")
    assert "going on from step 3 of 6" in capsys.readouterr().out
    certificates = [
        json.loads((home / name / "checkpoints" / "6" / "run" / "run.json").read_text())["certificate"]
        for name in ("run", "whole")
    ]
    assert certificates[0]["state"] == certificates[1]["state"]
    assert certificates[0]["batches"]["chain"] == certificates[1]["batches"]["chain"]
    with pytest.raises(SystemExit) as end:
        verify.main(["whole", "--from", "0", "--to", "6"])
    assert end.value.code == 0, capsys.readouterr().out


@pytest.mark.long
def test_what_its_metrics_and_its_checkpoint_hold(home):
    steps = [line for line in lines(home / "whole") if "loss" in line]
    # Of 16 tokens, 15 have labels: 2, 2, 4, 6, 8 and 8 rows.
    assert [line["tokens"] / 15 for line in steps] == [2, 2, 4, 6, 8, 8]
    assert all(line["skipped_steps"] == 0 and line["z_loss"] > 0 for line in steps)
    experiment = Experiment([str(home / "tiny.gin")])
    averaged, last = (
        parallel.restore_params(home / "whole", experiment.model, average=average)
        for average in (True, False)
    )
    apart = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), averaged, last)
    assert max(jax.tree.leaves(apart)) > 1e-4


@pytest.mark.long
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.ema=0.99", "train.ema was 0.9, is 0.99"),
        ("train.z_loss=0.0", "train.z_loss was 0.001, is 0.0"),
        ("train.batch_rampup=None", r"train.batch_rampup was \(2, 2, 12\), is None"),
        ("muon.ns_steps=3", "muon.ns_steps was 5, is 3"),
    ],
)
def test_other_settings_do_not_go_on(home, monkeypatch, capsys, setting, message):
    monkeypatch.chdir(home)
    with pytest.raises(SystemExit) as end:
        run("train.workdir='whole'", "train.num_steps=7", "warmup_stable_decay.num_steps=6", setting)
    assert end.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (["train.ema=1.0"], "train.ema = 1.0 is out of range"),
        (["train.label_smoothing=1.0"], "train.label_smoothing = 1.0 is out of range"),
        (["train.batch_rampup=(2, 4, 12)"], "train.batch_rampup = (2, 4, 12): steps of 4 do not lead from 2"),
        (["train.batch_rampup=(2, 2)"], "train.batch_rampup = (2, 2)"),
        (["train.skip_nonfinite=-1"], "train.skip_nonfinite = -1: it is at least 0"),
        (["train.dtype='float8'"], "train.dtype = 'float8'"),
        (["train.quantize='int4'"], "train.quantize = 'int4'"),
        (["train.accumulate=4"], "train.global_batch_size = 2: accumulate = 4 does not divide it"),
        (["adafactor.decay_rat=0.5"], "did you mean decay_rate?"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, monkeypatch, params, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.gin").write_text(TINY + OPTIONS)
    with pytest.raises(ValueError, match=re.escape(message)):
        Experiment(["tiny.gin"], params)


def test_older_checkpoints_lack_settings_that_have_their_defaults_now(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.gin").write_text(TINY)
    experiment = Experiment(["tiny.gin"])
    old = [
        line for line in experiment.text.splitlines() if not line.startswith(("train.ema", "train.z_loss"))
    ]
    (tmp_path / "config.gin").write_text("\n".join(old))
    experiment.check_resume(tmp_path)
    with pytest.raises(ValueError, match=r"train\.ema was None, is 0\.5"):
        Experiment(["tiny.gin"], ["train.ema=0.5"]).check_resume(tmp_path)
