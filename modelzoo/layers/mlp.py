"""The two-layer feed-forward block and its activations, under the names that transformers gives them."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from modelzoo.axes import constrain
from modelzoo.layers.linear import Initializer, Linear, dropout_layer


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def _gelu_tanh(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


def _laplace(x: jax.Array) -> jax.Array:
    # MEGA's attention activation (Ma et al., 2022, arXiv:2209.10655), at its published mu and sigma.
    mu, sigma = 0.707107, 0.282095
    return 0.5 * (1.0 + jax.lax.erf((x - mu) / (sigma * 2.0**0.5)))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _gelu,
    "gelu_python": _gelu,
    "gelu_10": lambda x: jnp.clip(_gelu(x), -10.0, 10.0),
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_accurate": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_python_tanh": _gelu_tanh,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "laplace": _laplace,
    "leaky_relu": lambda x: jax.nn.leaky_relu(x, 0.01),
    "linear": lambda x: x,
    "mish": jax.nn.mish,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def get_activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation of this name.

    Raises:
        ValueError: no such activation.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: known are {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class Mlp(nn.Module):
    """fc_out(activation(fc_in(x))), then dropout.

    Attributes:
        features: D, width of input and output.
        hidden: F, width between.
        activation: a name in ACTIVATIONS.
        dropout: probability of dropping an element of the result.
        activation_dropout: the same between the two layers.
    """

    features: int
    hidden: int
    activation: str
    dropout: float = 0.0
    kernel_init: Initializer = nn.initializers.normal(0.02)
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    activation_dropout: float = 0.0

    @nn.compact
    def __call__(self, x_BTD: jax.Array, deterministic: bool = True) -> jax.Array:
        width, hidden = (self.features,), (self.hidden,)
        shared: dict[str, Any] = dict(
            kernel_init=self.kernel_init, dtype=self.dtype, param_dtype=self.param_dtype
        )
        x_BTD = constrain(x_BTD, "act_batch", "act_length", "act_embed")
        h_BTF = Linear(width, hidden, ("embed", "mlp"), name="fc_in", **shared)(x_BTD)
        h_BTF = constrain(h_BTF, "act_batch", "act_length", "act_mlp")
        h_BTF = get_activation(self.activation)(h_BTF)
        if self.activation_dropout > 0.0:
            h_BTF = dropout_layer(self.activation_dropout)(h_BTF, deterministic=deterministic)
        y_BTD = Linear(hidden, width, ("mlp", "embed"), name="fc_out", **shared)(h_BTF)
        y_BTD = constrain(y_BTD, "act_batch", "act_stream", "act_embed")
        return dropout_layer(self.dropout)(y_BTD, deterministic=deterministic)
