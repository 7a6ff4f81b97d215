"""Layer normalisation (Ba et al., 2016, arXiv:1607.06450). Statistics are float32 whatever the dtype."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from modelzoo.layers.linear import parameter


def normalize(x: jax.Array, epsilon: float) -> jax.Array:
    """x minus its mean over the last dimension, divided by its standard deviation; float32."""
    x = x.astype(jnp.float32)
    centered = x - x.mean(axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
    return centered * lax.rsqrt(variance + epsilon)


class LayerNorm(nn.Module):
    """Normalises the last dimension, then scales and shifts it.

    Attributes:
        features: D, the size of the last dimension.
        epsilon: added to the variance.
        dtype: dtype of the result.
        param_dtype: dtype `scale` and `bias` are created in.
    """

    features: int
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape, axes = (self.features,), ("embed",)
        scale = parameter(self, "scale", nn.initializers.ones, shape, axes, self.param_dtype).astype(jnp.float32)
        bias = parameter(self, "bias", nn.initializers.zeros, shape, axes, self.param_dtype).astype(jnp.float32)
        return (normalize(x, self.epsilon) * scale + bias).astype(self.dtype)
