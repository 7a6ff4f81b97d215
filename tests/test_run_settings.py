"""What a run's settings may be."""

import typing

import pytest

from parallel.anatomy import REMATS
from parallel.schedule import SCHEDULES
from train.run_settings import FREE, Run

NEEDED = dict(
    workdir="run",
    num_steps=6,
    global_batch_size=8,
    sequence_length=16,
    model_class="GPTJForCausalLM",
    optimizer=None,
)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"keep_checkpoints": 0}, r"train\.keep_checkpoints = 0: it is at least 1"),
        ({"profile_steps": (3, 2)}, r"train\.profile_steps = \(3, 2\): it is \(first, last\)"),
        ({"profile_steps": (0, 2)}, r"train\.profile_steps = \(0, 2\)"),
        ({"seed": 2**32}, r"train\.seed = 4294967296: it is below"),
    ],
)
def test_wrong_settings_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        Run(**NEEDED, **changed)


def test_what_is_watched_may_change():
    names = {"train.keep_best", "train.profile_steps", "train.module_norms", "train.wandb"}
    assert names <= set(FREE)
    assert Run(**NEEDED, profile_steps=(2, 2)).stop_on_nonfinite


def test_the_choices_are_those_that_there_are():
    """Written out in Run, since they are read where JAX is not loaded."""
    hints = typing.get_type_hints(Run)
    assert set(typing.get_args(hints["remat"])) == set(REMATS)
    assert set(typing.get_args(hints["schedule"])) == set(SCHEDULES)
