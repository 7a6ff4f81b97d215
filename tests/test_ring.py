"""Ring attention against attention to all keys at once, and its gradients, with everything that attention takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import parallel
from modelzoo.layers import attention
from modelzoo.layers.attention import AttentionCall
from modelzoo.layers.bias import Bias
from modelzoo.layers.position import alibi_bias
from parallel import ring
from tests.zoo import assert_close_relative, quick_jit

B, N, H = 2, 4, 8


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32) / 2)


def keep(probs):
    """Dropout with a key of its own."""
    kept = jax.random.bernoulli(jax.random.key(3), 0.7, probs.shape)
    return probs * kept.astype(probs.dtype) / 0.7


def calls(length):
    """Everything that a bias and the rest may be, by name; rows padded on the left see nothing at first."""
    slots = jnp.arange(length, dtype=jnp.int32)
    mask = jnp.arange(length) >= jnp.array([[0], [5]])
    segments = jnp.searchsorted(jnp.array([3, 4, length - 5]), slots, side="right") * jnp.array([[1], [2]])
    relative = dict(relative="relative_key_query", table_RH=random(2 * length - 1, H))
    return {
        "causal": dict(bias=Bias(None, slots)),
        "causal with all else": dict(
            bias=Bias(mask, slots, alibi_bias(mask, N)), head_mask=random(N), dropout=keep
        ),
        "relative": dict(bias=Bias(mask), **relative),
        "causal and relative": dict(bias=Bias(None, slots), **relative),
        "array": dict(bias=random(B, 1, length, length)),
        "segments": dict(bias=Bias(None, None, None, segments, segments)),
        "causal segments with all else": dict(
            bias=Bias(mask, slots, alibi_bias(mask, N, segments), segments, segments), dropout=keep
        ),
    }


def value_and_gradients(attend, given, fields):
    weight = random(*given[0].shape, seed=9)

    def loss(q, k, v, table):
        call = AttentionCall(q, k, v, **(fields | {"table_RH": table} if table is not None else fields))
        y, _ = attend(call)
        return jnp.sum(y * weight), y

    table = fields.get("table_RH")
    return quick_jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(*given, table)


def check(fields, given, sizes):
    expected = value_and_gradients(attention.attend, given, fields)
    count = int(np.prod(list(sizes.values())))
    rules = parallel.make_rules(parallel.make_mesh(**sizes, devices=jax.devices()[:count]))
    with parallel.use(rules):
        found = value_and_gradients(attention._ATTEND.get(), given, fields)
    (_, y), gradients = found
    (_, expected_y), expected_gradients = expected
    assert_close_relative((y, gradients), (expected_y, expected_gradients), 2e-6)


@pytest.mark.parametrize("name", list(calls(2)))
def test_is_attention(name):
    given = [random(B, N, 24, H, seed=i) for i in range(3)]
    check(calls(24)[name], given, dict(context=3))


def test_beside_other_axes():
    given = [random(B, N, 16, H, seed=i) for i in range(3)]
    check(calls(16)["causal with all else"], given, dict(data=2, context=2, tensor=2))


def test_grouped_heads():
    """Two heads of keys and values for four of queries, each of the two on a device of its own."""
    given = [random(B, heads, 16, H, seed=i) for i, heads in enumerate((N, 2, 2))]
    check(calls(16)["causal with all else"], given, dict(context=2, tensor=2))


def test_pieces_that_do_not_halve_and_keys_of_another_length():
    """Three tokens a device: the work is not balanced, the result the same; so for cross-attention."""
    given = [random(B, N, 6, H), random(B, N, 10, H, seed=1), random(B, N, 10, H, seed=2)]
    check(dict(bias=Bias(jnp.arange(10) >= jnp.array([[0], [2]]))), given, dict(context=2))
    given = [random(B, N, 6, H, seed=i) for i in range(3)]
    check(dict(bias=Bias(None, jnp.arange(6, dtype=jnp.int32))), given, dict(context=2))


@pytest.mark.parametrize("size", [2, 3, 8])
def test_causal_work_is_balanced(size):
    """Each pair of pieces that sees each other is computed once, and every device has as many as the others."""
    whole = ring._Ring("context", size, 2, True, None)
    places = [(i, 2 * size - 1 - i) for i in range(size)]
    computed = []
    for device in range(size):
        for distance in range(size):
            source = (device - distance) % size
            seen, hidden = whole._pairs(jnp.int32(device), jnp.int32(source), distance == 0)
            assert len(seen) == (3 if distance == 0 else 2)
            assert len(seen) + len(hidden) == 4
            computed += [(places[device][int(q)], places[source][int(k)]) for q, k in seen]
    assert sorted(computed) == [(q, k) for q in range(2 * size) for k in range(q + 1)]
