"""Chosen steps are traced, and no others."""

import jax.numpy as jnp
import pytest

from train import profiling
from train.profiling import Profile


@pytest.fixture
def calls(monkeypatch):
    """What jax.profiler was asked for."""
    found = []
    monkeypatch.setattr(profiling.jax.profiler, "start_trace", lambda folder: found.append(folder))
    monkeypatch.setattr(profiling.jax.profiler, "stop_trace", lambda: found.append("stop"))
    return found


def run(profile, first, last):
    for step in range(first, last + 1):
        profile.before(step)
        profile.after(step, {"loss": jnp.float32(1)})


@pytest.mark.parametrize(
    ("steps", "first", "last", "traces"),
    [((3, 4), 1, 6, 1), ((3, 4), 4, 6, 1), ((3, 4), 1, 3, 1), ((3, 4), 5, 6, 0), (None, 1, 6, 0)],
)
def test_traces_the_chosen_steps(tmp_path, calls, steps, first, last, traces):
    with Profile(tmp_path, steps) as profile:
        run(profile, first, last)
    assert calls == [str(tmp_path / "profile"), "stop"] * traces


def test_a_trace_is_a_file(tmp_path):
    with Profile(tmp_path, (2, 2)) as profile:
        run(profile, 1, 3)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
