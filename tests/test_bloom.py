"""What is particular to BLOOM. tests/parity holds every output to transformers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import inference
import modelzoo
from modelzoo.bloom.config import PRESETS
from tests.zoo import assert_close, quick_jit, random_params

CONFIG = modelzoo.BloomConfig(vocab_size=37, hidden_size=24, n_layer=2, n_head=3, pad_token_id=3)
MODEL = modelzoo.BloomForCausalLM(CONFIG)
IDS = jnp.asarray(np.random.default_rng(0).integers(4, 37, (2, 7)), jnp.int32)


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL)


@quick_jit
def logits_of(params, **inputs):
    return MODEL.apply({"params": params}, **inputs).logits


def test_positions_are_told_by_alibi_alone(params):
    """Tokens shifted right behind padding score the same; without ALiBi order would not matter at all."""
    mask = jnp.array([[0, 0, 1, 1, 1, 1, 1, 1, 1]] * 2)
    shifted = jnp.pad(IDS, ((0, 0), (2, 0)), constant_values=3)
    plain = logits_of(params, input_ids=IDS)
    assert_close(logits_of(params, input_ids=shifted, attention_mask=mask)[:, 2:], plain, 2e-6)
    swapped = IDS.at[:, 1].set(IDS[:, 2]).at[:, 2].set(IDS[:, 1])
    last = logits_of(params, input_ids=swapped)[:, -1]
    assert np.abs(last - plain[:, -1]).max() > 1e-3


def test_the_head_is_the_embedding_table(params):
    assert set(params) == {"trunk"}
    out = MODEL.apply({"params": params}, input_ids=IDS, output_hidden_states=True)
    table = params["trunk"]["embed"]["embedding"]
    np.testing.assert_allclose(out.logits, out.hidden_states[-1] @ table.T, atol=1e-5)


def test_an_untied_head_has_a_kernel_of_its_own():
    model = modelzoo.BloomForCausalLM(modelzoo.BloomConfig(vocab_size=37, tie_word_embeddings=False))
    assert modelzoo.abstract_params(model)["lm_head"]["kernel"].shape == (64, 37)


def test_the_residual_may_be_what_the_norm_returned(params):
    """With norms of scale 1 a residual after the norm is not the one before it."""
    config = dataclasses.replace(CONFIG, apply_residual_connection_post_layernorm=True)
    after = modelzoo.BloomForCausalLM(config).apply({"params": params}, input_ids=IDS).logits
    assert np.abs(after - logits_of(params, input_ids=IDS)).max() > 0.1


def test_a_4d_mask_says_what_is_visible_and_alibi_counts_every_slot(params):
    causal = jnp.where(jnp.tril(jnp.ones((7, 7), bool)), 0.0, jnp.finfo(jnp.float32).min)[None, None]
    assert_close(
        logits_of(params, input_ids=IDS, attention_mask=causal), logits_of(params, input_ids=IDS), 2e-6
    )


def test_there_are_no_positions_and_no_types(params):
    assert not {"position_ids", "token_type_ids"} & modelzoo.input_names(MODEL)
    with pytest.raises(TypeError, match="position_ids"):
        MODEL.apply({"params": params}, input_ids=IDS, position_ids=IDS)
    assert MODEL.init_cache(1, 10_000).mask.shape == (1, 10_000)  # no longest sequence


def test_generation_is_the_uncached_argmax(params):
    """Greedy tokens of padded rows, through the cache and the head's transposed copy."""
    ids = np.asarray(IDS).copy()
    mask = np.ones_like(ids)
    ids[0, :3], mask[0, :3] = 3, 0
    config = inference.GenerationConfig(max_new_tokens=4, pad_token_id=3)
    prepared = inference.prepare(MODEL, params)
    assert prepared["lm_head"]["kernel"].shape == (24, 37)
    assert inference.prepare(MODEL, prepared)["lm_head"]["kernel"] is prepared["lm_head"]["kernel"]
    out = inference.generate(MODEL, prepared, ids, mask, config=config)
    for _ in range(4):
        logits = logits_of(params, input_ids=jnp.asarray(ids), attention_mask=jnp.asarray(mask))
        ids = np.concatenate([ids, np.argmax(logits[:, -1:], -1)], axis=1)
        mask = np.concatenate([mask, np.ones((2, 1), int)], axis=1)
    np.testing.assert_array_equal(np.asarray(out.sequences), ids)


def test_published_sizes():
    """From the papers' and the files' own counts."""
    counts = {
        name: modelzoo.num_params(modelzoo.BloomForCausalLM(config))
        for name, config in PRESETS.items()
        if not name.startswith("tiny")
    }
    assert counts == {
        "bloom-560m": 559_214_592,
        "bloom-1b1": 1_065_314_304,
        "bloom-1b7": 1_722_408_960,
        "bloom-3b": 3_002_557_440,
        "bloom-7b1": 7_069_016_064,
        "bloom-176b": 176_247_271_424,
    }


def test_config_files_spell_the_sizes_in_several_ways():
    published = {
        "model_type": "bloom",
        "n_embed": 48,
        "n_layer": 3,
        "num_attention_heads": 6,
        "hidden_size": 64,
    }
    config = modelzoo.BloomConfig.from_hf(published)
    assert (config.hidden_size, config.n_layer, config.n_head) == (48, 3, 6)
    assert modelzoo.BloomConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(hidden_size=65), "n_head = 8 does not divide it"),
        (dict(n_layer=0), "n_layer = 0"),
        (dict(hidden_dropout=1.0), r"lies in \[0, 1\)"),
        (dict(classifier_dropout=-0.1), "classifier_dropout = -0.1"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        modelzoo.BloomConfig(**fields)


def test_the_token_classifiers_dropout():
    assert modelzoo.BloomConfig(hidden_dropout=0.3).head_dropout == 0.3
    assert modelzoo.BloomConfig(hidden_dropout=0.3, classifier_dropout=0.0).head_dropout == 0.0


def test_on_a_mesh_the_table_lies_by_vocabulary(params):
    import parallel

    rules = parallel.make_rules(parallel.make_mesh(fsdp=2, tensor=2, data=2))
    model = modelzoo.BloomForCausalLM(
        modelzoo.BloomConfig(vocab_size=37, hidden_size=32, n_head=4, pad_token_id=3)
    )
    whole = random_params(model)
    expected = model.apply({"params": whole}, input_ids=IDS).logits
    sharded = parallel.shard_params(whole, model, rules)
    assert sharded["trunk"]["embed"]["embedding"].shape == (38, 32)
    with parallel.use(rules):
        logits = jax.jit(lambda p, x: model.apply({"params": p}, input_ids=x).logits)(sharded, IDS)
    assert np.isneginf(logits[..., 37:]).all()
    assert_close(logits[..., :37], expected, 2e-6)
