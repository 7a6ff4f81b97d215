"""Attention over a sequence that the mesh splits: which of two ways keys and values reach the queries of other shards.

all-gather  Every device gathers all keys and values, and attends from its own queries (Llama 3: arXiv:2407.21783).
ring        Keys and values go round the devices, each of which attends to one piece at a time: see `parallel.ring`.

Attention with a prefix (prompt tuning) always gathers. Whoever asks a ring for its probabilities gets them computed by
gathering beside it; unasked for, they are never computed.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from modelzoo.axes import constrain
from modelzoo.layers.attention import Attend, AttentionCall, attend
from parallel import ring

RING = "ring"
CONTEXT_ATTENTION = (RING, "all-gather")
"""How keys and values reach the queries of other shards; the usual way first."""


def make_attend(mesh: Mesh, axes: tuple[str, ...], kind: str) -> Attend:
    """The attention of a mesh, for `modelzoo.layers.attention.attend_by`.

    Args:
        mesh: the mesh.
        axes: the mesh axes that split the sequence.
        kind: "ring" or "all-gather". Where the sequence lies over several axes, it is gathered.
    """
    size = math.prod(mesh.shape[axis] for axis in axes)
    if size == 1:
        return attend
    names = [axis for axis in axes if mesh.shape[axis] > 1]

    def attend_split(call: AttentionCall) -> tuple[jax.Array, jax.Array]:
        if not nn.get_logical_axis_rules():  # shapes are traced, with a row of any length
            return attend(call)
        if call.has_cache:
            raise ValueError(
                f"mesh axis {' x '.join(names)}={size} splits the sequence, and a decoder's cache is not split so: "
                "decode on a mesh with context=1, and give those devices to tensor or data"
            )
        if kind != RING or len(names) > 1 or call.prefix is not None:
            return attend(_gathered(call))
        factor = _dropout_factor(call)
        drop = None if factor is None else lambda probs: probs * factor
        _, probs = attend(_gathered(dataclasses.replace(call, dropout=drop)))
        return ring.attend(call, factor, names[0], size), probs

    return attend_split


def _gathered(call: AttentionCall) -> AttentionCall:
    """The call with keys and values whole on every shard of the sequence."""

    def whole(a: jax.Array) -> jax.Array:
        return constrain(a, "act_batch", "act_heads", None, None)

    return dataclasses.replace(call, k_BNSH=whole(call.k_BNSH), v_BNSH=whole(call.v_BNSH))


def _dropout_factor(call: AttentionCall) -> jax.Array | None:
    """What dropout multiplies the probabilities [B, N, T, S] with, drawn as attention to all keys at once draws it."""
    if call.dropout is None:
        return None
    shape = (*call.q_BNTH.shape[:3], call.k_BNSH.shape[2])
    ones = jnp.ones(shape, call.v_BNSH.dtype)
    return constrain(call.dropout(ones), "act_batch", "act_heads", "act_length", None)
