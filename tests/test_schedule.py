"""Timetables: every microbatch passes every chunk in order, there and back, and no stage does two things at once."""

import numpy as np
import pytest

from parallel.schedule import check_layers, make_schedule, table

SCHEDULES = [
    ("1f1b", 1, 3, 1, 1),
    ("1f1b", 4, 8, 1, 1),
    ("1f1b", 4, 2, 1, 1),
    ("1f1b", 2, 4, 1, 2),
    ("gpipe", 4, 6, 1, 1),
    ("gpipe", 2, 2, 1, 2),
    ("interleaved", 2, 6, 3, 1),
    ("interleaved", 4, 8, 2, 1),
    ("interleaved", 2, 4, 2, 2),
]
IDS = [f"{name} S={s} M={m} v={v} k={k}" for name, s, m, v, k in SCHEDULES]


@pytest.mark.parametrize("arguments", SCHEDULES, ids=IDS)
def test_every_microbatch_walks_through_the_chain_and_back(arguments):
    schedule = make_schedule(*arguments)
    stages, count, chunks = schedule.num_stages, schedule.num_microbatches, schedule.num_chunks
    found = table(schedule)
    for m in range(count):
        there = [
            int(np.argmax(found[s, :, 0] == c * count + m)) for c in range(chunks) for s in range(stages)
        ]
        back = [int(np.argmax(found[s, :, 1] == c * count + m)) for c in range(chunks) for s in range(stages)]
        for c in range(chunks):
            for s in range(stages):
                assert (found[s, :, 0] == c * count + m).sum() == 1
                assert (found[s, :, 1] == c * count + m).sum() == 1
        assert np.all(np.diff(there) == 1)  # what a stage sends, the next one takes in the next tick
        assert np.all(np.diff(back) == -1)
        assert back[-1] >= there[-1]


@pytest.mark.parametrize("arguments", [each for each in SCHEDULES if each[2] >= each[1]], ids=str)
def test_the_bubble_is_the_papers(arguments):
    """Of pipelines that fill: with fewer microbatches than stages it is larger."""
    schedule = make_schedule(*arguments)
    stages, chunks = schedule.num_stages, schedule.num_chunks
    expected = (stages - 1) / (chunks * schedule.num_microbatches + stages - 1)
    assert schedule.bubble() == pytest.approx(expected)


def test_memory_of_1f1b_does_not_grow_and_that_of_gpipe_does():
    assert [make_schedule("1f1b", 4, m).num_in_flight for m in (8, 16, 64)] == [7, 7, 7]
    assert [make_schedule("gpipe", 4, m).num_in_flight for m in (8, 16, 64)] == [8, 16, 64]
    assert [make_schedule("1f1b", 4, m).num_waiting(0) for m in (8, 64)] == [1, 1]
    interleaved = {make_schedule("interleaved", 4, m, 2).num_in_flight for m in (16, 64)}
    assert len(interleaved) == 1


@pytest.mark.parametrize("arguments", SCHEDULES, ids=IDS)
def test_kept_inputs_fit_their_ring(arguments):
    """Microbatch m is kept at m % num_in_flight: no two that are there at once may share a place."""
    schedule = make_schedule(*arguments)
    size, found = schedule.num_in_flight, table(schedule)
    for s in range(schedule.num_stages):
        for c in range(schedule.num_chunks):
            there: dict[int, int] = {}
            for tick in range(schedule.num_ticks):
                came, left = found[s, tick]
                if came >= 0 and came // schedule.num_microbatches == c:
                    m = int(came % schedule.num_microbatches)
                    assert there.get(m % size, m) == m
                    there[m % size] = m
                if left >= 0 and left // schedule.num_microbatches == c:
                    m = int(left % schedule.num_microbatches)
                    assert there.pop(m % size) == m
            assert not there


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("zigzag", 2, 4), "schedule 'zigzag' is unknown"),
        (("interleaved", 2, 4, 1), "virtual_stages = 1: an interleaved schedule has at least 2"),
        (("1f1b", 2, 4, 2), "virtual_stages = 2: the schedule '1f1b' has 1"),
        (
            ("interleaved", 4, 6, 2),
            "microbatches = 6 is no multiple of stage = 4, .* nearest that works is 8",
        ),
        (("1f1b", 4, 6, 1, 2), "as an encoder-decoder needs: the nearest that works is 8"),
    ],
)
def test_schedules_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(*arguments)


def test_layers_that_stages_do_not_divide():
    check_layers(12, 4)
    check_layers(12, 3, 2)
    with pytest.raises(
        ValueError, match=r"10 layers do not divide over stage=4: the nearest that works is stage=2"
    ):
        check_layers(10, 4)
    with pytest.raises(ValueError, match=r"12 layers .* stage=4 x virtual_stages=2: .* works is stage=3"):
        check_layers(12, 4, 2)
