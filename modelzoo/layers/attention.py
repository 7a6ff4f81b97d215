"""Multi-head attention (Vaswani et al., 2017, arXiv:1706.03762), one module for every family.

Additive bias (causal, padding, ALiBi), a rotary callable, prefix keys and values, a cache and cross-attention
are arguments, relative positions a field; none of them is a subclass. Scores and softmax are float32 whatever the
dtype.
"""

from collections.abc import Callable
from typing import Any, TypedDict

import flax.linen as nn
import jax
import jax.numpy as jnp

from modelzoo.axes import constrain
from modelzoo.layers.cache import LayerCache
from modelzoo.layers.linear import Initializer, Linear, dropout_layer, parameter
from modelzoo.layers.position import relative_scores


class LayerInputs(TypedDict, total=False):
    """What a block hands on to its self-attention as it is, of its own layer: see `Attention.__call__`.

    Attributes:
        cache, cache_index: the layer's, and the slot of the first query.
        head_mask: [N].
    """

    cache: LayerCache | None
    cache_index: jax.Array | None
    head_mask: jax.Array | None


class AttentionInputs(LayerInputs, total=False):
    """The same with the bias [B, N, T, S], or broadcastable to it."""

    bias: jax.Array | None


def dot_product_attention(
    q_BNTH: jax.Array,
    k_BNSH: jax.Array,
    v_BNSH: jax.Array,
    bias: jax.Array | None,
    dropout: Callable[[jax.Array], jax.Array] = lambda probs: probs,
    head_mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """softmax(q · k + bias) · v; the caller scales q.

    Args:
        q_BNTH, k_BNSH, v_BNSH: queries, keys, values.
        bias: broadcastable to [B, N, T, S], float32, or None.
        dropout: applied to the probabilities.
        head_mask: [N], multiplied into the probabilities after dropout, or None.

    Returns:
        (context [B, N, T, H] in v's dtype, probabilities [B, N, T, S] as multiplied with v).
    """
    scores = jnp.einsum("bnth,bnsh->bnts", q_BNTH, k_BNSH, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + bias
    probs = dropout(jax.nn.softmax(scores, axis=-1).astype(v_BNSH.dtype))
    if head_mask is not None:
        probs = probs * head_mask.astype(probs.dtype)[:, None, None]
    return jnp.einsum("bnts,bnsh->bnth", probs, v_BNSH), probs


class Attention(nn.Module):
    """Projections, attention, output projection.

    Attributes:
        features: D, width of input and output.
        num_heads: N.
        head_dim: H.
        use_bias: biases on query, key and value.
        out_bias: a bias on the output projection.
        dropout: probability of dropping an attention weight.
        kernel_init: initializer of all four kernels, and of the table of relative positions.
        relative: "relative_key" or "relative_key_query": scores depend on learned vectors of the distance from query
            to key (Shaw et al., 2018, arXiv:1803.02155; Huang et al., 2020, arXiv:2009.13658). None: they do not.
        max_positions: largest distance + 1 that `relative` knows.
    """

    features: int
    num_heads: int
    head_dim: int
    use_bias: bool = True
    out_bias: bool = True
    dropout: float = 0.0
    kernel_init: Initializer = nn.initializers.normal(0.02)
    relative: str | None = None
    max_positions: int = 0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        source_BSD: jax.Array | None = None,
        projected: LayerCache | None = None,
        bias: jax.Array | None = None,
        rotary: Callable[[jax.Array], jax.Array] | None = None,
        prefix: tuple[jax.Array, jax.Array] | None = None,
        cache: LayerCache | None = None,
        cache_index: jax.Array | None = None,
        head_mask: jax.Array | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, jax.Array, LayerCache | None]:
        """Attends from x to itself, or to `source` (cross-attention).

        Args:
            x_BTD: [B, T, D].
            source_BSD: keys and values come from here instead of x.
            projected: keys and values as an earlier call made them of a source; no source is read then.
            bias: additive, broadcastable to [B, N, T, S] (S counts cached slots, and not the prefix).
            rotary: rotates queries and keys [B, T, N, H] by their positions.
            prefix: keys and values [N, P, H] that stand before all others and are seen by every query of every row.
            cache: keys and values of earlier tokens; the new ones are written at `cache_index`.
            cache_index: int32 [], the slot of the first query.
            head_mask: [N].
            deterministic: no dropout.

        Returns:
            (y [B, T, D], probabilities [B, N, T, P + S], the written cache or what a source was projected to).

        Raises:
            ValueError: `relative` is no known kind.
        """
        crosses = source_BSD is not None or projected is not None
        source_BSD = x_BTD if source_BSD is None else source_BSD
        heads = (self.num_heads, self.head_dim)
        shared: dict[str, Any] = dict(
            kernel_init=self.kernel_init, dtype=self.dtype, param_dtype=self.param_dtype
        )

        def project(name: str, inputs: jax.Array) -> jax.Array:
            axes = ("embed", "heads", "head_dim")
            layer = Linear((inputs.shape[-1],), heads, axes, self.use_bias, name=name, **shared)
            return constrain(layer(inputs), "act_batch", "act_length", "act_heads", None)

        q_BTNH = project("query", x_BTD)
        q_BTNH = rotary(q_BTNH) if rotary is not None else q_BTNH
        q_BNTH = (q_BTNH * jnp.asarray(self.head_dim**-0.5, q_BTNH.dtype)).swapaxes(1, 2)
        if projected is None:
            k_BSNH, v_BSNH = project("key", source_BSD), project("value", source_BSD)
            k_BSNH = rotary(k_BSNH) if rotary is not None else k_BSNH
            written = LayerCache(k_BSNH.swapaxes(1, 2), v_BSNH.swapaxes(1, 2))
            if cache is not None:
                assert cache_index is not None
                written = cache.write(written.key, written.value, cache_index)
        else:
            written = projected
        k_BNSH, v_BNSH = written.key.astype(self.dtype), written.value.astype(self.dtype)
        if self.relative is not None:
            shape, axes = (2 * self.max_positions - 1, self.head_dim), (None, "head_dim")
            table_RH = parameter(
                self, "distance", self.kernel_init, shape, axes, self.param_dtype, self.dtype
            )
            first = jnp.int32(0) if cache_index is None else cache_index
            distances = relative_scores(self.relative, table_RH, q_BNTH, k_BNSH, first)
            bias = distances if bias is None else bias + distances
        if prefix is not None:
            num_rows, (_, num_prefix, _) = k_BNSH.shape[0], prefix[0].shape
            before = (jnp.broadcast_to(a.astype(self.dtype), (num_rows, *a.shape)) for a in prefix)
            k_BNSH, v_BNSH = (
                jnp.concatenate(pair, axis=2) for pair in zip(before, (k_BNSH, v_BNSH), strict=True)
            )
            if bias is not None:
                bias = jnp.pad(bias, ((0, 0),) * (bias.ndim - 1) + ((num_prefix, 0),))

        def drop(probs: jax.Array) -> jax.Array:
            return dropout_layer(self.dropout)(probs, deterministic=deterministic)

        context_BNTH, probs = dot_product_attention(q_BNTH, k_BNSH, v_BNSH, bias, drop, head_mask)
        context_BTNH = constrain(context_BNTH.swapaxes(1, 2), "act_batch", "act_length", "act_heads", None)
        out = Linear(
            heads, (self.features,), ("heads", "head_dim", "embed"), self.out_bias, name="out", **shared
        )
        return (
            constrain(out(context_BTNH), "act_batch", "act_length", "act_embed"),
            probs,
            written if crosses or cache is not None else None,
        )
