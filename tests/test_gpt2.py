"""What is particular to GPT-2. tests/parity holds every output to transformers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import inference
import modelzoo
from tests.zoo import assert_close, assert_equal, quick_jit, random_params

CONFIG = modelzoo.GPT2Config(
    vocab_size=37, n_positions=16, n_embd=24, n_layer=2, n_head=3, n_inner=31, pad_token_id=0, eos_token_id=1
)
MODEL = modelzoo.GPT2LMHeadModel(CONFIG)
IDS = jnp.asarray(np.random.default_rng(0).integers(4, 37, (2, 7)), jnp.int32)


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL)


@quick_jit
def logits_of(params, **inputs):
    return MODEL.apply({"params": params}, **inputs).logits


def changed(params, **fields):
    model = modelzoo.GPT2LMHeadModel(dataclasses.replace(CONFIG, **fields))
    return model.apply({"params": params}, input_ids=IDS).logits


def test_positions_are_learned(params):
    """Rows of a table, added: a token's place is what its row says."""
    moved = logits_of(params, input_ids=IDS, position_ids=jnp.arange(3, 10)[None])
    table = params["trunk"]["embed_positions"]["embedding"]
    rolled = jax.tree.map(lambda leaf: leaf, params)
    rolled["trunk"] = dict(rolled["trunk"], embed_positions={"embedding": jnp.roll(table, -3, axis=0)})
    assert_close(logits_of(rolled, input_ids=IDS), moved, 2e-6)
    with pytest.raises(ValueError, match="17 tokens are more than the model's n_positions = 16"):
        logits_of(params, input_ids=jnp.ones((1, 17), jnp.int32))


def test_the_head_is_the_embedding_table(params):
    assert set(params) == {"trunk"}
    untied = modelzoo.GPT2LMHeadModel(dataclasses.replace(CONFIG, tie_word_embeddings=False))
    assert modelzoo.abstract_params(untied)["lm_head"]["kernel"].shape == (24, 37)


def test_scores_are_scaled_as_the_config_says(params):
    """Scaling scores is scaling queries: of layer i by 1 / i, or by the root of a head's width."""

    def with_queries(scale):
        def scaled(path, leaf):
            return leaf * scale if any(key.key == "query" for key in path) else leaf

        return jax.tree_util.tree_map_with_path(scaled, params)

    by_layer = jnp.asarray([1.0, 0.5])

    def by_layers(path, leaf):
        is_query = any(key.key == "query" for key in path)
        return leaf * by_layer.reshape(-1, *[1] * (leaf.ndim - 1)) if is_query else leaf

    want = logits_of(jax.tree_util.tree_map_with_path(by_layers, params), input_ids=IDS)
    assert_close(changed(params, scale_attn_by_inverse_layer_idx=True), want, 2e-5)
    want = logits_of(with_queries(8**0.5), input_ids=IDS)
    assert_close(changed(params, scale_attn_weights=False), want, 2e-5)
    assert_close(changed(params, reorder_and_upcast_attn=True), logits_of(params, input_ids=IDS), 2e-5)


def test_what_is_added_to_the_residual_begins_smaller():
    """Radford et al.: by the root of the number of things added, two a layer."""
    config = modelzoo.GPT2Config(vocab_size=37, n_embd=64, n_layer=8, n_head=4)
    model = modelzoo.GPT2Model(config)
    variables = model.init(jax.random.key(0), input_ids=jnp.ones((1, 1), jnp.int32))
    layers = jax.tree.map(np.std, modelzoo.unstack_layers(variables["params"])["layers"][0])
    for kernel in (layers["attention"]["out"], layers["mlp"]["fc_out"]):
        assert kernel["kernel"] == pytest.approx(0.02 / 16**0.5, rel=0.05)
    for kernel in (layers["attention"]["query"], layers["mlp"]["fc_in"]):
        assert kernel["kernel"] == pytest.approx(0.02, rel=0.05)


def test_files_hold_kernels_in_by_out_and_older_files_load(params, tmp_path):
    """Conv1D's layout; without the prefix, with the buffers of older versions and GPT2DoubleHeadsModel's other head."""
    modelzoo.to_hf(MODEL, params, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    attention = params["trunk"]["layers"]["attention"]
    fused = tensors["transformer.h.1.attn.c_attn.weight"]
    assert fused.shape == (24, 72)
    for i, name in enumerate(("query", "key", "value")):
        kernel = np.asarray(attention[name]["kernel"][1])
        np.testing.assert_array_equal(fused[:, 24 * i : 24 * (i + 1)], kernel.reshape(24, 24))
    assert tensors["transformer.h.0.mlp.c_fc.weight"].shape == (24, 31)
    assert "lm_head.weight" not in tensors

    older = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    older |= {"h.0.attn.bias": np.ones((1, 1, 16, 16), np.uint8), "h.0.attn.masked_bias": np.float32([-1e4])}
    older["multiple_choice_head.summary.weight"] = np.ones((1, 24), np.float32)
    save_file(older, tmp_path / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["architectures"] == ["GPT2LMHeadModel"]
    model, loaded = modelzoo.from_hf(tmp_path)
    assert isinstance(model, modelzoo.GPT2LMHeadModel)
    assert_equal(loaded, params)


def test_an_encoder_needs_cross_attention(params):
    with pytest.raises(ValueError, match="set add_cross_attention in the config"):
        MODEL.apply({"params": params}, input_ids=IDS, encoder_hidden_states=jnp.ones((2, 3, 24)))
    model = modelzoo.GPT2LMHeadModel(dataclasses.replace(CONFIG, add_cross_attention=True))
    assert "cross_attention" in modelzoo.abstract_params(model)["trunk"]["layers"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(n_head=5), "GPT2Config.n_embd = 768: n_head = 5 does not divide it"),
        (dict(activation_function="swiglu"), "GPT2Config.activation_function = 'swiglu': known are"),
        (dict(n_inner=0), "GPT2Config.n_inner = 0"),
        (dict(resid_pdrop=1.0), "GPT2Config.resid_pdrop = 1.0"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        modelzoo.GPT2Config(**fields)


def test_presets_are_the_published_sizes():
    sizes = {name: (c.n_embd, c.n_layer, c.n_head) for name, c in modelzoo.get_family("gpt2").presets.items()}
    assert sizes["gpt2"] == (768, 12, 12)
    assert sizes["gpt2-xl"] == (1600, 48, 25)
    assert modelzoo.num_params(modelzoo.GPT2LMHeadModel(modelzoo.get_config("gpt2"))) == 124_439_808


def test_generation_is_the_uncached_argmax(params):
    """Greedy tokens of a padded row, through the cache and the head's transposed copy."""
    ids, mask = np.asarray(IDS).copy(), np.ones((2, 7), int)
    ids[0, :3], mask[0, :3] = 0, 0
    config = inference.GenerationConfig(max_new_tokens=4, pad_token_id=0, eos_token_id=None)
    out = inference.generate(MODEL, inference.prepare(MODEL, params), ids, mask, config)
    for row, start in ((0, 3), (1, 0)):
        tokens = list(ids[row, start:])
        for _ in range(4):
            logits = MODEL.apply({"params": params}, input_ids=jnp.asarray([tokens], jnp.int32)).logits
            tokens.append(int(jnp.argmax(logits[0, -1])))
        assert out.sequences[row, start:].tolist() == tokens
