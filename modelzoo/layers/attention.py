"""Multi-head attention (Vaswani et al., 2017, arXiv:1706.03762), one module for every family.

Additive bias (causal, padding, ALiBi), a rotary callable, prefix keys and values, a cache and cross-attention
are arguments, relative positions a field; none of them is a subclass. Scores and softmax are float32 whatever the
dtype. Each of K heads of keys and values serves N / K neighbours of the N heads of queries (Ainslie et al., 2023,
arXiv:2305.13245; K = 1: Shazeer, 2019, arXiv:1911.02150): queries and scores have N heads, keys and values K.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypedDict

import flax.linen as nn
import jax
import jax.numpy as jnp

from modelzoo.axes import constrain
from modelzoo.layers.bias import Bias, as_bias
from modelzoo.layers.cache import LayerCache
from modelzoo.layers.linear import Initializer, Linear, dropout_layer, parameter
from modelzoo.layers.norm import RMSNorm
from modelzoo.layers.position import relative_scores


class AttentionInputs(TypedDict, total=False):
    """What a block hands on to its self-attention as it is, of its own layer or shared: see `Attention.__call__`.

    Attributes:
        cache, cache_index: the layer's, and the slot of the first query.
        head_mask: [N].
        bias: in parts, or broadcastable to [B, N, T, S].
    """

    cache: LayerCache | None
    cache_index: jax.Array | None
    head_mask: jax.Array | None
    bias: Bias | jax.Array | None


def query_key(q_BNTH: jax.Array, k_BKSH: jax.Array) -> jax.Array:
    """Every query with the keys of its group's head: float32 [B, N, T, S]."""
    if q_BNTH.shape[1] == k_BKSH.shape[1]:
        return jnp.einsum("bnth,bnsh->bnts", q_BNTH, k_BKSH, preferred_element_type=jnp.float32)
    q_BKGTH = by_group(q_BNTH, k_BKSH.shape[1])
    scores = jnp.einsum("bkgth,bksh->bkgts", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32)
    return scores.reshape(*q_BNTH.shape[:3], k_BKSH.shape[2])


def weigh_values(probs_BNTS: jax.Array, v_BKSH: jax.Array, **options: Any) -> jax.Array:
    """The values of its group's head weighed with every query's probabilities: [B, N, T, H].

    Args:
        probs_BNTS, v_BKSH: of one dtype.
        options: of the product (jnp.einsum).
    """
    if probs_BNTS.shape[1] == v_BKSH.shape[1]:
        return jnp.einsum("bnts,bnsh->bnth", probs_BNTS, v_BKSH, **options)
    probs_BKGTS = by_group(probs_BNTS, v_BKSH.shape[1])
    context = jnp.einsum("bkgts,bksh->bkgth", probs_BKGTS, v_BKSH, **options)
    return context.reshape(*probs_BNTS.shape[:3], v_BKSH.shape[3])


def by_group(x_BNTX: jax.Array, num_groups: int) -> jax.Array:
    """[B, N, T, X] to [B, K, N / K, T, X]."""
    batch, num_heads, *rest = x_BNTX.shape
    return x_BNTX.reshape(batch, num_groups, num_heads // num_groups, *rest)


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
        q_BNTH, k_BNSH, v_BNSH: queries, keys, values; the latter two may have K heads.
        bias: broadcastable to [B, N, T, S], float32, or None.
        dropout: applied to the probabilities.
        head_mask: [N], multiplied into the probabilities after dropout, or None.

    Returns:
        (context [B, N, T, H] in v's dtype, probabilities [B, N, T, S] as multiplied with v).
    """
    scores = query_key(q_BNTH, k_BNSH)
    if bias is not None:
        scores = scores + bias
    probs = dropout(jax.nn.softmax(scores, axis=-1).astype(v_BNSH.dtype))
    if head_mask is not None:
        probs = probs * head_mask.astype(probs.dtype)[:, None, None]
    return weigh_values(probs, v_BNSH), probs


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """What one attention computes, once its projections are made; for whoever computes it (`attend_by`).

    Attributes:
        q_BNTH: queries, scaled.
        k_BNSH, v_BNSH: keys and values, of N heads or K.
        bias: added to the scores; see `Attention.__call__`.
        relative, table_RH: kind and vectors of relative positions (`position.relative_scores`), or None.
        first_slot: int32 [] (or [B]), the slot of the first query; 0 without a cache.
        prefix: keys and values [N, P, H] before all others, or None.
        dropout: applied to the probabilities [B, N, T, P + S]; None: there is none.
        head_mask: [N], multiplied into the probabilities after dropout, or None.
        has_cache: keys and values are a cache's slots.
    """

    q_BNTH: jax.Array
    k_BNSH: jax.Array
    v_BNSH: jax.Array
    bias: Bias | jax.Array | None = None
    relative: str | None = None
    table_RH: jax.Array | None = None
    first_slot: jax.Array | int = 0
    prefix: tuple[jax.Array, jax.Array] | None = None
    dropout: Callable[[jax.Array], jax.Array] | None = None
    head_mask: jax.Array | None = None
    has_cache: bool = False


def attend(call: AttentionCall) -> tuple[jax.Array, jax.Array]:
    """softmax(q · k + bias) · v over all keys at once.

    Returns:
        (context [B, N, T, H] in v's dtype, probabilities [B, N, T, P + S] as multiplied with v).
    """
    k_BNSH, v_BNSH = call.k_BNSH, call.v_BNSH
    bias = as_bias(call.bias).dense(k_BNSH.shape[2])
    if call.relative is not None:
        assert call.table_RH is not None
        first = jnp.asarray(call.first_slot, jnp.int32)
        distances = relative_scores(call.relative, call.table_RH, call.q_BNTH, k_BNSH, first)
        bias = distances if bias is None else bias + distances
    if call.prefix is not None:
        num_rows, (_, num_prefix, _) = k_BNSH.shape[0], call.prefix[0].shape
        before = (jnp.broadcast_to(a.astype(k_BNSH.dtype), (num_rows, *a.shape)) for a in call.prefix)
        k_BNSH, v_BNSH = (
            jnp.concatenate(pair, axis=2) for pair in zip(before, (k_BNSH, v_BNSH), strict=True)
        )
        if bias is not None:
            bias = jnp.pad(bias, ((0, 0),) * (bias.ndim - 1) + ((num_prefix, 0),))
    dropout = call.dropout or (lambda probs: probs)
    return dot_product_attention(call.q_BNTH, k_BNSH, v_BNSH, bias, dropout, call.head_mask)


Attend = Callable[[AttentionCall], tuple[jax.Array, jax.Array]]
_ATTEND: contextvars.ContextVar[Attend] = contextvars.ContextVar("attend", default=attend)


@contextlib.contextmanager
def attend_by(function: Attend) -> Iterator[None]:
    """Has every attention inside computed by `function`, which returns what `attend` returns.

    This is how a mesh that splits the sequence brings its own attention, whatever the family (`parallel.context`).
    """
    token = _ATTEND.set(function)
    try:
        yield
    finally:
        _ATTEND.reset(token)


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
        out_init: initializer of the output projection, where it is another.
        relative: "relative_key" or "relative_key_query": scores depend on learned vectors of the distance from query
            to key (Shaw et al., 2018, arXiv:1803.02155; Huang et al., 2020, arXiv:2009.13658). None: they do not.
        max_positions: largest distance + 1 that `relative` knows.
        num_kv_heads: K, which divides N; None is N.
        qk_norm: every head's queries and keys are normed by their root mean square, before they rotate (Henry et al.,
            2020, arXiv:2010.04245, with a scale for each feature as in Dehghani et al., 2023, arXiv:2302.05442).
        norm_epsilon: of that norm.
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
    num_kv_heads: int | None = None
    qk_norm: bool = False
    norm_epsilon: float = 1e-5
    out_init: Initializer | None = None

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        source_BSD: jax.Array | None = None,
        projected: LayerCache | None = None,
        bias: Bias | jax.Array | None = None,
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
            bias: additive, in parts or broadcastable to [B, N, T, S] (S counts cached slots, and not the prefix).
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
        x_BTD = constrain(x_BTD, "act_batch", "act_length", "act_embed")
        if source_BSD is None:
            source_BSD = x_BTD
        else:
            source_BSD = constrain(source_BSD, "act_batch", "act_length", "act_embed")
        heads = (self.num_heads, self.head_dim)
        dtypes: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        shared: dict[str, Any] = dict(kernel_init=self.kernel_init, **dtypes)

        def project(name: str, inputs: jax.Array) -> jax.Array:
            outputs, axis = heads, "heads"
            if name != "query" and self.num_kv_heads not in (None, self.num_heads):
                outputs, axis = (self.num_kv_heads, self.head_dim), "kv"
            axes = ("embed", axis, "head_dim")
            layer = Linear((inputs.shape[-1],), outputs, axes, self.use_bias, name=name, **shared)
            return constrain(layer(inputs), "act_batch", "act_length", "act_heads", None)

        def place(name: str, x_BTNH: jax.Array) -> jax.Array:
            if self.qk_norm:
                norm = RMSNorm(
                    self.head_dim, self.norm_epsilon, axis="head_dim", name=f"{name}_norm", **dtypes
                )
                x_BTNH = norm(x_BTNH)
            return x_BTNH if rotary is None else rotary(x_BTNH)

        q_BTNH = place("query", project("query", x_BTD))
        q_BNTH = (q_BTNH * jnp.asarray(self.head_dim**-0.5, q_BTNH.dtype)).swapaxes(1, 2)
        if projected is None:
            k_BSNH, v_BSNH = project("key", source_BSD), project("value", source_BSD)
            k_BSNH = place("key", k_BSNH)
            written = LayerCache(k_BSNH.swapaxes(1, 2), v_BSNH.swapaxes(1, 2))
            if cache is not None:
                assert cache_index is not None
                written = cache.write(written.key, written.value, cache_index)
        else:
            written = projected
        table_RH = None
        if self.relative is not None:
            shape, axes = (2 * self.max_positions - 1, self.head_dim), (None, "head_dim")
            table_RH = parameter(
                self, "distance", self.kernel_init, shape, axes, self.param_dtype, self.dtype
            )

        def drop(probs: jax.Array) -> jax.Array:
            return dropout_layer(self.dropout)(probs, deterministic=deterministic)

        call = AttentionCall(
            q_BNTH,
            *written.read(self.dtype),
            bias,
            self.relative,
            table_RH,
            0 if cache_index is None else cache_index,
            prefix,
            None if deterministic or self.dropout == 0.0 else drop,
            head_mask,
            has_cache=cache is not None,
        )
        context_BNTH, probs = _ATTEND.get()(call)
        context_BTNH = constrain(context_BNTH.swapaxes(1, 2), "act_batch", "act_length", "act_heads", None)
        shared["kernel_init"] = self.out_init or self.kernel_init
        out = Linear(
            heads, (self.features,), ("heads", "head_dim", "embed"), self.out_bias, name="out", **shared
        )
        return (
            constrain(out(context_BTNH), "act_batch", "act_stream", "act_embed"),
            probs,
            written if crosses or cache is not None else None,
        )
