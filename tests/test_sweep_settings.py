"""The settings of a study."""

import pytest

from train.sweeping.sweep_settings import Sweep


def test_seeds_are_counted_or_named():
    assert Sweep(seeds=3).seeds_from(5) == (5, 6, 7)
    assert Sweep(seeds=[4, 1]).seeds_from(5) == (4, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": 0}, r"sweep\.seeds = 0: it is at least 1"),
        ({"seeds": ()}, r"sweep\.seeds is empty"),
        ({"seeds": (1, 1)}, "named twice"),
        ({"paired": True, "alone": True}, "both on"),
    ],
)
def test_what_does_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        Sweep(**settings)
