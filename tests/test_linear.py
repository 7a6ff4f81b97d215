"""The linear layer against numpy, and what `parameter` accepts."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modelzoo.layers import linear
from modelzoo.layers.linear import add_bias, contract, parameter, sum_leading

Linear: Any = linear.Linear  # flax types what init and apply return as unions
dropout_layer: Any = linear.dropout_layer
NORMAL = nn.initializers.normal(0.5)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("inputs", "outputs", "subscripts"),
    [
        ((4,), (5,), "btd,df->btf"),
        ((4,), (3, 2), "btd,dnh->btnh"),
        ((3, 2), (5,), "btnh,nhd->btd"),
        ((3, 2), (2, 3), "btnh,nhij->btij"),
    ],
)
def test_linear_contracts_its_inputs(inputs, outputs, subscripts):
    x, kernel, bias = random(2, 6, *inputs), random(*inputs, *outputs, seed=1), random(*outputs, seed=2)
    axes = ("embed",) * (len(inputs) + len(outputs))
    params = {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
    y = Linear(inputs, outputs, axes).apply({"params": params}, jnp.asarray(x))
    expected = np.einsum(subscripts, x.astype(np.float64), kernel.astype(np.float64)) + bias
    np.testing.assert_allclose(y, expected, atol=1e-5)
    del params["bias"]
    y = Linear(inputs, outputs, axes, use_bias=False).apply({"params": params}, jnp.asarray(x))
    np.testing.assert_allclose(y, expected - bias, atol=1e-5)


def test_linear_makes_its_parameters():
    seen = []

    def init(rng, shape, dtype):
        seen.append((shape, dtype))
        return nn.initializers.normal(0.5)(rng, shape, dtype)

    layer = Linear((7,), (2, 3), ("embed", "heads", "head_dim"), True, init, jnp.bfloat16, jnp.float16)
    params = layer.init(jax.random.key(0), jnp.zeros((1, 7), jnp.bfloat16))["params"]
    assert seen == [((7, 2, 3), jnp.float16)]  # its own shape, not a flattened one
    assert params["kernel"].names == ("embed", "heads", "head_dim")
    assert params["bias"].names == ("heads", "head_dim")
    assert params["bias"].value.dtype == jnp.float16
    assert (params["bias"].value == 0).all()


@pytest.mark.parametrize(
    ("x_dtype", "param_dtype"), [(jnp.float32, jnp.float32), (jnp.bfloat16, jnp.float32)]
)
def test_linear_computes_in_its_dtype(x_dtype, param_dtype):
    layer = Linear((4,), (5,), ("embed", "mlp"), dtype=jnp.bfloat16, param_dtype=param_dtype)
    params = {"kernel": jnp.asarray(random(4, 5)), "bias": jnp.ones(5)}
    y = layer.apply({"params": params}, jnp.asarray(random(2, 4), x_dtype))
    assert y.dtype == jnp.bfloat16
    rounded = random(4, 5).astype(jnp.bfloat16).astype(np.float64)
    expected = random(2, 4).astype(jnp.bfloat16).astype(np.float64) @ rounded + 1.0
    np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=0.02)


def test_a_padded_vocabulary_is_taken_as_it_is():
    layer = Linear((4,), (5,), ("embed", "vocab"))
    params = {"kernel": jnp.asarray(random(4, 8)), "bias": jnp.zeros(8)}
    assert layer.apply({"params": params}, jnp.ones((1, 4))).shape == (1, 8)


@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        (("embed", "vocab"), (4, 4)),  # fewer rows than the vocabulary
        (("embed", "vocab"), (6, 5)),  # only the vocabulary may grow
        (("embed", "mlp"), (4, 6)),
        (("embed", "mlp"), (4,)),
        (("embed", "mlp"), (1, 4, 5)),
    ],
)
def test_a_parameter_of_another_shape_is_refused(axes, shape):
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Linear((4,), (5,), axes, use_bias=False, name="inner")(x)

    params = {"inner": {"kernel": jnp.ones(shape)}}
    with pytest.raises(
        ValueError, match=r"parameter inner/kernel has shape .*, but the config makes it \(4, 5\)"
    ):
        Outer().apply({"params": params}, jnp.ones((1, 4)))


def test_a_boxed_parameter_is_unboxed():
    layer = Linear((4,), (5,), ("embed", "mlp"), kernel_init=NORMAL)
    boxed = layer.init(jax.random.key(0), jnp.ones((1, 4)))
    np.testing.assert_array_equal(
        layer.apply(boxed, jnp.ones((1, 4))), layer.apply(nn.meta.unbox(boxed), jnp.ones((1, 4)))
    )


@pytest.mark.parametrize("use_dtype", [None, jnp.bfloat16])
def test_parameter_is_cast_for_its_use_alone(use_dtype):
    class Holder(nn.Module):
        @nn.compact
        def __call__(self):
            return parameter(self, "w", nn.initializers.ones, (3,), ("embed",), jnp.float32, use_dtype)

    holder: Any = Holder()
    used, variables = holder.init_with_output(jax.random.key(0))
    assert variables["params"]["w"].value.dtype == jnp.float32
    assert used.dtype == holder.apply(variables).dtype == (use_dtype or jnp.float32)


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_dropout_is_linens(rate):
    x, rngs = (
        jnp.linspace(-1, 1, 4096).reshape(4, 8, 128).astype(jnp.bfloat16),
        {"dropout": jax.random.key(3)},
    )
    plain = nn.Dropout(rate).apply({}, x, deterministic=False, rngs=rngs)
    assert (dropout_layer(rate).apply({}, x, deterministic=False, rngs=rngs) == plain).all()


def test_dropout_in_expectation():
    x = jnp.ones((100, 100))
    dropped = dropout_layer(0.25).apply({}, x, deterministic=False, rngs={"dropout": jax.random.key(0)})
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs(float((dropped == 0).mean()) - 0.25) < 0.02  # 4.6 standard deviations
    assert (dropout_layer(0.25).apply({}, x, deterministic=True) == x).all()


def check_gradients(function, plain, *arrays):
    """A backward pass of our own is that of autodiff on the plain formula, whatever comes down."""
    result, pull = jax.vjp(function, *arrays)
    expected, pull_plain = jax.vjp(plain, *arrays)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
    down = jnp.asarray(random(*result.shape, seed=9))
    for ours, autodiff in zip(pull(down), pull_plain(down), strict=True):
        assert ours.shape == autodiff.shape
        np.testing.assert_allclose(ours, autodiff, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("num_in", "x_shape", "kernel_shape", "subscripts"),
    [
        (1, (2, 6, 4), (4, 5), "btd,df->btf"),
        (1, (2, 6, 4), (4, 3, 2), "btd,dnh->btnh"),
        (2, (2, 6, 3, 2), (3, 2, 5), "btnh,nhd->btd"),
        (2, (3, 2), (3, 2, 4, 3), "nh,nhij->ij"),
    ],
)
def test_gradients_of_contract(num_in, x_shape, kernel_shape, subscripts):
    x, kernel = jnp.asarray(random(*x_shape)), jnp.asarray(random(*kernel_shape, seed=1))
    check_gradients(lambda x, k: contract(x, k, num_in), lambda x, k: jnp.einsum(subscripts, x, k), x, kernel)


@pytest.mark.parametrize("bias_shape", [(4,), (3, 4)])
def test_gradients_of_add_bias(bias_shape):
    y, bias = jnp.asarray(random(2, 5, 3, 4)), jnp.asarray(random(*bias_shape, seed=1))
    check_gradients(add_bias, lambda y, b: y + b, y, bias)


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_sum_leading(rank):
    x = random(7, 3, 4)
    np.testing.assert_allclose(
        sum_leading(jnp.asarray(x), rank), x.sum(axis=tuple(range(3 - rank))), rtol=1e-5
    )


def test_sum_leading_adds_up_in_float32():
    """In bfloat16 a sum of ones would stop at 256."""
    total = sum_leading(jnp.ones((1000, 2), jnp.bfloat16), 1)
    assert total.dtype == jnp.bfloat16
    assert (total == 1000).all()
