"""train/step_memory.py, held to what the TPU compiler said of real steps (tests/planned.json)."""

import statistics

import pytest

from benchmarks.plans import CASES, Training, errors, recorded
from parallel.chips import parse_topology
from train.planning import Choice, Planner, open_experiment
from train.step_memory import memory_of, saved_of_layer


def memory(layout, file="pretrain/gptj-6b.gin", topology="v5p:4x4x4", **choice):
    planner = Planner(open_experiment([file], (), Choice(layout, **choice)), parse_topology(topology))
    return memory_of(planner.cost())


def test_arithmetic_is_close_to_the_compiler():
    found = {name: error for name, error, _ in errors(Training)}
    sizes = [abs(error) for error in found.values()]
    assert set(found) == {name for name in recorded() if isinstance(CASES[name], Training)}
    assert statistics.median(sizes) <= 0.05, found
    assert max(sizes) <= 0.15, found
    assert min(found.values()) >= -0.05, found


def test_state_lies_in_shards():
    one, many = memory("data=64"), memory("data=4,fsdp=16")
    assert one["parameters"] == pytest.approx(4 * 6.05e9, rel=1e-3)
    assert one["optimizer state"] == pytest.approx(2 * one["parameters"], rel=1e-6)
    assert many["parameters"] == pytest.approx(one["parameters"] / 16, rel=2e-3)


def test_policies_keep_more_or_less():
    kept = {
        policy: memory("data=4,fsdp=16", remat=policy)["saved activations"]
        for policy in ("full", "dots", "none")
    }
    tokens = 512 * 2048 // 64
    assert kept["full"] == 28 * tokens * 4096 * 2
    assert kept["dots"] == 28 * tokens * (4 * 4096 + 16384) * 2
    assert kept["full"] < kept["dots"] < kept["none"]


def test_slices_keep_a_part():
    whole, sliced = memory("fsdp=64"), memory("fsdp=64", accumulate=4)
    assert sliced["saved activations"] == whole["saved activations"] / 4
    assert sliced["parameters"] == whole["parameters"]


def test_a_stage_keeps_what_is_in_flight():
    few, many = (memory("stage=4,fsdp=16", microbatches=m)["saved activations"] for m in (8, 32))
    assert many < few  # 1f1b: a microbatch is smaller, and no more of them are in flight


def test_gradients_that_are_added_up_are_held_with_what_is_added():
    found, staged = memory("fsdp=64"), memory("stage=4,fsdp=16", microbatches=8)
    assert staged["gradients"] == pytest.approx(3 * found["gradients"], rel=0.01)
    assert memory("fsdp=64", accumulate=4)["gradients"] == 3 * found["gradients"]


def test_stacks_of_the_same_shapes_keep_more():
    """A compiler that is given two loops' zeros as one array copies it."""

    def temporaries(*params):
        planner = Planner(open_experiment(["pretrain/mvp.gin"], params), parse_topology("v5e:4x4"))
        return memory_of(planner.cost())["temporaries"]

    kept = (4 + 3 + 3) * 1024 * 2 * 12 * 128 * 512 // 16  # of the encoder, which is the smaller one
    assert temporaries() - temporaries("Mvp.encoder_layers=11") > 0.75 * kept
    assert temporaries("Mvp.encoder_layers=11") - temporaries("Mvp.encoder_layers=10") < 0.02 * kept


def test_a_layer_with_norms_behind_keeps_its_last_product():
    planner = Planner(open_experiment(["pretrain/roberta-large.gin"], ()), parse_topology("v5e:4x4"))
    cost = planner.cost()
    (stack,) = cost.anatomy.stacks
    assert saved_of_layer(cost, stack) == (3 + 3 + 4) * 1024 * 2
