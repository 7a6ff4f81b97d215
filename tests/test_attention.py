"""Attention against a float64 loop over batch, heads and queries, one feature at a time and all together."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modelzoo.layers import attention
from modelzoo.layers.attention import dot_product_attention
from modelzoo.layers.cache import LayerCache

Attention: Any = attention.Attention  # flax types what init and apply return as unions
B, T, D, N, H = 2, 5, 12, 3, 4
FLOAT32_MIN = float(np.finfo(np.float32).min)


def random(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


def reference(q, k, v, bias=None, head_mask=None):
    """(context, probabilities) of q [B, N, T, H], k and v [B, N, S, H]; nothing is scaled."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    full = (*q.shape[:3], k.shape[2])
    bias = np.broadcast_to(0.0 if bias is None else np.asarray(bias, np.float64), full)
    probs, context = np.zeros(full), np.zeros((*q.shape[:3], v.shape[3]))
    for b, n, t in np.ndindex(*q.shape[:3]):
        scores = k[b, n] @ q[b, n, t] + bias[b, n, t]
        weights = np.exp(scores - scores.max())
        probs[b, n, t] = weights / weights.sum() * (1.0 if head_mask is None else head_mask[n])
        context[b, n, t] = probs[b, n, t] @ v[b, n]
    return context, probs


def causal(num_queries, num_keys):
    return np.where(np.arange(num_keys) <= np.arange(num_queries)[:, None], 0.0, FLOAT32_MIN).astype(
        np.float32
    )


@pytest.mark.parametrize("bias_shape", [None, (B, 1, 1, 7), (1, N, T, 7), (T, 7), (B, N, T, 7)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_dot_product_attention(bias_shape, masked):
    q, k, v = random(B, N, T, H), random(B, N, 7, H, seed=1), random(B, N, 7, H, seed=2)
    bias = None if bias_shape is None else random(*bias_shape)
    head_mask = np.array([1.0, 0.0, 0.25], np.float32) if masked else None
    given: list[Any] = [None if a is None else jnp.asarray(a) for a in (q, k, v, bias)]
    context, probs = dot_product_attention(
        *given, head_mask=None if head_mask is None else jnp.asarray(head_mask)
    )
    expected_context, expected_probs = reference(q, k, v, bias, head_mask)
    np.testing.assert_allclose(probs, expected_probs, atol=2e-6)
    np.testing.assert_allclose(context, expected_context, atol=5e-6)


def test_softmax_is_float32_in_bfloat16():
    """Scores of 200 and 201 are the same number in bfloat16; their softmax must still tell them apart."""
    q = jnp.full((1, 1, 1, 1), 1.0, jnp.bfloat16)
    k = jnp.array([200.0, 202.0], jnp.bfloat16).reshape(1, 1, 2, 1)
    bias = jnp.array([1.25, 0.0])
    context, probs = dot_product_attention(q, k, jnp.ones((1, 1, 2, 1), jnp.bfloat16), bias)
    assert context.dtype == probs.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        probs[0, 0, 0].astype(jnp.float32), jax.nn.softmax(jnp.array([201.25, 202.0])), rtol=2**-8
    )


def test_scores_do_not_overflow():
    q = jnp.full((1, 1, 1, 1), 200.0, jnp.float16)
    k = jnp.full((1, 1, 3, 1), 200.0, jnp.float16)  # 40000 each and 80000 summed are past float16's 65504
    q, k = jnp.tile(q, (1, 1, 1, 2)), jnp.tile(k, (1, 1, 1, 2))
    _, probs = dot_product_attention(q, k, jnp.ones((1, 1, 3, 1), jnp.float16), None)
    np.testing.assert_allclose(probs.astype(jnp.float32), 1 / 3, rtol=1e-3)


class TestModule:
    """`Attention`, with kernels drawn here and the projections done by einsum."""

    kernels = {name: random(D, N, H, seed=i) * 0.4 for i, name in enumerate(("query", "key", "value"))}
    out_kernel = random(N, H, D, seed=3) * 0.4

    def params(self, biased=False):
        tree = {name: {"kernel": jnp.asarray(kernel)} for name, kernel in self.kernels.items()}
        tree["out"] = {"kernel": jnp.asarray(self.out_kernel)}
        if biased:
            for i, name in enumerate(self.kernels):
                tree[name]["bias"] = jnp.asarray(random(N, H, seed=10 + i))
            tree["out"]["bias"] = jnp.asarray(random(D, seed=13))
        return tree

    def apply(self, x, biased=False, dropout=0.0, rngs=None, dtype=jnp.float32, **kwargs):
        module = Attention(D, N, H, use_bias=biased, out_bias=biased, dropout=dropout, dtype=dtype)
        return module.apply({"params": self.params(biased)}, jnp.asarray(x, dtype), rngs=rngs, **kwargs)

    def project(self, name, x, biased=False):
        y = np.einsum("btd,dnh->bnth", np.asarray(x, np.float64), self.kernels[name])
        return y + (np.asarray(self.params(True)[name]["bias"])[None, :, None] if biased else 0.0)

    def expected(
        self, x, source=None, biased=False, bias=None, head_mask=None, before=(None, None), turn=lambda a: a
    ):
        source = x if source is None else source
        q = turn(self.project("query", x, biased)) / np.sqrt(H)
        k, v = turn(self.project("key", source, biased)), self.project("value", source, biased)
        k, v = (
            a if b is None else np.concatenate([b, a], axis=2) for a, b in zip((k, v), before, strict=True)
        )
        context, probs = reference(q, k, v, bias, head_mask)
        y = np.einsum("bnth,nhd->btd", context, self.out_kernel)
        return y + (np.asarray(self.params(True)["out"]["bias"]) if biased else 0.0), probs

    def check(self, got, expected):
        np.testing.assert_allclose(got[1], expected[1], atol=2e-6)
        np.testing.assert_allclose(got[0], expected[0], atol=1e-5)

    @pytest.mark.parametrize("biased", [False, True])
    def test_self_attention(self, biased):
        x = random(B, T, D)
        y, probs, cache = self.apply(x, biased, bias=jnp.asarray(causal(T, T)))
        self.check((y, probs), self.expected(x, biased=biased, bias=causal(T, T)))
        assert cache is None

    @pytest.mark.parametrize("biased", [False, True])
    def test_cross_attention_to_a_source_of_another_length_and_width_of_batch(self, biased):
        x, source = random(B, T, D), random(B, 7, D, seed=1)
        got = self.apply(x, biased, source_BSD=jnp.asarray(source))[:2]
        self.check(got, self.expected(x, source, biased=biased))

    def test_a_projected_source_stands_in_for_it(self):
        """What cross-attention returns to be cached gives the same again, with no source and no projection."""
        x, source = random(B, T, D), random(B, 7, D, seed=1)
        first = self.apply(x, source_BSD=jnp.asarray(source))
        assert first[2].key.shape == (B, N, 7, H)
        again = self.apply(x, projected=first[2])
        np.testing.assert_array_equal(again[0], first[0])

    @pytest.mark.parametrize("first", [0, 2])
    @pytest.mark.parametrize("kind", ["relative_key", "relative_key_query"])
    def test_relative_positions(self, kind, first):
        """Scores of every pair, by a loop over the pairs, without and with earlier tokens in a cache."""
        table, num_keys = random(2 * 16 - 1, H, seed=9), T + first
        x = random(B, num_keys, D)
        q, k, v = (self.project(name, x) for name in ("query", "key", "value"))
        scores = np.zeros((B, N, T, num_keys))
        for t in range(T):
            for s in range(num_keys):
                vector = table[first + t - s + 15]
                scores[..., t, s] = q[:, :, first + t] @ vector
                if kind == "relative_key_query":
                    scores[..., t, s] += k[:, :, s] @ vector
        context, probs = reference(q[:, :, first:] / np.sqrt(H), k, v, scores / np.sqrt(H), None)
        module = Attention(D, N, H, use_bias=False, out_bias=False, relative=kind, max_positions=16)
        variables = {"params": self.params() | {"distance": jnp.asarray(table)}}
        cache = LayerCache(*(jnp.zeros((B, N, num_keys, H)),) * 2) if first else None
        if cache is not None:
            earlier = jnp.asarray(x[:, :first])
            cache = module.apply(variables, earlier, cache=cache, cache_index=jnp.int32(0))[2]
        got = module.apply(variables, jnp.asarray(x[:, first:]), cache=cache, cache_index=jnp.int32(first))
        self.check(got[:2], (np.einsum("bnth,nhd->btd", context, self.out_kernel), probs))

    @pytest.mark.parametrize("kind", [None, "relative_key_query"])
    def test_grouped_heads_are_full_heads_repeated(self, kind):
        """Every K of N heads, with what depends on the keys alone."""
        x, table = jnp.asarray(random(B, T, D)), jnp.asarray(random(2 * 8 - 1, H, seed=9))
        shared = dict(use_bias=False, out_bias=False, relative=kind, max_positions=8)
        for num_kv_heads, times in ((1, 4), (2, 2)):
            grouped, full = (Attention(D, 4, H, num_kv_heads=k, **shared) for k in (num_kv_heads, None))
            params = {"out": {"kernel": jnp.asarray(random(4, H, D))}} | ({"distance": table} if kind else {})
            params["query"] = {"kernel": jnp.asarray(random(D, 4, H))}
            kernels = {
                name: jnp.asarray(random(D, num_kv_heads, H, seed=i))
                for i, name in enumerate(("key", "value"))
            }
            own = params | {name: {"kernel": kernel} for name, kernel in kernels.items()}
            repeated = params | {
                name: {"kernel": jnp.repeat(k, times, axis=1)} for name, k in kernels.items()
            }
            bias = jnp.asarray(causal(T, T))
            got, expected = (
                module.apply({"params": tree}, x, bias=bias)[:2]
                for module, tree in ((grouped, own), (full, repeated))
            )
            self.check(got, expected)

    def test_queries_and_keys_are_normed_before_they_rotate(self):
        x, scales = random(B, T, D), {name: random(H, seed=20 + i) for i, name in enumerate(("query", "key"))}

        def placed(name):
            y = self.project(name, x)
            return -2.0 * (y / np.sqrt((y**2).mean(-1, keepdims=True) + 0.01) * scales[name] + 1.0)

        context, probs = reference(placed("query") / np.sqrt(H), placed("key"), self.project("value", x))
        module = Attention(D, N, H, use_bias=False, out_bias=False, qk_norm=True, norm_epsilon=0.01)
        params = self.params() | {
            f"{name}_norm": {"scale": jnp.asarray(scale)} for name, scale in scales.items()
        }
        got = module.apply({"params": params}, jnp.asarray(x), rotary=lambda a: -2.0 * (a + 1.0))
        self.check(got[:2], (np.einsum("bnth,nhd->btd", context, self.out_kernel), probs))

    def test_cross_attention_from_another_width(self):
        module = Attention(D, N, H)
        x, source = jnp.ones((B, T, D)), jnp.ones((B, 7, 20))
        params = jax.eval_shape(lambda: module.init(jax.random.key(0), x, source_BSD=source))["params"]
        assert params["query"]["kernel"].value.shape == (D, N, H)
        assert params["key"]["kernel"].value.shape == params["value"]["kernel"].value.shape == (20, N, H)

    def test_prefix_keys_and_values_come_first_and_take_no_position(self):
        x, prefix = random(B, T, D), (random(N, 3, H, seed=4), random(N, 3, H, seed=5))
        got = self.apply(
            x,
            bias=jnp.asarray(causal(T, T)),
            prefix=tuple(map(jnp.asarray, prefix)),
            rotary=lambda a: -2.0 * a,
        )
        bias = np.concatenate([np.zeros((T, 3), np.float32), causal(T, T)], axis=1)
        before = tuple(np.broadcast_to(a, (B, *a.shape)) for a in prefix)
        self.check(got[:2], self.expected(x, bias=bias, before=before, turn=lambda a: -2.0 * a))
        assert got[1].shape == (B, N, T, 3 + T)

    def test_rotary_turns_queries_and_keys_by_position(self):
        x = random(B, T, D)
        weights = np.linspace(0.5, 2.0, T * N).reshape(T, N).astype(np.float32)  # tells T from N
        got = self.apply(x, rotary=lambda a: a * jnp.asarray(weights)[None, :, :, None])[:2]
        self.check(got, self.expected(x, turn=lambda a: a * weights.T[None, :, :, None]))

    def test_head_mask(self):
        x, mask = random(B, T, D), np.array([0.0, 1.0, 0.5], np.float32)
        self.check(self.apply(x, head_mask=jnp.asarray(mask))[:2], self.expected(x, head_mask=mask))

    def test_cache_of_earlier_tokens(self):
        """Three tokens, then two, give the rows of five at once, and empty slots weigh nothing."""
        x = random(B, T, D)
        whole = self.apply(x, bias=jnp.asarray(causal(T, T)))
        empty = LayerCache(*(jnp.full((B, N, 8, H), 1e3),) * 2)  # what empty slots hold must not matter
        bias = jnp.asarray(causal(8, 8))
        first = self.apply(x[:, :3], bias=bias[:3], cache=empty, cache_index=jnp.int32(0))
        second = self.apply(x[:, 3:], bias=bias[3:5], cache=first[2], cache_index=jnp.int32(3))
        np.testing.assert_allclose(jnp.concatenate([first[0], second[0]], 1), whole[0], atol=2e-6)
        probs = jnp.concatenate([first[1], second[1]], 2)
        np.testing.assert_allclose(probs[..., :T], whole[1], atol=2e-6)
        assert (probs[..., T:] == 0).all()
        keys = np.einsum("btd,dnh->bnth", x, self.kernels["key"])
        np.testing.assert_allclose(second[2].key[:, :, :T], keys, atol=1e-5)
        assert (second[2].key[:, :, T:] == 1e3).all()

    def test_cache_of_another_dtype(self):
        """Keys are rounded into it, and attended to in the computation's dtype."""
        x = random(B, T, D)
        empty = LayerCache(*(jnp.zeros((B, N, T, H), jnp.bfloat16),) * 2)
        y, _, cache = self.apply(x, cache=empty, cache_index=jnp.int32(0))
        assert y.dtype == jnp.float32
        assert cache.key.dtype == cache.value.dtype == jnp.bfloat16
        np.testing.assert_allclose(y, self.apply(x)[0], atol=0.05)

    def test_everything_at_once(self):
        x, prefix = random(B, T, D), (random(N, 2, H, seed=4), random(N, 2, H, seed=5))
        mask, bias = np.array([0.5, 1.0, 2.0], np.float32), random(B, N, T, T)
        got = self.apply(
            x,
            True,
            bias=jnp.asarray(bias),
            rotary=lambda a: a * 0.7,
            prefix=tuple(map(jnp.asarray, prefix)),
            cache=LayerCache(*(jnp.zeros((B, N, T, H)),) * 2),
            cache_index=jnp.int32(0),
            head_mask=jnp.asarray(mask),
        )[:2]
        bias = np.pad(bias, ((0, 0), (0, 0), (0, 0), (2, 0)))
        before = tuple(np.broadcast_to(a, (B, *a.shape)) for a in prefix)
        expected = self.expected(
            x, biased=True, bias=bias, head_mask=mask, before=before, turn=lambda a: a * 0.7
        )
        self.check(got, expected)

    def test_dropout_falls_on_probabilities(self):
        """Which are returned as they were multiplied: dropped ones zero, the others scaled up."""
        x = random(8, 16, D)
        _, kept, _ = self.apply(x)
        y, probs, _ = self.apply(x, dropout=0.25, deterministic=False, rngs={"dropout": jax.random.key(0)})
        ratio = np.asarray(probs / kept)
        dropped = ratio == 0
        np.testing.assert_allclose(ratio[~dropped], 1 / 0.75, rtol=1e-5)
        assert abs(dropped.mean() - 0.25) < 0.02  # 6144 of them: 3.6 standard deviations
        context = np.einsum("bnts,bnsh->bnth", probs, self.project("value", x))
        np.testing.assert_allclose(y, np.einsum("bnth,nhd->btd", context, self.out_kernel), atol=1e-4)
        assert (self.apply(x, dropout=0.25)[0] == self.apply(x)[0]).all()

    def test_bfloat16(self):
        x = random(B, T, D)
        y, probs, _ = self.apply(x, dtype=jnp.bfloat16)
        assert y.dtype == probs.dtype == jnp.bfloat16
        np.testing.assert_allclose(y.astype(jnp.float32), self.apply(x)[0], atol=0.1)


def test_parameters_and_their_axes():
    module = Attention(D, N, H, use_bias=True, out_bias=False, param_dtype=jnp.float16)
    params = module.init(jax.random.key(0), jnp.ones((1, 2, D)))["params"]
    names = {f"{layer}/{name}": box.names for layer, boxes in params.items() for name, box in boxes.items()}
    assert names == {
        **{f"{layer}/kernel": ("embed", "heads", "head_dim") for layer in ("query", "key", "value")},
        **{f"{layer}/bias": ("heads", "head_dim") for layer in ("query", "key", "value")},
        "out/kernel": ("heads", "head_dim", "embed"),
    }
    assert all(box.value.dtype == jnp.float16 for boxes in params.values() for box in boxes.values())


def test_heads_need_not_fill_the_width():
    """MVP's and others' head widths are theirs: N · H is not D here."""
    module = Attention(10, 3, 5)
    variables = module.init(jax.random.key(0), jnp.ones((1, 2, 10)))
    assert module.apply(variables, jnp.ones((1, 2, 10)))[0].shape == (1, 2, 10)


def test_an_unknown_kind_of_relative_positions():
    module = Attention(10, 3, 5, relative="relative", max_positions=4)
    with pytest.raises(ValueError, match="unknown relative positions 'relative'"):
        module.init(jax.random.key(0), jnp.ones((1, 2, 10)))
