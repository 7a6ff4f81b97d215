"""int8 arrays: the error of rounding, the layers that take them in place of their parameters, and the cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import inference
import modelzoo
from modelzoo.heads import LMHead
from modelzoo.layers.cache import init_cache
from modelzoo.layers.embed import Embed
from modelzoo.layers.linear import Linear
from modelzoo.layers.quantized import Quantized, dequantize, is_quantized, quantize, take_rows
from tests.zoo import assert_close, quick_jit, random_params, tiny_gptj


def drawn(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize(
    ("shape", "shared"), [((5, 7), (0,)), ((3, 4, 6), (0, 1)), ((6, 2, 5), (0,)), ((9, 4), (1,))]
)
def test_every_channel_is_off_by_half_a_step_at_most(shape, shared):
    value = drawn(*shape) * 10.0
    packed = quantize(value, shared)
    assert packed.values.dtype == jnp.int8
    assert packed.scale.dtype == jnp.float32
    assert packed.scale.shape == tuple(1 if i in shared else dim for i, dim in enumerate(shape))
    assert (packed.shape, packed.ndim) == (shape, len(shape))
    error = np.abs(np.asarray(dequantize(packed) - value))
    assert (error <= np.asarray(packed.scale) * 0.5001).all()
    assert (np.abs(np.asarray(packed.values)).max(axis=shared) == 127).all()  # the whole range is in use


def test_a_channel_of_zeros_stays_zero():
    packed = quantize(jnp.zeros((4, 3), jnp.bfloat16), (0,))
    np.testing.assert_array_equal(dequantize(packed), np.zeros((4, 3)))
    assert dequantize(drawn(2, 2)).shape == (2, 2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), [((6,), (3, 5)), ((3, 5), (6,))])
def test_linear_scales_what_comes_out(inputs, outputs, dtype):
    layer = Linear(inputs, outputs, (None,) * (len(inputs) + len(outputs)), dtype=dtype)
    kernel, bias, x = drawn(*inputs, *outputs), drawn(*outputs), drawn(2, *inputs)
    packed = quantize(kernel, range(len(inputs)))
    got = layer.apply({"params": {"kernel": packed, "bias": bias}}, x)
    want = layer.apply({"params": {"kernel": dequantize(packed), "bias": bias}}, x)
    assert got.dtype == dtype
    assert_close(got, want, 1e-5 if dtype == jnp.float32 else 0.06)
    with pytest.raises(ValueError, match=r"parameter kernel has shape"):
        layer.apply({"params": {"kernel": packed.T, "bias": bias}}, x)


def test_a_table_by_row_is_looked_up_and_is_a_head():
    table, ids = drawn(11, 6), jnp.array([[0, 10, 4]])
    packed = quantize(table, (1,))
    embed = Embed(11, 6)
    assert_close(
        embed.apply({"params": {"embedding": packed}}, ids), np.asarray(dequantize(packed))[ids], 1e-6
    )
    assert np.isnan(np.asarray(take_rows(packed, jnp.array([11])))).all()
    head, x = LMHead(6, 11, tied=True), drawn(1, 2, 6)
    want = x @ dequantize(packed).T
    assert_close(head.apply({"params": {}}, x, packed), want, 1e-5)
    # The transposed copy that a CPU decodes with.
    copy = jax.tree.map(lambda a: a.T, packed)
    assert is_quantized(copy)
    assert isinstance(copy, Quantized)
    assert_close(head.apply({"params": {"kernel": copy}}, x, table), want, 1e-5)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_cache_in_int8_holds_what_was_written(rows):
    """With a scale per token and head; rows with a slot of their own write like others."""
    cache = init_cache(1, rows, 6, 2, 8, jnp.int8)
    layer = jax.tree.map(lambda a: a[0], cache.layers)
    key, value = drawn(rows, 2, 3, 8) * jnp.float32(5.0), drawn(rows, 2, 3, 8)
    index = jnp.full((rows,), 2, jnp.int32) if rows > 1 else jnp.int32(2)
    written = layer.write(key, value, index)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(written)) == 2 * rows * 2 * 6 * (8 + 4)
    for held, given in zip(written.read(jnp.float32), (key, value), strict=True):
        error = np.abs(np.asarray(held)[:, :, 2:5] - np.asarray(given)).max(axis=-1)
        assert (error <= np.abs(given).max(axis=-1) / 127 * 0.501).all()
        assert not np.asarray(held)[:, :, :2].any()
    with pytest.raises(ValueError, match="the cache holds"):
        layer.write(drawn(rows, 3, 1, 8), drawn(rows, 3, 1, 8), index)


def test_decoding_over_an_int8_cache():
    model = modelzoo.GPTJForCausalLM(tiny_gptj(n_layer=1))
    params = random_params(model)
    packed = model.clone(cache_dtype=jnp.int8)
    ids = jnp.arange(8)[None]
    apply = quick_jit(lambda model, **inputs: model.apply({"params": params}, **inputs), static_argnums=0)
    whole = model.apply({"params": params}, input_ids=ids).logits
    first = apply(packed, input_ids=ids[:, :7], cache=packed.init_cache(1, 8))
    last = apply(packed, input_ids=ids[:, 7:], cache=first.cache)
    assert is_quantized(last.cache.layers.key)
    assert_close(last.logits, whole[:, 7:], 0.03 * float(jnp.std(whole)))
    config = inference.GenerationConfig(max_new_tokens=6)
    out = inference.generate(packed, params, [[1, 2, 3]], config=config)
    same = inference.generate(model, params, [[1, 2, 3]], config=config)
    assert (out.sequences == same.sequences).mean() > 0.6
