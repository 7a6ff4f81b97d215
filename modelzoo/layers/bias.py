"""What attention adds to its scores, in parts: no array [B, N, T, S] exists before a layer makes what it reads.

At 32,000 tokens one such array of float32 takes 4 GiB a head. A layer forms it where XLA fuses it into the softmax,
and attention that goes through the keys block by block (`parallel.ring`) forms one block at a time.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from modelzoo.layers.masks import causal_bias, padding_bias, within_segments


@struct.dataclass
class Bias:
    """Which keys a query sees, and what their positions add.

    Attributes:
        mask: as `masks.causal_bias` or `masks.padding_bias` takes it, or None.
        query_slots: int32 [T] or [B, T], the slot of each query, which sees no key of a later slot; None: it sees all.
        alibi: float32 [B, N, 1, S], or None.
        query_segments, key_segments: int32 [B, T] and [B, S]: a query sees the keys of its own segment alone; None for
            both: a row is one. A row of packed documents has a segment for each.
    """

    mask: jax.Array | None = None
    query_slots: jax.Array | None = None
    alibi: jax.Array | None = None
    query_segments: jax.Array | None = None
    key_segments: jax.Array | None = None

    @property
    def is_causal(self) -> bool:
        """Whether slots decide what is visible: a mask of more than two dimensions says it alone."""
        return self.query_slots is not None and (self.mask is None or self.mask.ndim == 2)

    def dense(self, num_keys: int) -> jax.Array | None:
        """All of it, float32 broadcastable to [B, N, T, S], or None where nothing is added.

        Args:
            num_keys: S.

        Raises:
            ValueError: the mask has another rank than masks have.
        """
        if self.query_slots is None:
            bias = padding_bias(self.mask)
        else:
            bias = causal_bias(self.mask, self.query_slots, num_keys)
        if self.query_segments is not None and self.key_segments is not None:
            bias = within_segments(bias, self.query_segments, self.key_segments)
        return bias if self.alibi is None else self.alibi if bias is None else bias + self.alibi

    def of_keys(self, first: jax.Array, count: int) -> "Bias":
        """The part of the keys first, first + 1, ..., first + count - 1.

        Args:
            first: int32 [].
            count: how many keys.
        """

        def cut(a: jax.Array | None) -> jax.Array | None:
            return None if a is None else lax.dynamic_slice_in_dim(a, first, count, axis=a.ndim - 1)

        slots = self.query_slots if self.query_slots is None else self.query_slots - first
        return Bias(cut(self.mask), slots, cut(self.alibi), self.query_segments, cut(self.key_segments))

    def of_queries(self, first: jax.Array, count: int) -> "Bias":
        """The segments of the queries first, first + 1, ..., first + count - 1; the rest stays as it is."""
        if self.query_segments is None:
            return self
        segments = lax.dynamic_slice_in_dim(self.query_segments, first, count, axis=1)
        return self.replace(query_segments=segments)  # type: ignore[attr-defined]


def as_bias(bias: Bias | jax.Array | None) -> Bias:
    """Any bias in parts.

    Args:
        bias: in parts already; an array broadcastable to [B, N, T, S], which becomes a mask that says alone what is
            added; or None.
    """
    if bias is None or isinstance(bias, Bias):
        return bias or Bias()
    return Bias(bias.reshape((1,) * (4 - bias.ndim) + bias.shape))


def hides_first_key(bias: Bias) -> jax.Array:
    """bool []: whether a causal bias may leave some query without any key.

    It does where a row hides its first key, or, where rows have segments, any key: that of a segment's first token.
    """
    if bias.mask is None:
        return jnp.bool_(False)
    return ~jnp.all((bias.mask if bias.key_segments is not None else bias.mask[:, 0]).astype(bool))
