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
from modelzoo.layers.quantized import Quantized, dequantize, is_quantized, quantize


@struct.dataclass
class LayerCache:
    """One layer's keys and values, each [B, K, S, H] ([L, B, K, S, H] where layers are stacked).

    In int8 each is a `Quantized` with a scale per token and head.
    """

    key: Any
    value: Any

    def write(self, key_BKTH: jax.Array, value_BKTH: jax.Array, index: jax.Array) -> "LayerCache":
        """Puts T new keys and values into the slots index, index + 1, ...

        Args:
            key_BKTH, value_BKTH: the new ones.
            index: int32 [], or [B] where every row has a slot of its own. Where the new ones would pass the last slot,
                they are written into the last T.

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
                slots = lax.dynamic_update_slice_in_dim(slots[0], new[0], index.reshape(()), axis=1)[None]
            elif index.ndim:
                slots = jax.vmap(lambda row, new, at: lax.dynamic_update_slice_in_dim(row, new, at, axis=1))(
                    slots, new, index
                )
            else:
                slots = lax.dynamic_update_slice_in_dim(slots, new, index, axis=2)
            return constrain(slots, "act_batch", "act_heads", None, None)

        def write(held: Any, new: jax.Array) -> Any:
            if not is_quantized(held):
                return put(held, new)
            packed = quantize(new, (new.ndim - 1,))
            return Quantized(put(held.values, packed.values), put(held.scale, packed.scale))

        return LayerCache(write(self.key, key_BKTH), write(self.value, value_BKTH))

    def read(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """Keys and values as numbers to compute with."""
        key, value = (dequantize(held, dtype).astype(dtype) for held in (self.key, self.value))
        return key, value


@struct.dataclass
class Cache:
    """A whole trunk's cache.

    Attributes:
        layers: LayerCache with stacked arrays [L, ...], or a tuple of L of them (`modelzoo.unstack_layers`).
        index: int32 [], the next slot to write, the same for every row of the batch; or [B], each row's own.
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
        attention_mask = attention_mask.astype(bool)
        start = self.index if length == num_new else jnp.int32(0)
        if start.ndim:
            mask = jax.vmap(lambda row, new, at: lax.dynamic_update_slice_in_dim(row, new, at, axis=0))(
                self.mask, attention_mask, start
            )
        else:
            mask = lax.dynamic_update_slice(self.mask, attention_mask, (0, start))
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
        dtype: dtype of keys and values. int8 keeps them in 8 bits with a float32 scale per token and head.
    """
    shape = (num_layers, batch_size, num_kv_heads, max_length, head_dim)

    # Two arrays, not one twice: a donated cache must not hold the same buffer under two names.
    def empty() -> Any:
        values = jnp.zeros(shape, dtype)
        return Quantized(values, jnp.zeros((*shape[:-1], 1), jnp.float32)) if dtype == jnp.int8 else values

    layers = LayerCache(empty(), empty())
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
        (slots of the new tokens, int32 [T], or [B, T] where the cache has an index per row; mask of the keys [B, S] or
        as passed in; S; the cache with its mask set).

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
    num_keys, slots = cache.mask.shape[1], cache.index[..., None] + slots_T
    if attention_mask is not None and attention_mask.ndim > 2:
        # It says what these queries see, not which tokens are real: later calls may see all of them.
        return slots, attention_mask, num_keys, cache.admit(None, num_new)
    cache = cache.admit(attention_mask, num_new)
    return slots, cache.mask, num_keys, cache
