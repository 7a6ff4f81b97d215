"""train/step_cost.py: counts held to what libtpu compiled (tests/planned.json) and to theory."""

import pytest

from benchmarks.plans import CASES, plan_of, recorded
from parallel import topology as places
from parallel.chips import parse_topology
from train.planning import Choice, Planner, open_experiment

TRAINING = [name for name in recorded() if name in CASES and "decode" not in name]


@pytest.mark.parametrize("name", TRAINING)
def test_flops_are_those_of_the_compiled_program(name):
    forecast = plan_of(CASES[name], compile=False).forecast
    assert forecast.hardware_flops == pytest.approx(recorded()[name]["flops"], rel=0.03)


def cost(layout, topology="v5p:4x4x4", **choice):
    return Planner(
        open_experiment(["pretrain/gptj-6b.gin"], (), Choice(layout, **choice)), parse_topology(topology)
    ).cost()


def sent(layout, topology="v5p:4x4x4", **choice):
    found = {}
    for one in cost(layout, topology, **choice).messages():
        found[one.axis, one.kind] = found.get((one.axis, one.kind), 0.0) + one.sent
    return found


def test_data_parallelism_reduces_every_gradient_once():
    (total,) = sent("data=64").values()
    assert total == pytest.approx(2 * 63 / 64 * 6.05e9 * 2, rel=0.1)  # bfloat16, the tables' in float32


def test_fsdp_gathers_twice_and_scatters_once():
    found = sent("fsdp=32,tensor=2", remat="full")
    gathered, scattered = found["fsdp", "all-gather"], found["fsdp", "reduce-scatter"]
    assert gathered == pytest.approx(2 * scattered, rel=0.1)
    assert scattered == pytest.approx(31 / 32 * 6.05e9 / 2 * 2, rel=0.1)


def test_beside_data_a_tpu_sums_gradients_whole():
    found, gpus = sent("data=4,fsdp=16", remat="full"), sent("data=4,fsdp=16", "h100:64", remat="full")
    assert found["fsdp", "all-reduce"] == pytest.approx(2 * 63 / 64 * 6.05e9 * 2, rel=0.1)
    assert gpus["fsdp", "reduce-scatter"] == pytest.approx(15 / 16 * 6.05e9 * 2, rel=0.1)
    assert gpus["data", "all-reduce"] == pytest.approx(2 * 3 / 4 * 6.05e9 / 16 * 2, rel=0.1)


def test_shards_narrower_than_a_register_are_summed_whole_on_a_tpu():
    wide, narrow = sent("fsdp=32,tensor=2"), sent("fsdp=64")
    assert {kind for axis, kind in wide if axis == "fsdp"} == {"all-gather", "reduce-scatter"}
    assert {kind for _, kind in narrow} == {"all-reduce"}


def test_a_split_sequence_sends_the_same_in_other_pieces():
    whole, split = sent("fsdp=16,tensor=4", remat="none"), sent("fsdp=16,tensor=4,sequence", remat="none")
    pieces = split["tensor", "all-gather"] + split["tensor", "reduce-scatter"]
    assert (
        whole["tensor", "all-reduce"]
        < pieces + split["tensor", "all-reduce"]
        < 1.5 * whole["tensor", "all-reduce"]
    )


def test_stages_wait_as_the_schedule_says():
    found = cost("stage=4,fsdp=16", microbatches=8)
    assert found.stretch == pytest.approx(11 / 8)
    assert found.timetable is not None
    assert found.timetable.bubble() == pytest.approx(3 / 11)
    assert cost("fsdp=64").stretch == 1.0


def test_what_a_slower_network_carries_takes_longer():
    inside, across = (cost("data=64", chips).forecast() for chips in ("v5e:8x8", "2*v5e:4x8"))
    assert places.abstract_mesh(across.topology, {"data": 64}).size == 64
    assert across.seconds_apart > inside.seconds_apart
