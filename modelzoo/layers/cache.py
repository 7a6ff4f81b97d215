"""The key/value cache of incremental decoding: an explicit pytree, an argument and a result of `apply`.

Keys and values lie [B, K, S, H], heads before slots: the two contractions of one query with all slots are then
plain batched products, with no transpose of the cache in a decode step.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from modelzoo.axes import constrain


@struct.dataclass
class LayerCache:
    """One layer's keys and values, each [B, K, S, H] ([L, B, K, S, H] where layers are stacked)."""

    key: jax.Array
    value: jax.Array

    def write(self, key_BKTH: jax.Array, value_BKTH: jax.Array, index: jax.Array) -> "LayerCache":
        """Puts T new keys and values into the slots index, index + 1, ...

        Raises:
            ValueError: the cache was made for another batch or other heads.
        """
        (*have, _, width), (*want, _, new_width) = self.key.shape, key_BKTH.shape
        if (*have, width) != (*want, new_width):
            # Fewer rows than the cache has would be written silently, and attend to rows of others.
            raise ValueError(
                f"the cache holds [batch, heads, width] = {[*have, width]}, but the new keys are {[*want, new_width]}"
            )

        def put(slots: jax.Array, new: jax.Array) -> jax.Array:
            new = new.astype(slots.dtype)
            if slots.shape[0] == 1:
                # A batch of one is updated without its dimension, which XLA drops wherever it reads the cache: told
                # so, it writes in place (`inference.decode` carries such a cache likewise).
                slots = lax.dynamic_update_slice_in_dim(slots[0], new[0], index, axis=1)[None]
            else:
                slots = lax.dynamic_update_slice_in_dim(slots, new, index, axis=2)
            return constrain(slots, "act_batch", "act_heads", None, None)

        return LayerCache(put(self.key, key_BKTH), put(self.value, value_BKTH))


@struct.dataclass
class Cache:
    """A whole trunk's cache.

    Attributes:
        layers: LayerCache with stacked arrays [L, ...], or a tuple of L of them (`modelzoo.unstack_layers`).
        index: int32 [], the next slot to write; every row of the batch writes the same slot.
        mask: bool [B, S], the slots that hold a real token.
        cross: the same as `layers` for cross-attention: the encoder's keys and values as each layer projected them
            in the call that was given the encoder's states; None before that call and where there is no encoder.
    """

    layers: Any
    index: jax.Array
    mask: jax.Array
    cross: Any = None

    def admit(self, attention_mask: jax.Array | None, num_new: int) -> "Cache":
        """Marks the slots that the next `num_new` tokens will take.

        Args:
            attention_mask: [B, num_new] for the new tokens, or longer: then it covers the slots from 0 on.
                None: all new tokens are real.
            num_new: T.
        """
        batch, num_slots = self.mask.shape
        if num_new > num_slots:
            raise ValueError(f"{num_new} tokens do not fit a cache of {num_slots} slots")
        if attention_mask is None:
            attention_mask = jnp.ones((batch, num_new), bool)
        length = attention_mask.shape[1]
        attention_mask = jnp.broadcast_to(attention_mask, (batch, length))  # one row may stand for all
        if length < num_new or length > num_slots:
            raise ValueError(
                f"attention_mask has length {length}: with a cache it has the length of the new tokens ({num_new}), "
                f"or covers the slots from the first, at most {num_slots}"
            )
        start = self.index if length == num_new else jnp.int32(0)
        mask = lax.dynamic_update_slice(self.mask, attention_mask.astype(bool), (0, start))
        return dataclasses.replace(self, mask=mask)

    def advance(self, layers: Any, num_new: int, cross: Any = None) -> "Cache":
        """The cache after its layers took `num_new` tokens and, if there is one, saw the encoder's states."""
        return dataclasses.replace(self, layers=layers, index=self.index + num_new, cross=cross)


def init_cache(
    num_layers: int, batch_size: int, max_length: int, num_kv_heads: int, head_dim: int, dtype: Any
) -> Cache:
    """An empty cache with stacked layers.

    Args:
        num_layers: L.
        batch_size: B.
        max_length: S, the number of slots: prompt and new tokens together.
        num_kv_heads: K.
        head_dim: H.
        dtype: dtype of keys and values.
    """
    shape = (num_layers, batch_size, num_kv_heads, max_length, head_dim)
    # Two arrays, not one twice: a donated cache must not hold the same buffer under two names.
    layers = LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
    return Cache(layers, jnp.zeros((), jnp.int32), jnp.zeros((batch_size, max_length), bool))


def begin(
    cache: Cache | None, attention_mask: jax.Array | None, num_new: int
) -> tuple[jax.Array, jax.Array | None, int, Cache | None]:
    """Where T new tokens stand among the keys that they may attend to, with or without a cache.

    Args:
        cache: of the earlier tokens, or None.
        attention_mask: as a decoder takes it: see `Cache.admit`.
        num_new: T.

    Returns:
        (slots of the new tokens, int32 [T]; mask of the keys [B, S] or as passed in; S; the cache with its mask set).

    Raises:
        ValueError: the mask has another length than the tokens or than the cache's slots.
    """
    slots_T = jnp.arange(num_new, dtype=jnp.int32)
    if cache is None:
        if attention_mask is not None and attention_mask.ndim == 2 and attention_mask.shape[1] != num_new:
            raise ValueError(
                f"attention_mask has length {attention_mask.shape[1]}, but there are {num_new} tokens"
            )
        return slots_T, attention_mask, num_new, None
    num_keys = cache.mask.shape[1]
    if attention_mask is not None and attention_mask.ndim > 2:
        # It says what these queries see, not which tokens are real: later calls may see all of them.
        return cache.index + slots_T, attention_mask, num_keys, cache.admit(None, num_new)
    index, cache = cache.index, cache.admit(attention_mask, num_new)
    return index + slots_T, cache.mask, num_keys, cache
