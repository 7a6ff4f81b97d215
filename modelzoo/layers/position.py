"""Position schemes: rotary, ALiBi, relative. (Learned positions are an `Embed`.)

Rotary embeddings: Su et al., 2021, arXiv:2104.09864, in GPT-J's interleaved pairing. GPT-J rotates the first
`rotary_dim` features of each head and leaves the rest; feature pairs are neighbours (0, 1), (2, 3), ..., where
GPT-NeoX pairs the two halves. ALiBi: Press et al., 2022, arXiv:2108.12409. Relative positions: Shaw et al., 2018,
arXiv:1803.02155 ("relative_key") and Huang et al., 2020, arXiv:2009.13658, method 4 ("relative_key_query").
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


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
    frequency = np.repeat(np.float32(1.0) / _power(base, exponent), 2)
    angle = position_ids.astype(jnp.float32)[..., None] * frequency
    return jnp.sin(angle), jnp.cos(angle)


def _power(base: float, exponents: np.ndarray) -> np.ndarray:
    """The float32 nearest to base ** exponent; NumPy's own float32 power is not that on every CPU."""
    return np.power(np.float64(np.float32(base)), exponents.astype(np.float64)).astype(np.float32)


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


def alibi_slopes(num_heads: int) -> np.ndarray:
    """The slope of every head's linear bias, float32 [N].

    A geometric sequence that starts at its own ratio 2^(-8/N); where N is no power of two, that of the power below,
    followed by every other slope of the power above.
    """
    power = 2 ** math.floor(math.log2(num_heads))

    def sequence(count: int, exponents: np.ndarray) -> np.ndarray:
        return _power(2.0 ** -(2.0 ** -(math.log2(count) - 3)), exponents)

    more = sequence(2 * power, np.arange(1, 1 + 2 * (num_heads - power), 2))
    return np.concatenate([sequence(power, np.arange(1, 1 + power)), more])


def count_in_segments(real_BT: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """How many real tokens a row has up to each place; where it has segments, of the place's segment alone.

    Args:
        real_BT: bool, whether a token is real.
        segment_ids: int [B, T], equal ones side by side, or None.

    Returns:
        int32 [B, T], at least 1 for a real token.
    """
    real_BT = real_BT.astype(jnp.int32)
    count_BT = jnp.cumsum(real_BT, axis=1, dtype=jnp.int32)
    if segment_ids is None:
        return count_BT
    begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    before_BT = lax.cummax(jnp.where(begins, count_BT - real_BT, 0), axis=1)
    return count_BT - before_BT


def segment_positions(segment_ids: jax.Array) -> jax.Array:
    """The place of each token in its segment, from 0: int32 [B, T]."""
    return count_in_segments(jnp.ones(segment_ids.shape, bool), segment_ids) - 1


def alibi_bias(mask_BS: jax.Array, num_heads: int, segment_ids: jax.Array | None = None) -> jax.Array:
    """ALiBi as an additive bias that depends on the key alone.

    slope * key position differs from slope * (key position - query position) by a constant of each row of the
    softmax, and so gives the same probabilities. Positions count the real tokens of a row, or of a segment.

    Args:
        mask_BS: non-zero where a key is real.
        num_heads: N.
        segment_ids: int [B, S], or None.

    Returns:
        float32 [B, N, 1, S].
    """
    mask = mask_BS.astype(bool).astype(jnp.float32)
    if segment_ids is None:
        position_BS = (jnp.cumsum(mask, axis=-1) - 1.0) * mask
    else:
        real_BS = jnp.broadcast_to(mask_BS.astype(bool), segment_ids.shape)
        position_BS = (count_in_segments(real_BS, segment_ids) - 1).astype(jnp.float32) * mask
    return position_BS[:, None, None, :] * alibi_slopes(num_heads)[:, None, None]


def relative_scores(
    kind: str, table_RH: jax.Array, q_BNTH: jax.Array, k_BNSH: jax.Array, first: jax.Array
) -> jax.Array:
    """What learned vectors of the distance from query to key add to the scores.

    relative_key: q · r. relative_key_query: q · r + k · r, with r = table[query slot - key slot + M - 1]. Every
    query and key meets the T + S - 1 vectors that can matter in one product, and each row of that is then shifted to
    where its distances stand; no array [T, S, H] is formed.

    Args:
        kind: "relative_key" or "relative_key_query".
        table_RH: R = 2 M - 1 vectors for the distances -(M - 1) ... M - 1.
        q_BNTH: queries, already scaled; the keys' part is scaled here.
        k_BNSH: keys, the first in slot 0; of N heads or K.
        first: int32 [], the slot of the first query, or [B], each row's own.

    Returns:
        float32 [B, N, T, S].

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in ("relative_key", "relative_key_query"):
        raise ValueError(f"unknown relative positions {kind!r}: choose relative_key or relative_key_query")
    num_rows, head_dim = table_RH.shape
    num_queries, num_keys = q_BNTH.shape[2], k_BNSH.shape[2]
    # Of query T - 1 from key S - 1 on: [W], or [B, W] where every row has its own.
    distance = first[..., None] + jnp.arange(1 - num_keys, num_queries, dtype=jnp.int32)
    window_WH = jnp.take(table_RH, jnp.clip(distance + num_rows // 2, 0, num_rows - 1), axis=0)

    def against_window(x_BNXH: jax.Array, window_WH: jax.Array) -> jax.Array:
        product = "bnxh,wh->bnxw" if window_WH.ndim == 2 else "bnxh,bwh->bnxw"
        return jnp.einsum(product, x_BNXH, window_WH, preferred_element_type=jnp.float32)

    scores_BNTS = _shift_rows(against_window(q_BNTH, window_WH[..., ::-1, :]), num_keys)
    if kind == "relative_key_query":
        of_keys = against_window(k_BNSH, window_WH) * jnp.float32(head_dim**-0.5)
        of_keys = _shift_rows(of_keys, num_queries).swapaxes(2, 3)
        if (group := scores_BNTS.shape[1] // of_keys.shape[1]) > 1:
            of_keys = jnp.repeat(of_keys, group, axis=1)
        scores_BNTS = scores_BNTS + of_keys
    return scores_BNTS


def _shift_rows(x_BNXW: jax.Array, length: int) -> jax.Array:
    """Row i's elements X - 1 - i, ..., X - 1 - i + length - 1, where W = X + length - 1.

    With one column more than W the rows, laid end to end and cut into rows of W, slip by one each.
    """
    *leading, num_rows, width = x_BNXW.shape
    flat = jnp.pad(x_BNXW, ((0, 0), (0, 0), (0, 0), (0, 1))).reshape(*leading, num_rows * (width + 1))
    flat = flat[..., num_rows - 1 : num_rows - 1 + num_rows * width]
    return flat.reshape(*leading, num_rows, width)[..., :length]
