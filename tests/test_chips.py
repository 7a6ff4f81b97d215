import math

import pytest

from parallel.chips import CHIPS, parse_topology


@pytest.mark.parametrize(
    ("text", "size", "shown"),
    [
        ("v5p:8x8x8", 512, "v5p:8x8x8"),
        ("V5E:16x16", 256, "v5e:16x16"),
        ("2*v5e:16x16", 512, "2*v5e:16x16"),
        ("h100:64", 64, "h100:64"),
    ],
)
def test_a_topology_is_read_and_shown(text, size, shown):
    topology = parse_topology(text)
    assert topology.size == size
    assert str(topology) == shown


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("v5p", "write it as CHIP:SHAPE"),
        ("v9:4x4", "no chip 'v9' is known"),
        ("v5p:16x16", "v5p comes in 3 dimensions"),
        ("v5e:4x0", "v5e comes in 2 dimensions"),
        ("2*h100:8", "only TPUs come in slices"),
    ],
)
def test_what_is_no_topology_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_topology(text)


def test_an_axis_rides_what_joins_its_chips():
    pod = parse_topology("v5p:8x8x8").rates({"stage": 1, "data": 1, "fsdp": 64, "context": 1, "tensor": 8})
    link = CHIPS["v5p"].link_rate
    assert (pod["tensor"].rate, pod["fsdp"].rate) == (2 * link, 4 * link)  # one ring; two dimensions of them
    assert {one.kind for one in pod.values()} == {"ICI"}

    slices = parse_topology("2*v5e:4x4").rates({"data": 2, "fsdp": 4, "tensor": 4})
    assert slices["data"] == slices["data"].__class__(CHIPS["v5e"].dcn_rate, "DCN")
    assert slices["tensor"].rate == CHIPS["v5e"].link_rate  # four chips of sixteen close no ring

    nodes = parse_topology("h100:64").rates({"fsdp": 8, "tensor": 8})
    assert (nodes["fsdp"].kind, nodes["tensor"].kind) == ("network", "NVLink")


def test_a_dimension_may_be_shared_by_axes():
    rates = parse_topology("v5p:4x4x4").rates({"data": 16, "fsdp": 2, "tensor": 2})
    assert rates.keys() == {"data", "fsdp", "tensor"}
    assert min(one.rate for one in rates.values()) == CHIPS["v5p"].link_rate


def test_every_chip_is_plausible():
    for chip in CHIPS.values():
        assert 1e14 < chip.flops <= chip.int8_ops < 1e16
        assert 15 * 2**30 < chip.hbm_bytes < 200 * 2**30
        assert chip.dcn_rate < chip.link_rate < chip.hbm_rate
        assert math.isclose(chip.flops / chip.hbm_rate, 250, rel_tol=1.3)
