"""What is particular to GPT-2. tests/parity holds every output to transformers."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import inference
import modelzoo
import train
from tests.house import ROOT
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
        (dict(summary_type="attn"), "GPT2Config.summary_type = 'attn': choose from"),
        (dict(summary_activation="swiglu"), "GPT2Config.summary_activation = 'swiglu': known are"),
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


def test_the_guide_to_porting_counts_its_lines():
    text = (ROOT / "docs/porting.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| \[(.+?gpt2.*?\.py)\]\(.+?\) \| (\d+) \|", text, re.MULTILINE)
    lines = {file: len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file, _ in found}
    assert len(found) == 4
    assert {file: int(count) for file, count in found} == lines
    assert f"{sum(lines[file] for file in lines if file.startswith('modelzoo'))} in the three files" in text


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


TWO_HEADS = modelzoo.GPT2DoubleHeadsModel(CONFIG)
CHOICES = np.random.default_rng(1).integers(4, 37, (2, 3, 7)).astype(np.int32)
PLACES = np.array([[6, 2, 4], [0, 5, 3]], np.int32)


@pytest.fixture(scope="module")
def two():
    return random_params(TWO_HEADS)


@quick_jit
def scored(params, **inputs):
    return TWO_HEADS.apply({"params": params}, output_hidden_states=True, **inputs)


def test_a_choice_is_scored_by_the_state_of_its_token(two):
    out = scored(two, input_ids=CHOICES, mc_token_ids=PLACES)
    states = np.take_along_axis(np.asarray(out.hidden_states[-1]), PLACES[..., None, None], axis=2)[:, :, 0]
    head = two["choice_head"]
    assert_close(out.mc_logits, states @ head["kernel"][:, 0] + head["bias"], 2e-6)
    assert out.logits.shape == (2, 3, 7, 37)
    trunk = {"trunk": two["trunk"]}
    assert_close(out.logits[1, 2], logits_of(trunk, input_ids=CHOICES[1, 2][None])[0], 2e-6)
    last = scored(two, input_ids=CHOICES).mc_logits
    assert_close(scored(two, input_ids=CHOICES, mc_token_ids=np.full_like(PLACES, 6)).mc_logits, last, 2e-6)
    assert np.abs(last - out.mc_logits).max() > 1e-2


def test_choices_are_rows(two):
    """Without their dimension, as embeddings, and with positions of each choice."""
    positions = np.broadcast_to(np.arange(2, 9), CHOICES.shape)
    inputs = dict(position_ids=positions, attention_mask=np.ones_like(CHOICES), token_type_ids=CHOICES[::-1])
    out = scored(two, input_ids=CHOICES, mc_token_ids=PLACES, **inputs)
    rows = {name: array.reshape(6, 7) for name, array in dict(inputs, input_ids=CHOICES).items()}
    apart = scored(two, mc_token_ids=PLACES.reshape(-1), **rows)
    assert apart.mc_logits.shape == (6,)
    assert_close(apart.mc_logits.reshape(2, 3), out.mc_logits, 0.0)
    assert_close(apart.logits.reshape(out.logits.shape), out.logits, 0.0)
    embeds = np.asarray(two["trunk"]["embed"]["embedding"])[CHOICES]
    embedded = scored(two, inputs_embeds=embeds, mc_token_ids=PLACES, **inputs)
    assert_close(embedded.mc_logits, out.mc_logits, 2e-6)
    bias = np.zeros((6, 1, 7, 7), np.float32)
    assert_close(
        scored(two, input_ids=CHOICES, attention_mask=bias).logits,
        scored(two, input_ids=CHOICES).logits,
        2e-6,
    )
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        TWO_HEADS.apply({"params": two}, mc_token_ids=PLACES)


def test_choices_go_through_a_cache(two):
    whole, cache = scored(two, input_ids=CHOICES), TWO_HEADS.init_cache(6, 8)
    first = scored(two, input_ids=CHOICES[..., :5], cache=cache)
    second = scored(two, input_ids=CHOICES[..., 5:], cache=first.cache)
    assert_close(jnp.concatenate([first.logits, second.logits], axis=2), whole.logits, 2e-6)
    assert_close(second.mc_logits, whole.mc_logits, 2e-6)


def test_both_heads_learn_from_their_labels(two):
    labels = np.where(PLACES[..., None] > 2, CHOICES, -100)
    batch = {"input_ids": CHOICES, "mc_token_ids": PLACES, "labels": labels, "mc_labels": np.array([2, 0])}
    out = scored(two, input_ids=CHOICES, mc_token_ids=PLACES)
    value, metrics = train.loss(TWO_HEADS, out, batch)
    assert_close(metrics["lm_loss"] + metrics["choice_loss"], value, 1e-6)
    alone, _ = train.loss(TWO_HEADS, out, batch | {"labels": np.full_like(CHOICES, -100)})
    assert_close(alone, metrics["choice_loss"], 0.0)
    with pytest.raises(
        ValueError, match="the batch has no 'mc_labels', which GPT2DoubleHeadsModel learns from"
    ):
        train.loss(TWO_HEADS, out, {"labels": CHOICES})


def test_two_heads_travel_by_files(two, params, tmp_path, caplog):
    """A class with one of them leaves the other out; one with both makes it new, and any tuning trains it."""
    modelzoo.to_hf(TWO_HEADS, two, tmp_path / "two")
    model, loaded = modelzoo.from_hf(tmp_path / "two")
    assert isinstance(model, modelzoo.GPT2DoubleHeadsModel)
    assert_equal(loaded, two)
    one = modelzoo.from_hf(tmp_path / "two", "GPT2LMHeadModel")[1]
    assert_equal(one, {"trunk": two["trunk"]})
    assert "GPT2LMHeadModel leaves out multiple_choice_head.summary" in caplog.text
    modelzoo.to_hf(MODEL, params, tmp_path / "one")
    model, made = modelzoo.from_hf(tmp_path / "one", "GPT2DoubleHeadsModel")
    assert_equal(made["trunk"], params["trunk"])
    assert "newly initialised, to be trained: multiple_choice_head.summary" in caplog.text
    tuned = modelzoo.trainable(
        modelzoo.tuned(model, modelzoo.Tuning(lora=modelzoo.Lora(rank=2, alpha=2, targets=".*/query/kernel")))
    )
    assert tuned["choice_head"] == {"bias": True, "kernel": True}
    assert not any(jax.tree.leaves(tuned["trunk"]["embed"]))


def test_text_is_generated_by_the_class_that_does():
    ids = np.ones((1, 3), int)
    with pytest.raises(
        ValueError, match="GPT2DoubleHeadsModel does not generate text: take .*GPT2LMHeadModel"
    ):
        inference.generate(TWO_HEADS, {}, ids, config=inference.GenerationConfig(max_new_tokens=2))
