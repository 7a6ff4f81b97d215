"""train/planning.py: the arithmetic held to a compiled step, here by the CPU's compiler on simulated devices."""

import functools

import jax
import pytest

import modelzoo
from parallel import topology as places
from parallel.chips import CHIPS, Topology
from train import planning
from train.planning import Choice, Planner, abstract_batch, open_experiment, usual_microbatches

EIGHT = Topology(CHIPS["v5e"], (2, 4))
TINY = (
    "train.preset='tiny-gptj'",
    "train.global_batch_size=16",
    "train.sequence_length=32",
    "train.dtype='float32'",
    "GPTJ.n_positions=32",
    "train.remat='full'",
)


@functools.cache
def planned():
    experiment = open_experiment(["pretrain/gptj-6b.gin"], TINY, Choice("data=2,fsdp=4"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places, "why_not_compiled", lambda topology: "")
        patch.setattr(places, "tpu_devices", lambda topology: jax.devices()[:8])
        return Planner(experiment, EIGHT).plan()


def test_parameters_and_optimizer_are_those_of_the_compiled_step():
    plan = planned()
    compiled = plan.compiled
    assert compiled is not None
    assert compiled.arguments["parameters"] == plan.memory["parameters"]
    assert compiled.arguments["optimizer state"] == plan.memory["optimizer state"]


def test_products_are_those_of_the_compiled_step():
    plan = planned()
    assert plan.compiled is not None
    assert plan.compiled.flops == pytest.approx(plan.forecast.hardware_flops, rel=0.02)


def test_what_a_plan_does_not_depend_on_is_filled_in():
    experiment = open_experiment(["pretrain/gptj-6b.gin"], ())
    assert experiment.run.workdir == "planned"
    with pytest.raises(ValueError, match="unknown preset 'gpt-9'"):
        open_experiment(["pretrain/gptj-6b.gin"], ["train.preset='gpt-9'"])


def test_a_choice_is_lines_of_a_gin_file():
    lines = Choice("stage=2,tensor=4,sequence", 8, "interleaved", 2, "dots").gin()
    assert {"mesh.stage = 2", "mesh.fsdp = 1", "rules.sequence = True", "train.microbatches = 8"} <= set(
        lines
    )
    experiment = open_experiment(
        ["pretrain/gptj-6b.gin"], (), Choice("stage=2,tensor=4,sequence", 8, remat="dots")
    )
    assert experiment.run.microbatches == 8
    assert experiment.run.remat == "dots"
    assert experiment.settings.bound("mesh")["tensor"] == 4


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        (Choice(remat="some"), "remat 'some' is unknown: choose from none, full, dots"),
        (Choice(schedule="fast"), "schedule 'fast' is unknown"),
        (Choice("fsdp=3"), "needs 3 devices, but there are 8"),
        (Choice("stage=8"), "has size 28, which mesh stage=8 does not divide"),
        (Choice("stage=2,data=4", microbatches=5), "microbatches=5 do not divide"),
    ],
)
def test_what_does_not_go_together_is_refused(choice, reason):
    with pytest.raises(ValueError, match=reason):
        Planner(open_experiment(["pretrain/gptj-6b.gin"], (), choice), EIGHT).plan(compile=False)


@pytest.mark.parametrize(
    ("file", "more"),
    [
        ("pretrain/gptj-6b.gin", set()),
        ("pretrain/mvp.gin", {"attention_mask"}),
        ("pretrain/megatron-bert-3.9b.gin", {"attention_mask", "token_type_ids", "next_sentence_label"}),
    ],
)
def test_a_batch_is_that_of_the_data(file, more):
    experiment = open_experiment([file], ())
    batch = abstract_batch(experiment)
    assert set(batch) == {"input_ids", "labels"} | more
    assert batch["input_ids"].shape == (experiment.run.global_batch_size, experiment.run.sequence_length)


@pytest.mark.parametrize(
    ("file", "topology"),
    [
        ("bloom-176b", (8, 8, 8)),
        ("bloom-176b-stages", (8, 8, 8)),
        ("bloom-176b-small", (4, 4, 4)),
        ("gptj-6b-v5p", (4, 4, 4)),
        ("gpt-8.3b", (4, 4, 4)),
        ("gptj-6b-v5e", (16, 16)),
        ("megatron-bert-3.9b", (8, 8)),
        ("roberta-large", (4, 4)),
        ("mvp", (4, 4)),
    ],
)
def test_every_shipped_plan_fits_by_arithmetic(file, topology):
    chip = CHIPS["v5p" if len(topology) == 3 else "v5e"]
    experiment = open_experiment([f"pretrain/{file}.gin"], ())
    plan = Planner(experiment, Topology(chip, topology)).plan(compile=False)
    assert plan.fits
    assert experiment.unused() == []


def test_sizes_of_the_published_models():
    sizes = {"megatron-bert-3.9b": 3.9e9, "gpt-8.3b": 8.3e9, "bloom-176b": 176e9}
    for file, size in sizes.items():
        model = open_experiment([f"pretrain/{file}.gin"], ()).model
        assert modelzoo.num_params(model) == pytest.approx(size, rel=0.025)


def test_microbatches_are_those_of_the_step():
    assert usual_microbatches(rows=16, stages=1) == 4
    assert usual_microbatches(rows=16, stages=4) == 16
    assert usual_microbatches(rows=3, stages=2) == 3


def test_a_step_that_the_compiler_cannot_fit_is_said(monkeypatch):
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 20G of 16G hbm\nmore")

    class Step:
        def lower(self, *args):
            return Lowered()

    experiment = open_experiment(["pretrain/gptj-6b.gin"], TINY, Choice("data=2,fsdp=4"))
    monkeypatch.setattr(places, "tpu_devices", lambda topology: jax.devices()[:8])
    monkeypatch.setattr(type(experiment), "make_step", lambda self, rules: Step())
    assert (
        planning.compile_step(experiment, EIGHT) == "The compiler finds no way to fit it: Used 20G of 16G hbm"
    )
