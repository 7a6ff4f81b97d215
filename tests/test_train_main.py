"""`python -m train`: whole tiny runs, exact resume, and one line for everything that a user can get wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import parallel
from train import __main__ as entry
from train.data import building
from train.experiment import Experiment
from train.metrics import RunLog

ROOT = Path(__file__).parents[1]
STEPS = 6

TINY = """
include 'models/tiny-gptj.gin'
include 'parallel/rehearsal.gin'

train.workdir = 'run'
train.num_steps = 6
train.global_batch_size = 8
train.sequence_length = 16
train.log_every = 1
train.eval_every = 4
train.eval_batches = 2
train.checkpoint_every = 2
data.path = 'corpus'
data.cache_dir = 'cache'
train.optimizer = @adamw()
adamw.learning_rate = @warmup_cosine()
warmup_cosine.peak = 1e-2
GPTJ.n_layer = 1
GPTJ.resid_pdrop = 0.1
"""


def write_corpus(folder):
    """Sixty short documents."""
    folder.mkdir()
    for i in range(60):
        (folder / f"{i:02}.txt").write_text(f"document {i}: the square of {i} is {i * i}. " * 10)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a corpus, a config and one finished run of it."""
    home = tmp_path_factory.mktemp("home")
    write_corpus(home / "corpus")
    (home / "tiny.gin").write_text(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        entry.main(["--gin_file=tiny.gin", "--gin_param=train.workdir='whole'"])
    return home


@pytest.fixture
def here(home, monkeypatch):
    monkeypatch.chdir(home)
    shutil.rmtree(home / "run", ignore_errors=True)
    return home


def train(*params):
    entry.main(["--gin_file=tiny.gin", *(f"--gin_param={param}" for param in params)])


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def held_out(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}


def params(home, name):
    experiment = Experiment([str(home / "tiny.gin")])
    restored = parallel.restore_params(home / name, experiment.model)
    return jax.tree.map(np.asarray, restored)


def signal_at(monkeypatch, step, number=signal.SIGINT):
    log = RunLog.log

    def log_and_signal(self, at, metrics):
        log(self, at, metrics)
        if at == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(RunLog, "log", log_and_signal)


def test_a_run_leaves_what_it_promises(home):
    run, last = home / "whole", home / "whole" / "checkpoints" / str(STEPS)

    assert sorted(int(child.name) for child in last.parent.iterdir()) == [2, 4, 6]
    assert {"config.gin", "config.json", "tokenizer.json"} <= {child.name for child in last.iterdir()}
    assert (run / "config.gin").read_text() == (last / "config.gin").read_text()
    assert json.loads((last / "config.json").read_text())["architectures"] == ["GPTJForCausalLM"]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(losses(run)) == list(range(1, STEPS + 1))
    assert losses(run)[STEPS] < losses(run)[1]
    assert sorted(held_out(run)) == [4, 6]


def test_the_resolved_config_describes_the_same_run(home, monkeypatch):
    monkeypatch.chdir(home)
    saved = home / "whole" / "config.gin"
    assert Experiment([str(saved)]).text == saved.read_text()


@pytest.mark.parametrize(("step", "number", "code"), [(3, signal.SIGINT, 130), (4, signal.SIGTERM, 143)])
def test_a_run_cut_in_two_is_the_same_run(here, capsys, number, code, step):
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, step, number)
        with pytest.raises(SystemExit) as stopped:
            train()
    assert stopped.value.code == code
    assert f"stopped at step {step} and saved: run the same command again" in capsys.readouterr().out

    train()

    assert f"going on from step {step} of 6" in capsys.readouterr().out
    assert losses(here / "run") == losses(here / "whole")  # bit for bit
    assert held_out(here / "run") == held_out(here / "whole")
    jax.tree.map(np.testing.assert_array_equal, params(here, "run"), params(here, "whole"))


def test_another_mesh_goes_on_with_the_same_batches(here):
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, 2)
        with pytest.raises(SystemExit):
            train()
    train("mesh.data=1", "mesh.fsdp=4")

    whole = losses(here / "whole")
    for step, loss in losses(here / "run").items():
        assert loss == pytest.approx(whole[step], rel=1e-5)


def test_a_complete_run_says_so_at_once(here, capsys, monkeypatch):
    monkeypatch.setattr(building, "find_files", lambda path: pytest.fail("read the data"))
    train("train.workdir='whole'")
    assert "complete: whole is at step 6 of 6" in capsys.readouterr().out


def test_nothing_held_out_is_no_evaluation(here):
    train("train.num_steps=1", "data.validation_fraction=0.0")
    assert held_out(here / "run") == {}


def test_a_run_may_be_taken_further(here):
    shutil.copytree(here / "whole", here / "run")
    train("train.num_steps=7")
    assert sorted(losses(here / "run")) == list(range(1, 8))


def error_of(capsys, *params, files=("tiny.gin",)):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        entry.main([*(f"--gin_file={file}" for file in files), *(f"--gin_param={param}" for param in params)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1, error
    return error[0]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (["train.nope=1"], r"unknown setting train\.nope"),
        (["GPTJ.rotary_dims=8"], r"unknown setting GPTJ\.rotary_dims .*did you mean rotary_dim\?"),
        (["rules.embedding=None"], r"unknown setting rules\.embedding .*did you mean embed\?"),
        (["adamw.mask=None"], r"unknown setting adamw\.mask"),
        (["adamw.b1=2.0"], r"adamw\.b1 = 2\.0 .*--gin_param"),
        (["train.num_steps='6'"], r"train\.num_steps = '6' .*takes int"),
        (["train.num_steps=0"], r'num_steps = 0 .*--gin_param="train\.num_steps=0"'),
        (["train.log_every=0"], r"train\.log_every = 0: it is at least 1 .*--gin_param"),
        (["train.seed=4294967296"], r"train\.seed = 4294967296: it is below"),
        (["train.remat='some'"], r"train\.remat = 'some' .*it takes 'none' or 'dots' or 'full'"),
        (["train.schedule='some'"], r"train\.schedule = 'some' .*it takes '1f1b' or 'gpipe'"),
        (["train.preset='gpt-k'"], r"unknown preset 'gpt-k'"),
        (["train.model_class='GPTKForCausalLM'"], r"unknown model class 'GPTKForCausalLM'"),
        (
            ["train.model_class='GPTJForQuestionAnswering'"],
            r"plain text trains a language model.*GPTJForCausalLM",
        ),
        (
            ["train.optimizer=@warmup_cosine()"],
            r"train\.optimizer = @warmup_cosine\(\) .*GradientTransformation",
        ),
        (["train.sequence_length=65"], r"train\.sequence_length = 65 .*past the 64 positions"),
        (["train.global_batch_size=6"], r"train\.global_batch_size = 6 .*4 devices"),
        (["train.accumulate=3"], r"global_batch_size = 8: accumulate = 3 does not divide it"),
        (["train.accumulate=4"], r"global_batch_size = 8 / accumulate = 4 .*4 devices"),
        (["mesh.tensor=3"], r"mesh data=2,fsdp=2,tensor=3 needs 12 devices, but there are 8"),
        (
            ["mesh.tensor=8", "mesh.data=1", "mesh.fsdp=1"],
            r"'heads' has size 4, which mesh tensor=8 does not divide",
        ),
        (["mesh.stage=2", "mesh.data=1"], r"stage=2"),
        (["GPTJ.rotary_dim=7"], r"GPTJConfig\.rotary_dim = 7: .*--gin_param"),
        (["GPTJ.vocab_size=100"], r"at least 257"),
        (["GPTJ.eos_token_id=3"], r"GPTJ\.eos_token_id = 3 .*token 0 .*set GPTJ\.eos_token_id = 0"),
        (["data.path='nothing'"], r"data\.path = 'nothing': no such file or folder"),
        (["data.path='empty'"], r"data\.path = 'empty': no .* file with text"),
        (["data.path='bad.jsonl'"], r"bad\.jsonl:1: not JSON"),
        (["data.path='one.txt'"], r"fewer than one row of sequence_length = 16"),
        (["data.tokenizer='nothing'"], r"data\.tokenizer = 'nothing'"),
        (["train.keep_best='f1'"], r"train\.keep_best = 'f1' .*: what is measured is loss, perplexity"),
        (["train.workdir='corpus/00.txt'"], r"train\.workdir = 'corpus/00\.txt' .*cannot write there"),
    ],
)
def test_every_slip_is_one_line(here, capsys, params, message):
    (here / "empty").mkdir(exist_ok=True)
    (here / "bad.jsonl").write_text("{oops\n")
    (here / "one.txt").write_text("too short")

    assert re.search(message, error_of(capsys, *params))
    assert not (here / "run").exists()


def test_a_reporter_that_is_not_installed_is_missed_before_anything_is_made(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    message = error_of(capsys, "train.wandb='project'", "train.workdir='unmade'")
    assert "train.wandb = 'project': the package wandb is not installed" in message
    assert not (here / "unmade").exists()


def test_a_config_that_is_not_there(here, capsys):
    assert "nothing.gin: no such gin file" in error_of(capsys, files=["nothing.gin"])
    assert "nothing to train: give --gin_file" in error_of(capsys, files=[])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            ["GPTJ.n_layer=2", "GPTJ.n_embd=32"],
            "of another model: GPTJ.n_embd was 64, is 32; GPTJ.n_layer was 1, is 2;",
        ),
        (["GPTJ.n_layer=2", "train.allow_changes=True"], "of another model: GPTJ.n_layer was 1, is 2;"),
        (
            ["adamw.b1=0.8", "train.seed=3"],
            "of other settings: train.seed was 0, is 3; adamw.b1 was 0.9, is 0.8;",
        ),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(here, capsys, params, message):
    error = error_of(capsys, "train.workdir='whole'", "train.num_steps=9", *params)
    assert message in error
    assert "choose another train.workdir" in error


def test_changed_settings_may_be_forced(here):
    shutil.copytree(here / "whole", here / "run")
    train("train.num_steps=7", "adamw.b1=0.8", "train.allow_changes=True")
    assert 7 in losses(here / "run")


def test_changed_text_is_refused(here, capsys):
    shutil.copytree(here / "whole", here / "run")
    shutil.copytree(here / "corpus", here / "moved", dirs_exist_ok=True)
    (here / "corpus" / "new.txt").write_text("one more")
    try:
        error = error_of(capsys, "train.num_steps=7")
    finally:
        (here / "corpus" / "new.txt").unlink()
    assert "the text has changed since the checkpoint" in error


def test_bindings_without_effect_are_mentioned(here, capsys):
    shutil.copytree(here / "whole", here / "run")
    train("train.num_steps=7", "warmup_linear.peak=1.0")
    assert (
        'note: warmup_linear.peak (--gin_param="warmup_linear.peak=1.0") has no effect'
        in capsys.readouterr().out
    )


def test_help_teaches_and_is_quick():
    start = time.perf_counter()
    command = [sys.executable, "-X", "importtime", "-m", "train", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    seconds = time.perf_counter() - start

    assert done.returncode == 0
    for taught in ("--gin_file", "--gin_param", "train.num_steps (int; required)", "data.path", "examples:"):
        assert taught in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"jax", "flax", "optax", "orbax", "grain", "tensorboardX"}, (
        f"slow imports, {seconds:.1f} s"
    )
