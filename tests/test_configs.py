"""Every shipped gin file builds: settings, model, mesh, a training step lowered with nothing allocated."""

import dataclasses
import json
import math
import tomllib
from pathlib import Path

import jax
import pytest

import modelzoo
import parallel
from benchmarks.plans import CASES, Training
from modelzoo import registry
from parallel.layouts import LAYOUTS, parse_layout
from parallel.terminal import model_of
from train.experiment import CONFIGS, Experiment, run_names
from train.gin_files import Settings
from train.random_batch import draw_batch
from train.state import abstract_state
from train.step import make_train_step
from train.tasks.evaluating import head_of

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


def labelled(file, folder):
    """Settings that give a fine-tuning file two examples, which its data set would have thousands of."""
    numbers = dict(
        text="x", text_pair="y", label=1, choices=["a", "b"], tokens=["x"], tags=["O"], summary="z"
    )
    rows = [numbers | {"label": label} for label in ((["a"], ["b"]) if "several" in file else (0, 1))]
    answer = dict(question="x", context="x", answers={"text": ["x"], "answer_start": [0]})
    path = folder / "examples.jsonl"
    path.write_text("".join(json.dumps(row | answer) + "\n" for row in rows))
    return [f"task.train_file='{path}'", f"task.eval_file='{path}'"]


def started(text, folder):
    """A checkpoint for a file that needs one: of it the config alone is read."""
    if "train.init_from = %gin.REQUIRED" not in text:
        return []
    if "MvpFor" in text:
        config = modelzoo.get_config("tiny-mvp", max_position_embeddings=128)
    else:
        config = modelzoo.get_config("tiny-gptj", n_positions=128)
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    return [f"train.init_from='{folder}'"]


def experiment(file, folder=None):
    files = [*BASE.get(Path(file).parts[0], []), file]
    # What a file requires is filled in, nothing else: a file that stands alone has to stand alone.
    text = "".join((CONFIGS / name).read_text() for name in files)
    needed = (
        LEAST if file.startswith("models/") else {key for key in LEAST if f"{key} = %gin.REQUIRED" in text}
    )
    params = [f"{key}={LEAST[key]}" for key in needed]
    if file.startswith("finetune/"):
        params += labelled(file, folder) + started(text, folder)
        if file == "finetune/base.gin":
            params += [f"train.{name}={value}" for name, value in HEAD.items()]
    return Experiment(files, params)


HEAD = {
    "workdir": "'runs/x'",
    "model_class": "'GPTJForCausalLM'",
    "preset": "'tiny-gptj'",
    "sequence_length": 32,
}


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
    batch = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype),
        draw_batch(model, run.global_batch_size, run.sequence_length),
    )
    return step.lower(abstract_state(model, optimizer, rules=rules), batch)


def test_the_files_that_the_readme_names_are_there():
    assert {"quickstart.gin", "models/gpt-j-6b.gin", "models/tiny-gptj.gin", "pretrain/gptj-6b.gin"} <= set(
        FILES
    )
    assert len([file for file in FILES if file.startswith("ablations/")]) >= 2


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("finetune/")])
def test_every_fine_tuning_file_trains_a_head(file, tmp_path):
    built = experiment(file, tmp_path)
    assert head_of(built.model)
    assert built.unused() == []
    assert built.run.workdir == f"runs/{Path(file).stem}" or file == "finetune/base.gin"


def test_the_files_for_a_part_train_a_part(tmp_path):
    def trained(file):
        flat = jax.tree.leaves_with_path(modelzoo.trainable(experiment(file, tmp_path).model))
        return {jax.tree_util.keystr(path, simple=True, separator="/") for path, trains in flat if trains}

    prompts = trained("finetune/prompts.gin")
    assert prompts
    assert all("_prompt/" in name for name in prompts)
    adapters = trained("finetune/lora.gin") - {"score/kernel"}
    assert len(adapters) == 2 * 6
    assert all(name.endswith(("lora/a", "lora/b")) for name in adapters)


# Written for meshes of many chips: tests/test_train_planning.py plans them, `make plans` compiles them.
PLANNED = {case.gin_file for case in CASES.values() if isinstance(case, Training) and case.shipped}


QUICK = [
    file
    for file in FILES
    if file not in PLANNED and (not file.startswith(("finetune/", "models/")) or "/tiny-" in file)
]


@pytest.mark.parametrize("file", QUICK)
def test_every_file_builds_to_an_abstract_step(file):
    built = experiment(file)
    before = len(jax.live_arrays())

    text = lowered(built, jax.devices()).as_text()

    assert "func.func public @main" in text
    assert len(jax.live_arrays()) <= before + 8, "lowering allocated arrays"
    assert built.unused() == []


# The models whose steps are compiled: of each family one, since a step's program does not depend on sizes. Others, of
# which it is a question of minutes, are lowered.
LARGEST = {list(family.presets)[-2] for family in registry.FAMILIES.values()}


@pytest.mark.long
@pytest.mark.parametrize("file", [file for file in FILES if file.startswith(("finetune/", "models/"))])
def test_every_step_compiles(file, tmp_path):
    """Nothing is allocated, whatever the size: the largest model's step is a program as the smallest's."""
    built = experiment(file, tmp_path)
    step = lowered(built, jax.devices())
    if file.startswith("finetune/") or Path(file).stem in LARGEST:
        compiled = step.compile({"xla_backend_optimization_level": 0})
        assert compiled.memory_analysis().argument_size_in_bytes > 0
    else:
        assert "func.func public @main" in step.as_text()


@pytest.mark.parametrize("preset", modelzoo.list_presets())
def test_every_preset_is_a_file(preset):
    """And the file trains the class that the family is pretrained as."""
    built = experiment(f"models/{preset}.gin")
    model = model_of(preset)
    assert built.run.preset == preset
    assert type(built.model) is type(model)
    same = dataclasses.replace(built.config, vocab_size=model.config.vocab_size)
    assert same == model.config
    assert (CONFIGS / f"models/{preset}.gin").read_text().startswith("# ")


def test_every_model_file_is_a_preset():
    assert {f"models/{name}.gin" for name in modelzoo.list_presets()} == {
        file for file in FILES if file.startswith("models/")
    }


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


def test_an_installed_flaxtron_brings_its_gin_files():
    """They lie beside its packages, where CONFIGS is; setuptools takes folders whose names are identifiers alone."""
    tools = tomllib.loads((CONFIGS.parent / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "setuptools"
    ]
    assert "configs*" in tools["packages"]["find"]["include"]
    assert "*.gin" in tools["package-data"]["*"]
    folders = [folder for folder in CONFIGS.rglob("*") if folder.is_dir() and any(folder.glob("*.gin"))]
    assert folders
    assert all(folder.name.isidentifier() for folder in folders)
