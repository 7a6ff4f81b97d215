"""Rotary positions against complex numbers in float64: feature pairs are complex, positions turn them."""

import jax.numpy as jnp
import numpy as np
import pytest

from modelzoo.layers.position import alibi_bias, alibi_slopes, rotary_tables, rotate


def turn(x, positions, rotary_dim, base=10000.0):
    """x [B, T, N, H] with features (0, 1), (2, 3), ... of the first rotary_dim as complex numbers, turned."""
    x = np.asarray(x, np.float64).copy()
    frequency = base ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    phase = np.exp(1j * np.asarray(positions, np.float64)[..., None, None] * frequency)
    turned = (x[..., 0:rotary_dim:2] + 1j * x[..., 1:rotary_dim:2]) * phase
    x[..., 0:rotary_dim:2], x[..., 1:rotary_dim:2] = turned.real, turned.imag
    return x


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def rotated(x, positions, rotary_dim, **kwargs):
    return rotate(jnp.asarray(x), *rotary_tables(jnp.asarray(positions, jnp.int32), rotary_dim, **kwargs))


@pytest.mark.parametrize("rotary_dim", [2, 4, 6, 10])
@pytest.mark.parametrize("base", [10000.0, 100.0])
def test_against_complex_numbers(rotary_dim, base):
    x = random(2, 5, 3, 10)
    positions = np.array([[0, 1, 2, 3, 4], [7, 3, 3, 60, 0]])
    np.testing.assert_allclose(
        rotated(x, positions, rotary_dim, base=base), turn(x, positions, rotary_dim, base), atol=2e-5
    )


def test_one_row_of_positions_serves_every_row():
    x = random(3, 5, 2, 4)
    np.testing.assert_array_equal(rotated(x, [[4, 5, 6, 7, 8]], 4), rotated(x, [[4, 5, 6, 7, 8]] * 3, 4))


def test_other_features_pass_through_untouched():
    x = random(2, 5, 3, 10)
    y = rotated(x, [[1, 2, 3, 4, 5]], 6)
    np.testing.assert_array_equal(y[..., 6:], x[..., 6:])
    assert (np.abs(y[..., :6] - x[..., :6]) > 1e-4).any(axis=(0, 1, 2)).all()


def test_position_zero_turns_nothing_and_lengths_are_kept():
    x = random(2, 5, 3, 8)
    np.testing.assert_array_equal(rotated(x, [[0] * 5], 8), x)
    y = rotated(x, [[1, 20, 300, 4000, 50000]], 8)
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)


def test_scores_depend_on_distance_alone():
    """The reason for rotary positions: q at 40 sees k at 33 as q at 8 sees k at 1."""
    q, k = random(1, 1, 2, 8), random(1, 1, 2, 8, seed=1)

    def score(i, j):
        return np.einsum("btnh,btnh->n", rotated(q, [[i]], 8), rotated(k, [[j]], 8))

    np.testing.assert_allclose(score(40, 33), score(8, 1), atol=2e-5)
    assert np.abs(score(40, 33) - score(1, 8)).max() > 1e-2


@pytest.mark.parametrize("rotary_dim", [4, 64, 80])
def test_tables_hold_float32s_best_at_far_positions(rotary_dim):
    """At position 2047 one rounding of a frequency is 1e-4 radians: each must be the float32 nearest to it."""
    sin, cos = rotary_tables(jnp.array([[1, 2047]]), rotary_dim)
    exponent = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    frequency = np.float32(1 / np.float32(10000.0 ** exponent.astype(np.float64))).repeat(2)
    for i, position in enumerate([1, 2047]):
        angle = (np.float32(position) * frequency).astype(np.float64)
        assert sin.shape == cos.shape == (1, 2, rotary_dim)
        np.testing.assert_allclose(sin[0, i], np.sin(angle), atol=1e-6)
        np.testing.assert_allclose(cos[0, i], np.cos(angle), atol=1e-6)


def test_rotate_keeps_its_dtype():
    x = jnp.asarray(random(1, 3, 2, 4), jnp.bfloat16)
    y = rotated(x, [[0, 9, 31]], 4)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), turn(x.astype(jnp.float32), [[0, 9, 31]], 4), atol=0.05)


@pytest.mark.parametrize("num_heads", [1, 3, 4, 12, 16])
def test_alibi_slopes_are_geometric(num_heads):
    slopes = alibi_slopes(num_heads)
    power = 2 ** int(np.log2(num_heads))
    assert slopes.shape == (num_heads,)
    np.testing.assert_allclose(slopes[:power], 2.0 ** (-8.0 / power * np.arange(1, power + 1)), rtol=1e-6)
    # the heads past a power of two take every other slope of twice as many heads
    of_double = 2.0 ** (-4.0 / power * np.arange(1, 2 * power, 2))
    np.testing.assert_allclose(slopes[power:], of_double[: num_heads - power], rtol=1e-6)


def test_alibi_counts_the_real_tokens_of_a_row():
    mask = jnp.array([[0, 0, 1, 1, 1], [1, 0, 1, 1, 0]])
    bias = alibi_bias(mask, 2)
    assert bias.shape == (2, 2, 1, 5)
    positions = np.array([[0, 0, 0, 1, 2], [0, 0, 1, 2, 0]])
    np.testing.assert_allclose(bias[:, 0, 0], positions * 0.0625)
    np.testing.assert_allclose(bias[:, 1, 0], positions * 0.00390625)
