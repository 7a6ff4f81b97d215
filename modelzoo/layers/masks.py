"""Which key a query may see, as an additive bias.

Biases are float32 and hold the lowest finite number where a key is hidden, not minus infinity: a query that may
see nothing (a left-padding position) then attends evenly over all keys, as in transformers, and is never NaN.
"""

from typing import cast

import jax
import jax.numpy as jnp

LOWEST = float(jnp.finfo(jnp.float32).min)


def to_bias(visible: jax.Array) -> jax.Array:
    """bool, True where a key is visible, to float32: 0 there, the lowest finite number elsewhere."""
    return jnp.where(visible, jnp.float32(0.0), jnp.float32(LOWEST))


def causal_bias(attention_mask: jax.Array | None, query_slots: jax.Array, num_keys: int) -> jax.Array:
    """Bias of a decoder's self-attention: a key is visible from its own slot on, unless it is padding.

    Args:
        attention_mask: [B, S], non-zero where a key is real; or anything else that `padding_bias` takes, which then
            says alone what is visible; or None.
        query_slots: int [T], the slot of each query, or [B, T] where rows stand at slots of their own.
        num_keys: S.

    Returns:
        float32 [B or 1, 1 or N, T, S].
    """
    if attention_mask is not None and attention_mask.ndim > 2:
        return cast(jax.Array, padding_bias(attention_mask))
    visible = jnp.arange(num_keys) <= jnp.atleast_2d(query_slots)[:, None, :, None]
    if attention_mask is not None:
        visible = visible & attention_mask.astype(bool)[:, None, None, :]
    return to_bias(visible)


def padding_bias(attention_mask: jax.Array | None) -> jax.Array | None:
    """Bias of an encoder's self-attention and of cross-attention: every key is visible unless it is padding.

    Args:
        attention_mask: [B, S], non-zero where a key is real; [B, T, S], non-zero where that query sees that key;
            [B, 1 or N, T, S], a bias that is used as it is; or None.

    Returns:
        float32 [B, 1 or N, 1 or T, S], or None where nothing is hidden.

    Raises:
        ValueError: a mask of another rank.
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim == 4:
        return attention_mask.astype(jnp.float32)
    if attention_mask.ndim not in (2, 3):
        raise ValueError(
            f"an attention mask has shape [batch, keys], [batch, queries, keys] or that of a bias with 4 dimensions, "
            f"not {attention_mask.shape}"
        )
    visible = attention_mask.astype(bool)
    return to_bias(visible[:, None, None, :] if visible.ndim == 2 else visible[:, None])


def within_segments(bias: jax.Array | None, query_segments: jax.Array, key_segments: jax.Array) -> jax.Array:
    """A bias that also hides the keys of other segments: the documents of a packed row do not see each other.

    Args:
        bias: float32 broadcastable to [B, N, T, S], or None.
        query_segments: int [B, T], the segment of each query.
        key_segments: int [B, S].

    Returns:
        float32 [B, 1 or N, T, S].
    """
    same = query_segments[:, None, :, None] == key_segments[:, None, None, :]
    return to_bias(same) if bias is None else jnp.where(same, bias, jnp.float32(LOWEST))


def check_segments(
    segment_ids: jax.Array | None, length: int, cache: object, name: str = "segment_ids"
) -> None:
    """Refuses segments that do not belong to the tokens of a call.

    Args:
        segment_ids: [B, T] or None.
        length: T.
        cache: that of the call, or None.
        name: the argument's.

    Raises:
        ValueError: another shape, or a cache, whose rows are one document each.
    """
    if segment_ids is None:
        return
    if segment_ids.ndim != 2 or segment_ids.shape[1] != length:
        raise ValueError(f"{name} has shape {segment_ids.shape}: it is [batch, {length}], one for each token")
    if cache is not None:
        raise ValueError(
            f"{name} are for rows of packed documents, and a cache holds one document a row: leave one out"
        )


def layer_head_mask(head_mask: jax.Array | None, num_layers: int) -> jax.Array | None:
    """One head mask a layer: [N] for all layers or [L, N] becomes [L, N].

    Raises:
        ValueError: another rank, or another number of layers.
    """
    if head_mask is None:
        return None
    if head_mask.ndim not in (1, 2) or (head_mask.ndim == 2 and head_mask.shape[0] != num_layers):
        raise ValueError(
            f"head_mask has shape {head_mask.shape}: it is [heads] or [{num_layers} layers, heads]"
        )
    return jnp.broadcast_to(head_mask, (num_layers, head_mask.shape[-1]))
