"""What is particular to MegatronBERT: where its norms stand, relative cross-attention. Parity is tests/parity's."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import modelzoo
from tests.zoo import assert_close, assert_equal, quick_jit, random_params

SIZES: dict[str, Any] = dict(
    vocab_size=37,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=31,
    max_position_embeddings=12,
)
CROSSING: dict[str, Any] = dict(
    is_decoder=True, add_cross_attention=True, position_embedding_type="relative_key"
)
IDS = jnp.asarray(np.random.default_rng(0).integers(1, 37, (2, 7)), jnp.int32)


def build(name: str, **fields: Any) -> Any:
    model = modelzoo.get_model_class(f"MegatronBert{name}")(modelzoo.MegatronBertConfig(**SIZES | fields))
    return model, random_params(model)


def run(model: Any, params: Any, **inputs: Any) -> Any:
    apply = quick_jit(
        lambda p, x: model.apply({"params": p}, **x, output_hidden_states=True, output_attentions=True)
    )
    return apply(params, inputs)


def norm(x: Any, scale: Any, bias: Any) -> Any:
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-12)
    return x * scale + bias


def test_embeddings_have_no_norm_and_the_stack_ends_with_one():
    """Nor the states in between: with silent layers the first is the last one's input."""
    model, params = build("Model")
    silent = {name: dict(params["layers"][name]) for name in params["layers"]}
    silent["attention"]["out"] = {key: leaf * 0 for key, leaf in silent["attention"]["out"].items()}
    silent["mlp"]["fc_out"] = {key: leaf * 0 for key, leaf in silent["mlp"]["fc_out"].items()}
    out = run(model, dict(params, layers=silent), input_ids=IDS)
    tables = (params[name]["embedding"] for name in ("embed", "embed_types", "embed_positions"))
    embedded = sum(table[at] for table, at in zip(tables, (IDS, 0, jnp.arange(7)), strict=True))
    assert_close(out.hidden_states[0], embedded, 1e-6)
    assert_close(out.hidden_states[1], embedded, 1e-6)
    assert_close(out.last_hidden_state, norm(embedded, **params["final_norm"]), 1e-5)
    assert_equal(out.hidden_states[2], out.last_hidden_state)


def test_pretraining_is_both_heads_on_one_trunk():
    model, params = build("ForPreTraining", hidden_act="silu")
    out = run(model, params, input_ids=IDS)
    assert (out.prediction_logits.shape, out.seq_relationship_logits.shape) == ((2, 7, 37), (2, 2))
    masked, _ = build("ForMaskedLM", hidden_act="silu")
    assert_close(run(masked, params, input_ids=IDS).logits, out.prediction_logits, 1e-6)
    follows, _ = build("ForNextSentencePrediction", hidden_act="silu")
    assert_close(run(follows, params, input_ids=IDS).logits, out.seq_relationship_logits, 1e-6)


class TestRelativeCrossAttention:
    def test_order_among_the_encoders_states_matters(self):
        """Without relative positions a set of states is the same in any order."""
        states = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 24)), jnp.float32)
        apart = {}
        for kind in ("absolute", "relative_key", "relative_key_query"):
            model, params = build("Model", **CROSSING | dict(position_embedding_type=kind))
            assert ("distance" in params["layers"]["cross_attention"]) == (kind != "absolute")
            forth, back = (
                run(model, params, input_ids=IDS, encoder_hidden_states=x).last_hidden_state
                for x in (states, states[:, ::-1])
            )
            apart[kind] = np.abs(forth - back).max()
        assert apart["absolute"] < 1e-5
        assert min(apart["relative_key"], apart["relative_key_query"]) > 0.05

    def test_no_distance_is_too_long(self):
        model, params = build("Model", **CROSSING)
        longest = jnp.zeros((2, 12, 24))
        assert (
            run(model, params, input_ids=IDS, encoder_hidden_states=longest).cross_attentions[0].shape[-1]
            == 12
        )
        with pytest.raises(ValueError, match="13 tokens are more than the model's positions = 12"):
            run(model, params, input_ids=IDS, encoder_hidden_states=jnp.zeros((2, 13, 24)))
        absolute, params = build("Model", **CROSSING | dict(position_embedding_type="absolute"))
        run(absolute, params, input_ids=IDS, encoder_hidden_states=jnp.zeros((2, 13, 24)))

    def test_head_masks_reach_it(self):
        model, params = build("Model", **CROSSING)
        given = dict(input_ids=IDS, encoder_hidden_states=jnp.ones((2, 5, 24)))
        out = run(model, params, head_mask=jnp.array([[0.0, 2.0, 1.0], [1.0, 1.0, 0.0]]), **given)
        assert (out.cross_attentions[0][:, 0] == 0).all()
        assert (out.cross_attentions[1][:, 2] == 0).all()
        np.testing.assert_allclose(out.cross_attentions[0].sum(-1)[:, 1:].mean((0, 2)), [2.0, 1.0], rtol=1e-5)


def test_positions_end_with_the_table():
    model, params = build("ForCausalLM", is_decoder=True)
    with pytest.raises(ValueError, match="13 tokens are more than the model's positions = 12"):
        run(model, params, input_ids=jnp.ones((1, 13), jnp.int32))
    with pytest.raises(ValueError, match="max_length 13 is past the 12 positions"):
        model.init_cache(1, 13)


def test_a_padding_token_is_no_must():
    model, params = build("ForMaskedLM", pad_token_id=None)
    assert run(model, params, input_ids=IDS).logits.shape == (2, 7, 37)


def test_published_sizes():
    config = modelzoo.get_config("megatron-bert-345m")
    assert modelzoo.num_params(modelzoo.MegatronBertModel(config)) == 333_640_704
    assert modelzoo.num_params(modelzoo.MegatronBertForPreTraining(config)) == 334_723_458
