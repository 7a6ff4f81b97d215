"""Laying parameters out for decoding: in int8, on a mesh, and again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import inference
import modelzoo
import parallel
from modelzoo.layers.quantized import dequantize, is_quantized
from tests import zoo

MODELS = {
    "gptj": modelzoo.GPTJForCausalLM(zoo.tiny_gptj(vocab_size=38, n_embd=32, n_head=4, n_inner=36)),
    "bloom": modelzoo.BloomForCausalLM(modelzoo.get_config("tiny-bloom", vocab_size=38)),
}
CONFIG = inference.GenerationConfig(max_new_tokens=4)
IDS = np.arange(10).reshape(2, 5)


def dequantized(tree):
    return jax.tree.map(dequantize, tree, is_leaf=is_quantized)


@pytest.mark.parametrize("name", MODELS)
def test_int8_decodes_as_the_weights_it_stands_for(name):
    model, params = MODELS[name], zoo.random_params(MODELS[name])
    packed = inference.prepare(model, params, quantize="int8")
    assert packed["lm_head"]["kernel"].values.shape == (model.config.hidden_size, 38)
    out = zoo.quick_jit(model.apply)({"params": packed}, input_ids=jnp.asarray(IDS))
    same = zoo.quick_jit(model.apply)({"params": dequantized(packed)}, input_ids=jnp.asarray(IDS))
    zoo.assert_close(out.logits, same.logits, 2e-5)
    again = inference.prepare(model, packed)
    zoo.assert_equal(again, packed)
    from_prepared = inference.prepare(model, inference.prepare(model, params), quantize="int8")
    zoo.assert_equal(from_prepared, packed)


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_int8_under_a_mesh(name):
    model, params = MODELS[name], zoo.random_params(MODELS[name])
    rules = parallel.make_rules(parallel.make_mesh(fsdp=2, tensor=4))
    alone = inference.prepare(model, params, quantize="int8")
    spread = inference.prepare(model, params, rules, quantize="int8")
    kernel = spread["trunk"]["layers"][0]["mlp"]["fc_in"]["kernel"]
    assert kernel.scale.sharding == rules.sharding((None, "mlp"))
    assert len(kernel.values.addressable_shards[0].data.ravel()) * 8 == kernel.values.size
    moved = inference.prepare(model, alone, rules)  # quantized first, then spread: vocabulary padded
    for path in (("trunk", "layers", 1, "attention", "out", "kernel"), ("lm_head", "kernel")):
        one, other = spread, moved
        for key in path:
            one, other = one[key], other[key]
        assert one.scale.sharding.is_equivalent_to(other.scale.sharding, one.ndim)
        zoo.assert_equal(one, other)
    out = inference.generate(model, spread, IDS, config=CONFIG, rules=rules)
    np.testing.assert_array_equal(
        out.sequences, inference.generate(model, alone, IDS, config=CONFIG).sequences
    )


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="quantize = 'int3': pass 'int8', or None"):
        inference.prepare(MODELS["gptj"], {}, quantize="int3")
