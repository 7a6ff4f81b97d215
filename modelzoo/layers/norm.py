"""Layer normalisation (Ba et al., 2016, arXiv:1607.06450), and RMS norm (Zhang and Sennrich, 2019, arXiv:1910.07467).

Statistics are float32 whatever the dtype.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from modelzoo.layers.linear import parameter, sum_leading


def normalize(x: jax.Array, epsilon: float) -> jax.Array:
    """x minus its mean over the last dimension, divided by its standard deviation; float32."""
    x = x.astype(jnp.float32)
    centered = x - x.mean(axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
    return centered * lax.rsqrt(variance + epsilon)


def divide_by_rms(x: jax.Array, epsilon: float) -> jax.Array:
    """x divided by the root of the mean of its squares over the last dimension; float32."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)


@jax.custom_vjp
def scale_and_shift(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """x * scale + bias, both [D], broadcast over x's leading dimensions."""
    return x * scale + bias


def _forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return scale_and_shift(x, scale, bias), (x, scale)


def _backward(saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, scale = saved
    return grad * scale, sum_leading(grad * x, 1), sum_leading(grad, 1)


scale_and_shift.defvjp(_forward, _backward)


@jax.custom_vjp
def scale_rows(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x * scale, which is [D] and broadcast over x's leading dimensions."""
    return x * scale


scale_rows.defvjp(lambda x, scale: (x * scale, (x, scale)), lambda saved, grad: _backward(saved, grad)[:2])


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
        scale = parameter(self, "scale", nn.initializers.ones, shape, axes, self.param_dtype).astype(
            jnp.float32
        )
        bias = parameter(self, "bias", nn.initializers.zeros, shape, axes, self.param_dtype).astype(
            jnp.float32
        )
        return scale_and_shift(normalize(x, self.epsilon), scale, bias).astype(self.dtype)


class RMSNorm(nn.Module):
    """Divides the last dimension by its root mean square, then scales it: no mean is taken off, nothing is added.

    Attributes:
        features, epsilon, dtype, param_dtype: as of `LayerNorm`; epsilon is added to the mean square.
        axis: logical name of the dimension.
    """

    features: int
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    axis: str = "embed"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape, axes = (self.features,), (self.axis,)
        scale = parameter(self, "scale", nn.initializers.ones, shape, axes, self.param_dtype)
        scale = scale.astype(jnp.float32)
        return scale_rows(divide_by_rms(x, self.epsilon), scale).astype(self.dtype)


NORMS = {"layer": LayerNorm, "rms": RMSNorm}


def make_norm(kind: str, features: int, epsilon: float, **fields: Any) -> Any:
    """A norm of one of NORMS over the model's width."""
    return NORMS[kind](features, epsilon, **fields)
