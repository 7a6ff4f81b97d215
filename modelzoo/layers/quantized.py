"""Weights in int8 with one float32 scale per output channel: symmetric, the largest element being 127 scales.

A decode step reads every weight once and does little with it, so half the bytes are half the time. The values are
widened where the product reads them, which compilers for accelerators do on the way from memory, and the scale
multiplies what comes out rather than the kernel. Reference: Jacob et al., 2018, arXiv:1712.05877; per channel,
Krishnamoorthi, 2018, arXiv:1806.08342.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

LARGEST = 127


@struct.dataclass
class Quantized:
    """A parameter in int8; stands in its place in the tree.

    Attributes:
        values: int8, of the parameter's shape.
        scale: float32, of the same rank; 1 along the dimensions that share a scale. values * scale is the parameter.
    """

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """Rank of the parameter."""
        return self.values.ndim

    @property
    def T(self) -> "Quantized":
        """Transposed."""
        return Quantized(self.values.T, self.scale.T)


def is_quantized(value: Any) -> bool:
    """Whether a leaf of a parameter tree is `Quantized`: for `is_leaf`."""
    return isinstance(value, Quantized)


def quantize(value: jax.Array, shared: Sequence[int]) -> Quantized:
    """Rounds a parameter to int8.

    Args:
        value: floating point.
        shared: the dimensions along which all elements share a scale: a kernel's inputs, or the features of a table.
    """
    value = value.astype(jnp.float32)
    largest = jnp.max(jnp.abs(value), axis=tuple(shared), keepdims=True)
    scale = jnp.where(largest > 0, largest / LARGEST, jnp.ones_like(largest))
    return Quantized(jnp.round(value / scale).astype(jnp.int8), scale)


def dequantize(value: Any, dtype: Any = jnp.float32) -> jax.Array:
    """What a `Quantized` stands for; an array comes back as it is."""
    if not is_quantized(value):
        return value
    return (value.values.astype(jnp.float32) * value.scale).astype(dtype)


def take_rows(table: Any, ids: jax.Array) -> jax.Array:
    """Rows of a table [V, D], quantized by row or not; past its end they are NaN."""

    def rows(array: jax.Array, fill: float) -> jax.Array:
        return jnp.take(array, ids, axis=0, mode="fill", fill_value=fill)

    if is_quantized(table):
        return rows(table.values, 0).astype(jnp.float32) * rows(table.scale, jnp.nan)
    return rows(table, jnp.nan)
