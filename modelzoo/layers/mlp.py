"""The two-layer feed-forward block and its activations, under the names that transformers gives them.

Gated activations are ours to name, as Shazeer does (2020, arXiv:2002.05202): the first layer is then two, of which one,
through the activation, multiplies the other.
"""

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

GATED = {"glu": "sigmoid", "reglu": "relu", "geglu": "gelu", "swiglu": "silu"}
"""Gated activations: the one that the gate goes through."""


def get_activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation of this name; of a gated one, its gate's.

    Raises:
        ValueError: no such activation.
    """
    if name not in ACTIVATIONS and name not in GATED:
        raise ValueError(f"unknown activation {name!r}: known are {sorted({*ACTIVATIONS, *GATED})}")
    return ACTIVATIONS[GATED.get(name, name)]


def usual_hidden(features: int, activation: str) -> int:
    """F where a config does not say it.

    4 D; of a gated activation, whose MLP has three kernels, 8/3 D: as many parameters, rounded up to a multiple of 64.
    """
    return -(-8 * features // (3 * 64)) * 64 if activation in GATED else 4 * features


class Mlp(nn.Module):
    """fc_out(activation(fc_in(x))), then dropout; gated, fc_out(activation(fc_gate(x)) * fc_in(x)).

    Attributes:
        features: D, width of input and output.
        hidden: F, width between.
        activation: a name in ACTIVATIONS or GATED.
        dropout: probability of dropping an element of the result.
        activation_dropout: the same between the two layers.
        out_init: initializer of fc_out, where it is another.
    """

    features: int
    hidden: int
    activation: str
    dropout: float = 0.0
    kernel_init: Initializer = nn.initializers.normal(0.02)
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    activation_dropout: float = 0.0
    out_init: Initializer | None = None

    @nn.compact
    def __call__(self, x_BTD: jax.Array, deterministic: bool = True) -> jax.Array:
        width, hidden = (self.features,), (self.hidden,)
        shared: dict[str, Any] = dict(
            kernel_init=self.kernel_init, dtype=self.dtype, param_dtype=self.param_dtype
        )
        x_BTD = constrain(x_BTD, "act_batch", "act_length", "act_embed")

        def enter(name: str) -> jax.Array:
            h_BTF = Linear(width, hidden, ("embed", "mlp"), name=name, **shared)(x_BTD)
            return constrain(h_BTF, "act_batch", "act_length", "act_mlp")

        activate = get_activation(self.activation)
        if self.activation in GATED:
            h_BTF = activate(enter("fc_gate")) * enter("fc_in")
        else:
            h_BTF = activate(enter("fc_in"))
        if self.activation_dropout > 0.0:
            h_BTF = dropout_layer(self.activation_dropout)(h_BTF, deterministic=deterministic)
        shared["kernel_init"] = self.out_init or self.kernel_init
        y_BTD = Linear(hidden, width, ("mlp", "embed"), name="fc_out", **shared)(h_BTF)
        y_BTD = constrain(y_BTD, "act_batch", "act_stream", "act_embed")
        return dropout_layer(self.dropout)(y_BTD, deterministic=deterministic)
