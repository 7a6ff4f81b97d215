"""What attention adds to its scores, in parts: no array [B, N, T, S] exists before a layer makes what it reads.

At 32,000 tokens one such array of float32 takes 4 GiB a head. A layer forms it where XLA fuses it into the softmax,
and attention that goes through the keys block by block (`parallel.ring`) forms one block at a time.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from modelzoo.layers.masks import causal_bias, padding_bias


@struct.dataclass
class Bias:
    """Which keys a query sees, and what their positions add.

    Attributes:
        mask: as `masks.causal_bias` or `masks.padding_bias` takes it, or None.
        query_slots: int32 [T] or [B, T], the slot of each query, which sees no key of a later slot; None: it sees all.
        alibi: float32 [B, N, 1, S], or None.
    """

    mask: jax.Array | None = None
    query_slots: jax.Array | None = None
    alibi: jax.Array | None = None

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
        return Bias(cut(self.mask), slots, cut(self.alibi))


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
    """bool []: whether a causal bias has a row that hides the first key, so that some query may see no key at all."""
    return jnp.bool_(False) if bias.mask is None else ~jnp.all(bias.mask[:, 0].astype(bool))
