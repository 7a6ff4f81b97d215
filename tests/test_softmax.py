"""Sums over the classes of a softmax: their numbers, their gradients, their memory, on a split vocabulary too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import parallel
from tests.test_losses import logits_of, reference
from train import softmax


def cross_entropy(logits, labels):
    lse, picked = softmax.logsumexp_and_pick(logits, labels)
    return lse - picked


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("num_classes", [1, 5, 64, 211])
def test_cross_entropy_and_its_gradient(num_classes, dtype):
    logits = logits_of(3, 4, num_classes, dtype=dtype)
    labels = np.random.default_rng(1).integers(0, num_classes, (3, 4)).astype(np.int32)
    weights = logits_of(3, 4, seed=2)

    def weighted(logits):
        return (cross_entropy(logits, jnp.asarray(labels)) * weights).sum()

    value = jax.jit(cross_entropy)(logits, jnp.asarray(labels))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, reference(logits, labels), rtol=2e-6, atol=2e-6)

    gradient = jax.jit(jax.grad(weighted))(logits)
    assert gradient.dtype == dtype
    exact = np.asarray(logits, np.float64)
    exact = np.exp(
        exact - reference(exact, labels)[..., None] - np.take_along_axis(exact, labels[..., None], -1)
    )
    exact = (exact - np.eye(num_classes)[labels]) * np.asarray(weights, np.float64)[..., None]
    tolerance = 3e-6 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(np.asarray(gradient, np.float64), exact, atol=tolerance)


def test_logsumexp_and_pick_has_two_gradients():
    # z-loss and label smoothing are made of these, so each result has its own cotangent.
    logits, labels = logits_of(2, 7), jnp.asarray([3, 6])

    def by_hand(logits):
        return jax.nn.logsumexp(logits, -1), jnp.take_along_axis(logits, labels[:, None], -1)[:, 0]

    def scalar(function):
        return jax.grad(
            lambda x: (lambda lse, picked: (jnp.square(lse) - 3 * jnp.sin(picked)).sum())(*function(x))
        )

    got = scalar(lambda x: softmax.logsumexp_and_pick(x, labels))(logits)
    np.testing.assert_allclose(got, scalar(by_hand)(logits), atol=2e-6)


def test_padded_columns_have_no_share():
    logits, labels = logits_of(2, 3, 10), jnp.zeros((2, 3), jnp.int32)
    padded = jnp.concatenate([logits, jnp.full((2, 3, 6), -jnp.inf)], -1)
    both = jax.value_and_grad(lambda x: cross_entropy(x, labels).sum())
    (value, gradient), (want, want_gradient) = both(padded), both(logits)
    assert value == pytest.approx(float(want), rel=1e-6)
    np.testing.assert_array_equal(gradient[..., 10:], 0)
    np.testing.assert_allclose(gradient[..., :10], want_gradient, atol=1e-7)


def test_large_logits_do_not_overflow():
    logits = jnp.asarray([[1e30, -1e30, 0.0]])
    assert cross_entropy(logits, jnp.asarray([0])) == 0
    assert np.all(np.isfinite(jax.grad(lambda x: cross_entropy(x, jnp.asarray([1])).sum())(logits)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_copy_of_the_logits(dtype):
    logits, labels = jax.ShapeDtypeStruct((2, 64, 4096), dtype), jax.ShapeDtypeStruct((2, 64), jnp.int32)

    def temporary(function):
        compiled = jax.jit(function).lower(logits, labels).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def total(logits, labels):
        return cross_entropy(logits, labels).sum()

    def smoothed(logits, labels):
        lse, picked, mean = softmax.logsumexp_pick_and_mean(logits, labels, 4096)
        return (jnp.square(lse) - picked - mean).sum()

    one_copy = 2 * 64 * 4096 * 2  # bytes, in bf16: the smallest copy there could be
    for each in (total, smoothed) if dtype == jnp.float32 else (total,):
        assert temporary(each) < one_copy / 4
        assert temporary(jax.grad(each)) < one_copy / 4  # the gradient itself is the result


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_sharded_vocabulary_is_not_gathered(smoothing):
    mesh = parallel.make_mesh(data=2, tensor=4)
    rules = parallel.make_rules(mesh)
    logits, labels = (
        logits_of(4, 6, 64),
        jnp.asarray(np.random.default_rng(0).integers(0, 64, (4, 6)), jnp.int32),
    )

    def total(logits, labels):
        lse, picked, mean = softmax.logsumexp_pick_and_mean(logits, labels, 61)
        smooth = smoothing * (picked - mean) if smoothing else 0.0
        return (lse - picked + smooth + 1e-4 * jnp.square(lse)).sum()

    both = jax.value_and_grad(total)
    want, want_gradient = jax.jit(both)(logits, labels)
    sharded = jax.device_put(logits, NamedSharding(mesh, PartitionSpec("data", None, "tensor")))
    with parallel.use(rules):
        compiled = jax.jit(both).lower(sharded, labels).compile()
        value, gradient = compiled(sharded, jax.device_put(labels, compiled.input_shardings[0][1]))
    assert "all-reduce" in compiled.as_text()
    assert "all-gather" not in compiled.as_text()
    assert value == pytest.approx(float(want), rel=1e-6)
    np.testing.assert_allclose(gradient, want_gradient, atol=1e-6)


def test_the_mean_counts_no_padding():
    logits, labels = logits_of(2, 3, 10), jnp.asarray([[3, 0, 9], [1, 2, 5]])
    padded = jnp.concatenate([logits, jnp.full((2, 3, 6), -jnp.inf)], -1)

    def parts(x):
        return softmax.logsumexp_pick_and_mean(x, labels, 10)

    def scalar(x):
        lse, picked, mean = parts(x)
        return (jnp.square(lse) - 3 * jnp.sin(picked) + mean * mean).sum()

    def by_hand(x):
        picked = jnp.take_along_axis(x, labels[..., None], -1)[..., 0]
        return (jnp.square(jax.nn.logsumexp(x, -1)) - 3 * jnp.sin(picked) + jnp.square(x.mean(-1))).sum()

    np.testing.assert_allclose(parts(padded)[2], np.asarray(logits).mean(-1), atol=1e-6)
    got, want = jax.grad(scalar)(padded), jax.grad(by_hand)(logits)
    np.testing.assert_array_equal(got[..., 10:], 0)
    np.testing.assert_allclose(got[..., :10], want, atol=2e-6)
