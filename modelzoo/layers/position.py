"""Position schemes. Rotary embeddings: Su et al., 2021, arXiv:2104.09864, in GPT-J's interleaved pairing.

GPT-J rotates the first `rotary_dim` features of each head and leaves the rest; feature pairs are neighbours
(0, 1), (2, 3), ..., where GPT-NeoX pairs the two halves.
"""

import jax
import jax.numpy as jnp
import numpy as np


def rotary_tables(
    position_ids: jax.Array, rotary_dim: int, base: float = 10000.0
) -> tuple[jax.Array, jax.Array]:
    """Sine and cosine of every position's rotation angles.

    Args:
        position_ids: int [B, T] (B may be 1).
        rotary_dim: number of features that rotate, even.
        base: angle of the slowest pair is base ** -(1 - 2 / rotary_dim) radians a position.

    Returns:
        (sin, cos), each float32 [B, T, rotary_dim], every angle standing twice, once per member of its pair.
    """
    exponent = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    frequency = np.repeat(np.float32(1.0) / np.power(np.float32(base), exponent), 2)
    angle = position_ids.astype(jnp.float32)[..., None] * frequency
    return jnp.sin(angle), jnp.cos(angle)


def rotate(x_BTNH: jax.Array, sin_BTR: jax.Array, cos_BTR: jax.Array) -> jax.Array:
    """Rotates the first R features of every head; the others pass through.

    Args:
        x_BTNH: queries or keys [B, T, N, H].
        sin_BTR, cos_BTR: from `rotary_tables`, R <= H.

    Returns:
        [B, T, N, H], of x's dtype.
    """
    rotary_dim = sin_BTR.shape[-1]
    sin, cos = (table[:, :, None, :].astype(x_BTNH.dtype) for table in (sin_BTR, cos_BTR))
    turned, rest = x_BTNH[..., :rotary_dim], x_BTNH[..., rotary_dim:]
    pairs = turned.reshape(*turned.shape[:-1], rotary_dim // 2, 2)
    swapped = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(turned.shape)
    turned = turned * cos + swapped * sin
    return turned if rest.shape[-1] == 0 else jnp.concatenate([turned, rest], axis=-1)
