"""`python -m train` with adapters, whole and again, and `python -m train.export`."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import modelzoo
import parallel
from modelzoo import tuning
from parallel import checkpoint
from tests.test_train_main import TINY, write_corpus
from tests.zoo import assert_close, leaves_by_name
from train import __main__ as entry
from train import export, verify
from train.experiment import Experiment

MORE = """
mesh.data = 1
mesh.fsdp = 1
mesh.tensor = 1
train.num_steps = 4
train.eval_every = 4
lora.rank = 2
lora.dropout = 0.1
train.workdir = 'lora'
"""


pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a base model and a finished run of adapters on it."""
    home = tmp_path_factory.mktemp("home")
    write_corpus(home / "corpus")
    (home / "tiny.gin").write_text(TINY + MORE)
    model = Experiment([str(home / "tiny.gin")], ["train.init_from=None"]).model
    base = parallel.init_params(modelzoo.untuned(model), jax.random.key(1))
    modelzoo.to_hf(modelzoo.untuned(model), base, home / "base")
    (home / "tiny.gin").write_text(TINY + MORE + "train.init_from = 'base'\ntrain.preset = None\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        entry.main(["--gin_file=tiny.gin"])
    return home


@pytest.fixture
def here(home, monkeypatch):
    monkeypatch.chdir(home)
    return home


def said(capsys, run, *args):
    """(exit code, what was printed)."""
    capsys.readouterr()
    code = 0
    try:
        run(list(args))
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def train(*params):
    entry.main(["--gin_file=tiny.gin", *(f"--gin_param={param}" for param in params)])


@pytest.mark.long
def test_a_run_is_what_it_claims_and_goes_on(here, capsys):
    """Two steps, and two more, are the four."""
    assert said(capsys, verify.main, "lora")[0] == 0
    shutil.copytree("lora", "cut")
    shutil.rmtree("cut/checkpoints/4")
    code, text = said(capsys, lambda args: train(*args), "train.workdir='cut'")
    assert code == 0
    assert "going on from step 2 of 4" in text
    assert "512 of 116,292 parameters train (0.44%), by LoRA of rank 2 on 2 kernels" in text
    whole, cut = (
        json.loads((here / run / "checkpoints/4/run/run.json").read_text()) for run in ("lora", "cut")
    )
    assert cut["certificate"]["whole"] == whole["certificate"]["whole"]


def test_other_adapters_are_another_model(here, capsys):
    for change in ("lora.alpha=2.0", "lora.rank=1", "train.freeze='lm_head/.*'"):
        code, text = said(
            capsys, lambda args: train(*args), change, "train.allow_changes=True", "train.num_steps=9"
        )
        assert code == 2
        assert change.partition("=")[0] in text
        assert "is of another model" in text


@pytest.mark.parametrize(
    ("param", "message"),
    [
        ("lora.rank=0", 'lora.rank = 0: it is at least 1 (--gin_param="lora.rank=0")'),
        ("lora.targets='x'", "lora.targets = 'x' matches no kernel; the nearest are trunk/layers/"),
        ("lora.rank=65", "lora.rank = 65: trunk/layers/attention/query/kernel is of 64 x 64"),
        (
            "train.freeze='trunk/.*'",
            "train.freeze = 'trunk/.*': it freezes trunk/layers/attention/query/kernel",
        ),
        ("train.tune='.*'", "train.tune = '.*': with lora the adapters train"),
    ],
)
def test_what_is_wrong_is_said_before_anything(here, capsys, param, message):
    code, text = said(capsys, lambda args: train(*args), param, "train.workdir='never'")
    assert code == 2
    assert text.startswith(f"error: {message}")
    assert not (here / "never").exists()


def test_a_run_is_read_merged(here):
    folder = checkpoint.latest_checkpoint("lora")
    plain = modelzoo.untuned(Experiment(["tiny.gin"]).model)
    model, params = checkpoint.restore_adapted(folder, plain)
    assert model.tuning.lora.rank == 2
    merged = checkpoint.restore_params(folder, plain)
    assert_close(merged, tuning.merge(params), 0.0)
    ids = np.arange(12, dtype=np.int32).reshape(2, 6)
    logits = [plain.apply({"params": p}, input_ids=ids).logits for p in (params, merged)]
    assert_close(logits[1], logits[0], 2e-6)
    base = leaves_by_name(modelzoo.from_hf("base")[1])
    changed = {name for name, leaf in leaves_by_name(merged).items() if not np.array_equal(leaf, base[name])}
    assert changed == {f"trunk/layers/attention/{name}/kernel" for name in ("query", "value")}


def test_exports(here, capsys):
    assert said(capsys, export.main, "lora", "merged") == (
        *(0, "written: merged (GPTJForCausalLM with its adapters merged)\n"),
    )
    assert said(capsys, export.main, "lora", "adapter", "--adapter")[0] == 0
    assert json.loads((here / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    assert said(capsys, export.main, "base", "again", "--peft", "adapter")[0] == 0
    once, twice = load_file("merged/model.safetensors"), load_file("again/model.safetensors")
    assert once.keys() == twice.keys()
    for name in once:
        np.testing.assert_allclose(once[name], twice[name], atol=1e-7)
    assert (here / "merged/tokenizer.json").is_file()
    assert not np.array_equal(
        *(
            load_file(f"{name}/model.safetensors")["transformer.h.0.attn.q_proj.weight"]
            for name in ("base", "merged")
        )
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("base", "x", "--adapter"), "base: it has no adapters: it was trained without lora.rank"),
        (("nowhere", "x"), "CHECKPOINT = 'nowhere'"),
        (("base", "x", "--adapter", "--peft", "adapter"), "--adapter with --peft"),
        (("base", "x", "--peft", "base"), "base: no peft adapter"),
    ],
)
def test_an_export_that_cannot_be(here, capsys, args, message):
    code, text = said(capsys, export.main, *args)
    assert code == 2
    assert text.startswith(f"error: {message}")
    assert not (here / "x").exists()
