"""Every shipped gin file builds: settings, model, mesh, a training step lowered with nothing allocated."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import modelzoo
import parallel
from parallel.layouts import LAYOUTS, parse_layout
from train.experiment import CONFIGS, Experiment, run_names
from train.gin_files import Settings
from train.state import abstract_state
from train.step import make_train_step

FILES = sorted(file.relative_to(CONFIGS).as_posix() for file in CONFIGS.rglob("*.gin"))
# A layout is a piece of a run: it is built on top of a whole one. A model gets the least that a run needs.
BASE = {"parallel": ["quickstart.gin"]}
LEAST = {
    "train.workdir": "'runs/test'",
    "train.num_steps": "10",
    "train.global_batch_size": "8",
    "train.sequence_length": "32",
    "train.optimizer": "@adamw()",
    "data.path": "'stdlib'",
    "data.tokenizer": "None",
}


def experiment(file):
    files = [*BASE.get(Path(file).parts[0], []), file]
    # What a file requires is filled in, nothing else: a file that stands alone has to stand alone.
    text = "".join((CONFIGS / name).read_text() for name in files)
    needed = (
        LEAST if file.startswith("models/") else {key for key in LEAST if f"{key} = %gin.REQUIRED" in text}
    )
    return Experiment(files, [f"{key}={LEAST[key]}" for key in needed])


def lowered(experiment, devices):
    sizes = experiment.settings.bound("mesh").values()
    devices = devices[
        : 4 if -1 in sizes else math.prod(sizes)
    ]  # as many as the smallest model's heads divide over
    rules = experiment.make_rules(devices)
    run, model, optimizer = experiment.run, experiment.model, experiment.optimizer
    step = make_train_step(
        model, optimizer, rules=rules, accumulate=run.accumulate, learning_rate=experiment.learning_rate
    )
    ids = jax.ShapeDtypeStruct((run.global_batch_size, run.sequence_length), jnp.int32)
    return step.lower(abstract_state(model, optimizer, rules=rules), {"input_ids": ids, "labels": ids})


def test_the_files_that_the_readme_names_are_there():
    assert {"quickstart.gin", "models/gptj-6b.gin", "models/tiny-gptj.gin", "pretrain/gptj-6b.gin"} <= set(
        FILES
    )
    assert len([file for file in FILES if file.startswith("ablations/")]) >= 2


@pytest.mark.parametrize("file", FILES)
def test_every_file_builds_to_an_abstract_step(file):
    built = experiment(file)
    before = len(jax.live_arrays())

    text = lowered(built, jax.devices()).as_text()

    assert "func.func public @main" in text
    assert len(jax.live_arrays()) <= before + 8, "lowering allocated arrays"
    assert built.unused() == []


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("parallel/")])
def test_a_layout_replaces_another_whole(file):
    settings = Settings(run_names(), [str(CONFIGS / file)])
    layout = parse_layout(Path(file).stem)
    assert settings.bound("mesh") == dict.fromkeys(parallel.MESH_AXES, 1) | dict(layout.sizes)
    assert settings.bound("rules") == {"sequence": False} | dict(layout.variants)


def test_every_layout_is_a_file():
    assert {f"parallel/{name}.gin" for name in LAYOUTS} == {f for f in FILES if f.startswith("parallel/")}


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("ablations/")])
def test_an_ablation_changes_one_thing(file):
    base, changed = Experiment(["quickstart.gin"]).flat, experiment(file).flat
    different = {key for key in {**base, **changed} if base.get(key) != changed.get(key)}

    assert "train.workdir" in different
    assert len(different) == 2


def test_gptj_6b_is_gptj_6b():
    built = experiment("pretrain/gptj-6b.gin")

    assert (built.config.n_layer, built.config.n_embd, built.config.vocab_size) == (28, 4096, 50400)
    assert built.run.global_batch_size * built.run.sequence_length == 2**20
    assert built.run.dtype == "bfloat16"


def test_the_quickstart_fits_its_promise():
    built = Experiment(["quickstart.gin"])

    assert 1e6 < modelzoo.num_params(built.model) < 10e6
    assert built.data == {"path": "stdlib"}
    assert built.run.workdir == "runs/quickstart"
