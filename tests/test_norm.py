"""Layer normalisation and RMS norm against float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modelzoo.layers import norm
from modelzoo.layers.norm import NORMS, divide_by_rms, make_norm, normalize
from tests.zoo import assert_close

LayerNorm: Any = norm.LayerNorm  # flax types what init and apply return as unions
RMSNorm: Any = norm.RMSNorm


def reference(x, epsilon, scale=1.0, bias=0.0):
    x = np.asarray(x, np.float64)
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + epsilon) * scale + bias


@pytest.mark.parametrize("epsilon", [1e-5, 1e-12, 0.5])
def test_against_float64(epsilon):
    random = np.random.default_rng(0)
    x = random.normal(3.0, 2.0, (4, 5, 33)).astype(np.float32)
    scale, bias = random.normal(size=(2, 33)).astype(np.float32)
    params = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
    y = LayerNorm(33, epsilon).apply({"params": params}, jnp.asarray(x))
    np.testing.assert_allclose(y, reference(x, epsilon, scale, bias), atol=3e-6)


def test_gradients_are_those_of_autodiff():
    """The layer has a backward pass of its own for scale and bias."""
    random = np.random.default_rng(0)
    x, weight = jnp.asarray(random.normal(1.0, 2.0, (2, 3, 4, 7)), jnp.float32)
    params = {"scale": jnp.asarray(random.normal(size=7), jnp.float32), "bias": jnp.full(7, 0.3)}

    def ours(params, x):
        return jnp.sum(weight * LayerNorm(7).apply({"params": params}, x))

    def plain(params, x):
        centered = x - x.mean(-1, keepdims=True)
        normed = centered / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return jnp.sum(weight * (normed * params["scale"] + params["bias"]))

    assert_close(jax.grad(ours, (0, 1))(params, x), jax.grad(plain, (0, 1))(params, x), 1e-5)


def test_a_large_mean_does_not_cancel():
    """E[x²] - E[x]² would lose everything here: 1000² + 1 in float32."""
    x = np.random.default_rng(0).normal(1000.0, 1.0, (8, 256)).astype(np.float32)
    np.testing.assert_allclose(normalize(jnp.asarray(x), 1e-5), reference(x, 1e-5), atol=5e-4)


def test_a_constant_row_is_zero_with_a_finite_gradient():
    x = jnp.full((2, 8), 3.0)
    assert (normalize(x, 1e-5) == 0).all()
    assert np.isfinite(jax.grad(lambda x: jnp.sum(normalize(x, 1e-5) ** 3))(x)).all()


def test_statistics_are_float32_in_bfloat16():
    """The result is the float32 result rounded once."""
    x = jnp.asarray(np.random.default_rng(0).normal(5.0, 2.0, (4, 300)), jnp.bfloat16)
    layer = LayerNorm(300, dtype=jnp.bfloat16)
    y = layer.apply(layer.init(jax.random.key(0), x), x)
    assert y.dtype == jnp.bfloat16
    expected = reference(x.astype(jnp.float32), 1e-5)
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2**-8, atol=1e-5)


def test_starts_as_the_identity_of_a_normed_row():
    params = LayerNorm(6, param_dtype=jnp.float16).init(jax.random.key(0), jnp.ones((1, 6)))["params"]
    assert (params["scale"].value == 1).all()
    assert (params["bias"].value == 0).all()
    assert {params[name].names for name in params} == {("embed",)}
    assert {params[name].value.dtype for name in params} == {jnp.dtype("float16")}


def test_rms_against_float64():
    """No mean is taken off; gradients are those of autodiff, though the scale's has a backward pass of its own."""
    random = np.random.default_rng(0)
    x, weight = jnp.asarray(random.normal(3.0, 2.0, (2, 4, 5, 33)), jnp.float32)
    scale = jnp.asarray(random.normal(size=33), jnp.float32)
    wide = np.asarray(x, np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 0.5)
    np.testing.assert_allclose(divide_by_rms(x, 0.5), expected, atol=1e-6)

    def ours(scale, x):
        return jnp.sum(weight * RMSNorm(33, 0.5).apply({"params": {"scale": scale}}, x))

    def plain(scale, x):
        return jnp.sum(weight * scale * x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 0.5))

    assert_close(jax.grad(ours, (0, 1))(scale, x), jax.grad(plain, (0, 1))(scale, x), 1e-5)


def test_kinds_have_what_they_need():
    made = {kind: make_norm(kind, 6, 1e-3, name=None) for kind in NORMS}
    params = {kind: layer.init(jax.random.key(0), jnp.ones((1, 6)))["params"] for kind, layer in made.items()}
    assert {kind: set(tree) for kind, tree in params.items()} == {
        "layer": {"scale", "bias"},
        "rms": {"scale"},
    }
    assert params["rms"]["scale"].names == ("embed",)
    assert all(layer.epsilon == 1e-3 for layer in made.values())


def test_a_scale_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"parameter scale has shape \(1,\), but the config makes it \(6,\)"):
        LayerNorm(6).apply({"params": {"scale": jnp.ones(1), "bias": jnp.ones(6)}}, jnp.ones((2, 6)))
