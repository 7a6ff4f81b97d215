"""Activations against float64 definitions, and the two-layer block against numpy."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modelzoo.layers import mlp
from modelzoo.layers.mlp import ACTIVATIONS, GATED, get_activation

Mlp: Any = mlp.Mlp  # flax types what init and apply return as unions
erf = np.vectorize(math.erf, otypes=[np.float64])


def gelu(x):
    return x * 0.5 * (1.0 + erf(x / math.sqrt(2.0)))


def gelu_tanh(x):
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


# What transformers' ACT2FN holds under these names, but for those with parameters of their own (prelu, xielu).
DEFINITIONS = {
    "gelu": gelu,
    "gelu_10": lambda x: np.clip(gelu(x), -10.0, 10.0),
    "gelu_accurate": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_new": gelu_tanh,
    "gelu_python": gelu,
    "gelu_python_tanh": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "laplace": lambda x: 0.5 * (1.0 + erf((x - 0.707107) / (0.282095 * math.sqrt(2.0)))),
    "leaky_relu": lambda x: np.where(x < 0, 0.01 * x, x),
    "linear": lambda x: x,
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)),
    "quick_gelu": lambda x: x * sigmoid(1.702 * x),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "relu6": lambda x: np.clip(x, 0, 6),
    "sigmoid": sigmoid,
    "silu": lambda x: x * sigmoid(x),
    "swish": lambda x: x * sigmoid(x),
    "tanh": np.tanh,
}


def test_every_activation_is_defined_here():
    assert ACTIVATIONS.keys() == DEFINITIONS.keys()


@pytest.mark.parametrize("name", DEFINITIONS)
def test_activation(name):
    x = np.concatenate([np.linspace(-20, 20, 401), [-1e-3, 0.0, 1e-3]]).astype(np.float32)
    expected = DEFINITIONS[name](x.astype(np.float64))
    y = get_activation(name)(jnp.asarray(x))
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_activation_gradient(name):
    """Against central differences of the float64 definition, away from kinks."""
    x = np.concatenate([np.linspace(-8.05, -0.05, 60), np.linspace(0.05, 5.95, 60)])
    step = 1e-6
    slope = (DEFINITIONS[name](x + step) - DEFINITIONS[name](x - step)) / (2 * step)
    gradient = jax.vmap(jax.grad(get_activation(name)))(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_activation_keeps_bfloat16(name):
    """Also under strict promotion, where a constant of another dtype would be an error."""
    x = jnp.linspace(-3, 3, 7, dtype=jnp.bfloat16)
    y = get_activation(name)(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        y.astype(jnp.float32), DEFINITIONS[name](np.asarray(x, np.float64)), rtol=0.03, atol=0.01
    )


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="unknown activation 'gelu_newer': known are .*'gelu_new'"):
        get_activation("gelu_newer")


def test_mlp():
    random = np.random.default_rng(0)
    x, w, b, u, c = (random.normal(size=s).astype(np.float32) for s in [(2, 3, 4), (4, 7), 7, (7, 4), 4])
    params = {
        "fc_in": {"kernel": jnp.asarray(w), "bias": jnp.asarray(b)},
        "fc_out": {"kernel": jnp.asarray(u), "bias": jnp.asarray(c)},
    }
    y = Mlp(4, 7, "gelu_new").apply({"params": params}, jnp.asarray(x))
    expected = gelu_tanh(x.astype(np.float64) @ w + b) @ u + c
    np.testing.assert_allclose(y, expected, atol=2e-5)


@pytest.mark.parametrize(("name", "gate"), GATED.items())
def test_gated(name, gate):
    random = np.random.default_rng(0)
    x, w, b, g, d, u, c = (
        random.normal(size=s).astype(np.float32) for s in [(2, 3, 4), (4, 7), 7, (4, 7), 7, (7, 4), 4]
    )
    layers = {"fc_in": (w, b), "fc_gate": (g, d), "fc_out": (u, c)}
    params = {at: {"kernel": jnp.asarray(k), "bias": jnp.asarray(bias)} for at, (k, bias) in layers.items()}
    y = Mlp(4, 7, name).apply({"params": params}, jnp.asarray(x))
    x = x.astype(np.float64)
    np.testing.assert_allclose(y, (DEFINITIONS[gate](x @ g + d) * (x @ w + b)) @ u + c, atol=4e-5)
    assert get_activation(name) is ACTIVATIONS[gate]


def test_mlp_makes_its_parameters():
    params = Mlp(4, 7, "relu", param_dtype=jnp.float16).init(jax.random.key(0), jnp.ones((1, 1, 4)))["params"]
    axes = jax.tree.map(lambda box: box.names, params, is_leaf=lambda x: hasattr(x, "names"))
    assert axes == {
        "fc_in": {"kernel": ("embed", "mlp"), "bias": ("mlp",)},
        "fc_out": {"kernel": ("mlp", "embed"), "bias": ("embed",)},
    }
    assert params["fc_in"]["kernel"].value.shape == (4, 7)
    assert params["fc_out"]["kernel"].value.dtype == jnp.float16


def test_mlp_drops_its_result():
    """After the second product, so that whole elements vanish and the others grow."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16, 32)), jnp.float32)
    module = Mlp(32, 5, "tanh", dropout=0.25, kernel_init=jax.nn.initializers.normal(1.0))
    variables = module.init(jax.random.key(0), x)
    kept = module.apply(variables, x)
    dropped = module.apply(variables, x, deterministic=False, rngs={"dropout": jax.random.key(1)})
    ratio = np.asarray(dropped / kept)
    np.testing.assert_allclose(ratio[ratio != 0], 1 / 0.75, rtol=1e-5)
    assert abs((ratio == 0).mean() - 0.25) < 0.03  # 4096 of them: 4.4 standard deviations


def test_mlp_drops_between_its_layers():
    """The second kernel being the identity, the result shows which elements went."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16, 32)), jnp.float32)
    module = Mlp(32, 32, "linear", activation_dropout=0.25)
    variables = module.init(jax.random.key(0), x)
    variables["params"]["fc_out"]["kernel"] = jnp.eye(32)
    kept = module.apply(variables, x)
    dropped = module.apply(variables, x, deterministic=False, rngs={"dropout": jax.random.key(1)})
    ratio = np.asarray(dropped / kept)
    np.testing.assert_allclose(ratio[ratio != 0], 1 / 0.75, rtol=1e-5)
    assert abs((ratio == 0).mean() - 0.25) < 0.03  # 4096 of them: 4.4 standard deviations
