"""Schedules at the points that matter, and where they go on from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import schedules


def test_schedules():
    cosine = schedules.warmup_cosine(peak=2.0, num_steps=10, warmup_steps=4, end_fraction=0.1)
    np.testing.assert_allclose([cosine(step) for step in range(4)], [0.5, 1.0, 1.5, 2.0], rtol=1e-6)
    np.testing.assert_allclose(cosine(6), 2.0 * (0.1 + 0.9 * 0.5), rtol=1e-6)  # half of the way down
    np.testing.assert_allclose([cosine(9), cosine(1000)], [0.2, 0.2], rtol=1e-6)
    linear = schedules.warmup_linear(peak=1.0, num_steps=5, warmup_steps=1)
    np.testing.assert_allclose([linear(step) for step in range(6)], [1, 0.75, 0.5, 0.25, 0, 0], atol=1e-7)
    assert schedules.constant(value=0.3)(7) == np.float32(0.3)
    assert schedules.warmup_cosine(peak=1.0, num_steps=1)(0) == np.float32(0.1)
    # as the optimizer calls them: traced int32
    np.testing.assert_allclose(jax.jit(cosine)(jnp.int32(1)), 1.0, rtol=1e-6)


def values(schedule, *steps):
    return [float(schedule(step)) for step in steps]


@pytest.mark.parametrize(("shape", "half"), [("linear", 0.5), ("cosine", 0.5), ("1-sqrt", 1 - np.sqrt(0.5))])
def test_warmup_stable_decay(shape, half):
    made = schedules.warmup_stable_decay(
        peak=2.0, num_steps=20, warmup_steps=4, decay_fraction=0.2, end_fraction=0.1, shape=shape
    )
    np.testing.assert_allclose(values(made, 0, 3, 4, 15), [0.5, 2.0, 2.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(values(made, 17, 19, 1000), [2 * (0.1 + 0.9 * half), 0.2, 0.2], rtol=1e-6)
    # On the plateau a longer run is the same run.
    longer = schedules.warmup_stable_decay(peak=2.0, num_steps=40, warmup_steps=4, shape=shape)
    assert values(longer, *range(16)) == values(made, *range(16))
    flat = schedules.warmup_stable_decay(peak=2.0, num_steps=20, decay_fraction=0.0)
    assert values(flat, 0, 19, 50) == [2.0, 2.0, 2.0]


def test_inverse_sqrt():
    made = schedules.inverse_sqrt(peak=1.0, warmup_steps=4)
    np.testing.assert_allclose(values(made, 0, 3, 15, 99), [0.25, 1.0, 0.5, 0.2], rtol=1e-6)
    np.testing.assert_allclose(jax.jit(made)(jnp.int32(15)), 0.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.constant(value=-1.0), r"constant.value"),
        (lambda: schedules.warmup_cosine(peak=1.0, num_steps=0), r"warmup_cosine.num_steps = 0"),
        (lambda: schedules.warmup_linear(peak=1.0, num_steps=9, end_fraction=2.0), r"linear.end_fraction"),
        (lambda: schedules.inverse_sqrt(peak=1.0, warmup_steps=0), r"inverse_sqrt.warmup_steps = 0"),
        (lambda: schedules.warmup_stable_decay(peak=1.0, num_steps=9, decay_fraction=1.5), r"decay_fraction"),
        (
            lambda: schedules.warmup_stable_decay(peak=1.0, num_steps=10, warmup_steps=9),
            r"warmup_stable_decay.warmup_steps = 9: the fall begins at step 8 already",
        ),
    ],
)
def test_numbers_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
