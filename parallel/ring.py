"""Ring attention (Liu et al., 2023, arXiv:2310.01889): keys and values go round the devices that split the sequence.

Each device keeps its queries and attends to one device's keys after another, adding up a softmax as it goes (Milakov
and Gimelshein, 2018, arXiv:1805.02867). Neither all keys nor all scores of a query are ever on one device. The backward
pass goes round once more with the saved maximum and sum of each query's softmax (FlashAttention: Dao et al., 2022,
arXiv:2205.14135), the gradients of keys and values travelling with them.

Causal attention would leave the first device idle most of the time, since its queries see only its own keys. So for the
length of the attention the sequence is dealt out anew (Brandon et al., 2023, arXiv:2311.09431, in Megatron's form): of
2 c pieces device i takes the i-th from the front and the i-th from the back. Then on each later step every device has
exactly two pairs of pieces to compute, and none of them is hidden.

    step 0           (front, own front)  (back, own front)  (back, own back)
    keys of j < i    (front, j's front)  (back, j's front)
    keys of j > i                        (back, j's front)  (back, j's back)

All other pairs are hidden. They count only for a query that sees nothing at all (padding on the left), which attends
evenly over all keys, as anywhere in the project: where a row's first key is masked, they are computed too.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.sharding import PartitionSpec as P

from modelzoo.layers.attention import AttentionCall, by_group, query_key, weigh_values
from modelzoo.layers.bias import as_bias, hides_first_key
from modelzoo.layers.masks import LOWEST
from modelzoo.layers.position import relative_scores

FLOAT32 = dict(preferred_element_type=jnp.float32)
Pair = tuple[Any, Any]
"""(which piece of the queries, which piece of the keys), of those that a device holds."""


@struct.dataclass
class _Extras:
    """What takes no gradient.

    Attributes:
        bias: without its query slots, which each piece knows.
        factor: what dropout multiplies the probabilities [B, N, T, S] with, or None.
        blind: bool [], whether some query may see no key, so that hidden pairs count.
    """

    bias: Any
    factor: Any
    blind: Any


def attend(call: AttentionCall, factor: jax.Array | None, axis: str, size: int) -> jax.Array:
    """What `modelzoo.layers.attention.attend` computes, but for the probabilities.

    Args:
        call: without a cache or a prefix; its bias takes no gradient, and its dropout is not called.
        factor: what dropout multiplies the probabilities [B, N, T, S] with, or None.
        axis: the mesh axis that splits queries, keys and values by length.
        size: its size.

    Returns:
        context [B, N, T, H] in v's dtype.
    """
    bias = as_bias(call.bias)
    num_queries = call.q_BNTH.shape[2]
    is_balanced = bias.is_causal and call.relative is None and num_queries % (2 * size) == 0
    blind = hides_first_key(bias) if is_balanced else jnp.bool_(False)
    ring = _Ring(axis, size, 2 if is_balanced else 1, bias.is_causal, call.relative)
    extras = _Extras(dataclasses.replace(bias, query_slots=None), factor, blind)
    y_BNTH = ring(call.q_BNTH, call.k_BNSH, call.v_BNSH, call.table_RH, extras)
    if call.head_mask is not None:
        y_BNTH = y_BNTH * call.head_mask.astype(y_BNTH.dtype)[:, None, None]
    return y_BNTH


@dataclasses.dataclass(frozen=True)
class _Ring:
    """One attention round a mesh axis, and its gradient.

    Attributes:
        axis, size: the mesh axis and its size c.
        num_pieces: into how many pieces a device's queries and keys are dealt, 2 where causal work is balanced.
        is_causal: a query sees no later key.
        relative: kind of relative positions, or None.
    """

    axis: str
    size: int
    num_pieces: int
    is_causal: bool
    relative: str | None

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array | None, extras: _Extras
    ) -> jax.Array:
        @jax.custom_vjp
        def run(q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array | None, extras: _Extras) -> Any:
            return self._forward(q, k, v, table, extras)[0]

        def forward(
            q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array | None, extras: _Extras
        ) -> Any:
            y, saved = self._forward(q, k, v, table, extras)
            return y, (saved, y, table, extras)

        def backward(residuals: Any, d_y: jax.Array) -> Any:
            saved, y, table, extras = residuals
            return (*self._backward(saved, y, table, extras, d_y), None)

        run.defvjp(forward, backward)
        return run(q, k, v, table, extras)

    def _forward(self, q: jax.Array, k: jax.Array, v: jax.Array, table: Any, extras: _Extras) -> Any:
        """(y, what the backward pass needs: queries, keys, values as dealt, and each softmax's maximum and sum)."""

        def body(q: jax.Array, k: jax.Array, v: jax.Array, table: Any, extras: _Extras) -> Any:
            q, k, v = (self._deal(a, 2) for a in (q, k, v))
            device = _Device(self, q, table, extras)
            sums = (
                jnp.zeros(q.shape, jnp.float32),
                jnp.full(q.shape[:-1], LOWEST),
                jnp.zeros(q.shape[:-1], jnp.float32),
            )
            (total, highest, weight), _ = self._go_round(device, device.attend, sums, None, (k, v))
            y = self._undeal((total / weight[..., None]).astype(v.dtype))
            return y, (q, k, v, highest, weight)

        dealt = P(None, None, None, self.axis)
        out_specs = (self._by_length, (dealt,) * 5)
        return self._map(body, extras, out_specs, q, k, v, table)

    def _backward(
        self, saved: Any, y: jax.Array, table: Any, extras: _Extras, d_y: jax.Array
    ) -> tuple[Any, ...]:
        """Gradients of q, k, v and table."""

        def body(saved: Any, y: jax.Array, d_y: jax.Array, table: Any, extras: _Extras) -> Any:
            q, k, v, highest, weight = saved
            inner = jnp.sum(y.astype(jnp.float32) * d_y.astype(jnp.float32), axis=-1, keepdims=True)
            d_y, inner = self._deal(d_y, 2), self._deal(inner, 2)[..., 0]
            device = _Device(self, q, table, extras)
            visit = functools.partial(device.pull, given=(d_y, inner, highest, weight))
            zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), (q, k, v, table))
            d_q, d_k, d_v, d_table = zeros
            (d_q, d_table), moved = self._go_round(device, visit, (d_q, d_table), (d_k, d_v), (k, v))
            d_k, d_v = self._pass_on(moved)  # and home
            grads = (self._undeal(d.astype(a.dtype)) for d, a in zip((d_q, d_k, d_v), (q, k, v), strict=True))
            d_table = jax.tree.map(lambda d, a: lax.psum(d, self.axis).astype(a.dtype), d_table, table)
            return (*grads, d_table)

        dealt = P(None, None, None, self.axis)
        by_length = self._by_length
        return self._map(
            body, extras, (by_length, by_length, by_length, P()), saved, y, d_y, table, saved_spec=dealt
        )

    # --- over devices

    @property
    def _by_length(self) -> P:
        return P(None, None, self.axis)

    def _map(
        self, body: Callable[..., Any], extras: _Extras, out_specs: Any, *given: Any, saved_spec: Any = None
    ) -> Any:
        """Runs `body(*given, extras)` on every device's part; the other mesh axes stay automatic."""
        *arrays, table = given
        mask = extras.bias.mask
        bias_specs = jax.tree.map(lambda a: P(), extras.bias)
        if mask is not None and mask.ndim > 2 and mask.shape[-2] > 1:
            bias_specs = bias_specs.replace(mask=P(*[None] * (mask.ndim - 2), self.axis))
        extra_specs = _Extras(bias_specs, None if extras.factor is None else self._by_length, P())
        specs = [saved_spec if isinstance(a, tuple) else self._by_length for a in arrays]
        return jax.shard_map(
            body,
            mesh=jax.sharding.get_abstract_mesh(),
            in_specs=(*specs, P(), extra_specs),
            out_specs=out_specs,
            axis_names={self.axis},
            check_vma=False,
        )(*arrays, table, extras)

    def _go_round(
        self,
        device: "_Device",
        visit: Callable[..., Any],
        staying: Any,
        travelling: Any,
        keys: tuple[jax.Array, jax.Array],
    ) -> tuple[Any, Any]:
        """Visits every device's keys and values; the next are under way while one set is computed on.

        Args:
            device: this one.
            visit: `(staying, travelling), pair, keys, source` -> (staying, travelling) with one pair of pieces added.
            staying: sums that belong to the queries.
            travelling: sums that belong to the keys, and go round with them.
            keys: this device's keys and values, [pieces, B, N, S, H].

        Returns:
            (staying, travelling): the latter one step short of home.
        """

        def step(staying: Any, travelling: Any, keys: Any, distance: Any, is_first: bool = False) -> Any:
            source = (device.index - distance) % self.size
            seen, hidden = self._pairs(device.index, source, is_first)
            go = functools.partial(_each, functools.partial(visit, keys=keys, source=source))
            sums = go(seen, (staying, travelling))
            if hidden and device.extras.bias.mask is not None:
                sums = lax.cond(device.extras.blind, functools.partial(go, hidden), lambda sums: sums, sums)
            return sums

        def onwards(carry: Any, distance: jax.Array) -> tuple[Any, None]:
            staying, travelling, keys = carry
            coming, travelling = self._pass_on((keys, travelling))
            return (*step(staying, travelling, keys, distance), coming), None

        coming = self._pass_on(keys)
        staying, travelling = step(staying, travelling, keys, 0, is_first=True)
        carry = (staying, travelling, coming)
        if self.size > 2:
            carry, _ = lax.scan(onwards, carry, jnp.arange(1, self.size - 1, dtype=jnp.int32))
        staying, travelling, keys = carry
        return step(staying, self._pass_on(travelling), keys, self.size - 1)

    def _pairs(self, index: jax.Array, source: jax.Array, is_first: bool) -> tuple[list[Pair], list[Pair]]:
        """(pairs of pieces that see each other, pairs that do not), of this device's queries and the source's keys."""
        if self.num_pieces == 1:
            return [(0, 0)], []
        if is_first:
            return [(0, 0), (1, 0), (1, 1)], [(0, 1)]
        same = jnp.where(source < index, 0, 1)
        return [(1, 0), (same, same)], [(1 - same, 1 - same), (0, 1)]

    def _pass_on(self, tree: Any) -> Any:
        ring = [(i, (i + 1) % self.size) for i in range(self.size)]
        return jax.tree.map(lambda a: lax.ppermute(a, self.axis, ring), tree)

    def _deal(self, x: jax.Array, axis: int) -> jax.Array:
        """A device's stretch of the sequence, [...], to its pieces, [pieces, ...]."""
        if self.num_pieces == 1:
            return x[None]
        pieces = [
            lax.ppermute(half, self.axis, self._way(which))
            for which, half in enumerate(jnp.split(x, 2, axis=axis))
        ]
        return jnp.stack(self._swapped(*pieces))

    def _undeal(self, x: jax.Array) -> jax.Array:
        """The inverse of `_deal` along the dimension of length, [pieces, B, N, T, H] to [B, N, T, H]."""
        if self.num_pieces == 1:
            return x[0]
        halves = [
            lax.ppermute(piece, self.axis, [(b, a) for a, b in self._way(which)])
            for which, piece in enumerate(self._swapped(x[0], x[1]))
        ]
        return jnp.concatenate(halves, axis=2)

    def _way(self, which: int) -> list[tuple[int, int]]:
        """Where the first or second half of each device's stretch goes: piece p of 2 c to device p or 2 c - 1 - p."""
        pieces = [2 * i + which for i in range(self.size)]
        return [(i, min(p, 2 * self.size - 1 - p)) for i, p in enumerate(pieces)]

    def _swapped(self, first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Halves as they came to pieces from front and back, or the reverse: even pieces are first halves."""
        is_even = lax.axis_index(self.axis) % 2 == 0
        return jnp.where(is_even, first, second), jnp.where(is_even, second, first)


class _Device:
    """One device's part of an attention, inside the shard_map.

    Attributes:
        ring: the whole's.
        index: int32 [], which device.
        q: [pieces, B, N, T, H].
        table: as given.
        extras: with `factor` dealt as q is.
    """

    def __init__(self, ring: _Ring, q: jax.Array, table: jax.Array | None, extras: _Extras):
        self.ring, self.q, self.table = ring, q, table
        self.index = lax.axis_index(ring.axis)
        factor = None if extras.factor is None else ring._deal(extras.factor, 2)
        self.extras = _Extras(extras.bias, factor, extras.blind)

    def attend(self, sums: Any, pair: Pair, keys: Any, source: jax.Array) -> Any:
        """Adds one pair of pieces to the softmax of its queries."""
        (totals, highests, weights), travelling = sums
        mine, theirs = pair
        k, v = _at(keys[0], theirs), _at(keys[1], theirs)
        scores = self._scores(_at(self.q, mine), k, self.table, pair, source)
        before = _at(highests, mine)
        highest = jnp.maximum(before, scores.max(axis=-1))
        probs, kept = jnp.exp(scores - highest[..., None]), jnp.exp(before - highest)
        weight = _at(weights, mine) * kept + probs.sum(axis=-1)
        probs = self._dropped(probs, pair, source, k).astype(v.dtype)
        total = _at(totals, mine) * kept[..., None] + weigh_values(probs, v, **FLOAT32)
        return (
            _put(totals, total, mine),
            _put(highests, highest, mine),
            _put(weights, weight, mine),
        ), travelling

    def pull(self, sums: Any, pair: Pair, keys: Any, source: jax.Array, given: Any) -> Any:
        """Adds one pair's part of the gradients."""
        (d_q, d_table), (d_k, d_v) = sums
        mine, theirs = pair
        d_y, inner, highest, weight = (_at(a, mine) for a in given)
        q, k, v = _at(self.q, mine), _at(keys[0], theirs), _at(keys[1], theirs)
        scores, pull = jax.vjp(lambda q, k, table: self._scores(q, k, table, pair, source), q, k, self.table)
        probs = jnp.exp(scores - highest[..., None]) / weight[..., None]
        d_probs = query_key(d_y, v)
        d_scores = probs * (self._dropped(d_probs, pair, source, k) - inner[..., None])
        probs = self._dropped(probs, pair, source, k).astype(v.dtype)
        if (num_groups := v.shape[1]) == d_y.shape[1]:
            more_v = jnp.einsum("bnts,bnth->bnsh", probs, d_y, **FLOAT32)
        else:
            grouped = by_group(probs, num_groups), by_group(d_y, num_groups)
            more_v = jnp.einsum("bkgts,bkgth->bksh", *grouped, **FLOAT32)
        more_q, more_k, more_table = pull(d_scores)
        d_table = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), d_table, more_table)
        return (_add(d_q, more_q, mine), d_table), (_add(d_k, more_k, theirs), _add(d_v, more_v, theirs))

    def _scores(self, q: jax.Array, k: jax.Array, table: Any, pair: Pair, source: jax.Array) -> jax.Array:
        """float32 [B, N, T, S] of one pair."""
        num_queries, num_keys = q.shape[2], k.shape[2]
        first_query = self._start(self.index, pair[0], num_queries)
        first_key = self._start(source, pair[1], num_keys)
        slots = first_query + jnp.arange(num_queries, dtype=jnp.int32) if self.ring.is_causal else None
        bias = self.extras.bias.of_queries(first_query, num_queries).replace(query_slots=slots)
        bias = bias.of_keys(first_key, num_keys).dense(num_keys)
        scores = query_key(q, k)
        if self.ring.relative is not None:
            scores += relative_scores(self.ring.relative, table, q, k, first_query - first_key)
        return scores if bias is None else scores + bias

    def _dropped(self, probs: jax.Array, pair: Pair, source: jax.Array, k: jax.Array) -> jax.Array:
        if self.extras.factor is None:
            return probs
        factor = _at(self.extras.factor, pair[0])
        first_key, num_keys = self._start(source, pair[1], k.shape[2]), k.shape[2]
        return probs * lax.dynamic_slice_in_dim(factor, first_key, num_keys, axis=3).astype(probs.dtype)

    def _start(self, device: jax.Array, piece: Any, length: int) -> jax.Array:
        """The slot that a device's piece begins at."""
        last = self.ring.num_pieces * self.ring.size - 1
        return jnp.where(jnp.equal(piece, 0), device, last - device).astype(jnp.int32) * length


def _each(visit: Callable[..., Any], pairs: Sequence[Pair], sums: Any) -> Any:
    for pair in pairs:
        sums = visit(sums, pair)
    return sums


def _at(x: jax.Array, piece: Any) -> jax.Array:
    return lax.dynamic_index_in_dim(x, piece, keepdims=False)


def _put(x: jax.Array, value: jax.Array, piece: Any) -> jax.Array:
    return lax.dynamic_update_index_in_dim(x, value, piece, 0)


def _add(x: jax.Array, more: jax.Array, piece: Any) -> jax.Array:
    return _put(x, _at(x, piece) + more.astype(x.dtype), piece)
