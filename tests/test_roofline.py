import pytest

from parallel.chips import CHIPS, parse_topology
from parallel.roofline import Forecast, Phase

TOPOLOGY = parse_topology("v5p:4x4x4")
MESH = {"fsdp": 16, "tensor": 4}
CHIP = CHIPS["v5p"]


def forecast(*phases, tokens=1000):
    return Forecast(TOPOLOGY, MESH, phases, model_flops=64 * CHIP.flops, tokens=tokens)


def test_a_phase_takes_its_longest_part_and_phases_add_up():
    compute = Phase("layers", flops=2 * CHIP.flops, hbm=CHIP.hbm_rate, network={"tensor": 90e9})
    memory = Phase("optimizer", hbm=0.5 * CHIP.hbm_rate)
    found = forecast(compute, memory)

    assert found.times[0] == pytest.approx((2.0, 1.0, 0.5))  # a ring of four sends both ways
    assert found.seconds == pytest.approx(2.5)
    assert found.seconds_apart == pytest.approx(3.0)
    assert found.utilisation() == pytest.approx(1 / 2.5)
    assert found.tokens_per_second == pytest.approx(400)
    assert found.tokens_per_chip_hour == pytest.approx(400 * 3600 / 64)
    assert found.limit() == "Limited by the matrix units for 80% of the step, most of it in layers."


def test_waiting_for_stages_stretches_a_phase_and_is_said():
    found = forecast(Phase("layers", flops=CHIP.flops, stretch=1.25))
    assert found.seconds == pytest.approx(1.25)
    assert "stages wait for one another 20% of it" in found.limit()


def test_hops_take_time_however_short_the_message():
    found = forecast(Phase("decode", hops=140))
    assert found.seconds == pytest.approx(140e-6)
    assert "the links between chips" in found.limit()


def test_int8_has_its_own_peak():
    assert forecast(Phase("a", flops=CHIP.flops, int8=True)).seconds == pytest.approx(
        CHIP.flops / CHIP.int8_ops
    )


def test_what_a_machine_reads_says_that_it_is_predicted():
    found = forecast(Phase("layers", flops=CHIP.flops)).to_dict()
    times = [name for name in found if "second" in name or "mfu" in name]
    assert times
    assert all(name.startswith("predicted_") for name in times)
    assert found["phases"][0]["compute_seconds"] == pytest.approx(1.0)
