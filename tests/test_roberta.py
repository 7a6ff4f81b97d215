"""What is particular to RoBERTa: positions counted from the padding token, its heads. Parity is tests/parity's."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import modelzoo
from tests.zoo import assert_close, quick_jit, random_params

CONFIG = modelzoo.RobertaConfig(
    vocab_size=37,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=31,
    max_position_embeddings=14,
    pad_token_id=4,
)
IDS = jnp.asarray(np.random.default_rng(0).integers(5, 37, (2, 7)), jnp.int32)
MODEL: Any = modelzoo.RobertaModel(CONFIG)


def replaced(**fields: Any) -> modelzoo.RobertaConfig:
    return modelzoo.RobertaConfig(**{**CONFIG.__dict__, **fields})


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL)


@quick_jit
def states_of(params, **inputs):
    return MODEL.apply({"params": params}, **inputs).last_hidden_state


class TestPositions:
    def test_are_counted_from_after_the_padding_token(self, params):
        expected = states_of(params, input_ids=IDS)
        positions = jnp.arange(5, 12)[None]
        assert_close(states_of(params, input_ids=IDS, position_ids=positions), expected, 0.0)

    @pytest.mark.parametrize("padding", [(2, 0), (0, 2)], ids=["left", "right"])
    def test_of_a_padded_row_are_those_of_the_row(self, params, padding):
        ids = jnp.pad(IDS, ((0, 0), padding), constant_values=4)
        mask = jnp.pad(jnp.ones_like(IDS), ((0, 0), padding))
        states = states_of(params, input_ids=ids, attention_mask=mask)
        assert_close(states[:, padding[0] : padding[0] + 7], states_of(params, input_ids=IDS), 2e-6 * 5)

    def test_padding_inside_is_not_counted(self, params):
        ids = IDS.at[:, 3].set(4)
        positions = jnp.array([[5, 6, 7, 4, 8, 9, 10]])
        assert_close(
            states_of(params, input_ids=ids), states_of(params, input_ids=ids, position_ids=positions), 0.0
        )

    def test_of_embeddings_count_every_place(self, params):
        embeds = params["embed"]["embedding"][IDS.at[:, 3].set(4)]
        positions = jnp.arange(5, 12)[None]
        given = states_of(params, inputs_embeds=embeds, position_ids=positions)
        assert_close(states_of(params, inputs_embeds=embeds), given, 0.0)

    def test_go_on_where_a_row_stopped(self):
        """By tokens, not by slots: a padded row decodes as if it stood alone. Embeddings go on by slots."""
        model: Any = modelzoo.RobertaModel(replaced(is_decoder=True))
        params = random_params(model)
        ids = IDS.at[0, :2].set(4)
        mask = jnp.ones_like(IDS).at[0, :2].set(0)
        run = quick_jit(lambda params, **inputs: model.apply({"params": params}, **inputs))
        whole = run(params, input_ids=ids, attention_mask=mask).last_hidden_state
        first = run(params, input_ids=ids[:, :5], attention_mask=mask[:, :5], cache=model.init_cache(2, 8))
        then = run(params, input_ids=ids[:, 5:], attention_mask=mask, cache=first.cache)
        assert_close(then.last_hidden_state, whole[:, 5:], 2e-6 * 5)

        embeds = params["embed"]["embedding"][IDS]
        whole = run(params, inputs_embeds=embeds).last_hidden_state
        first = run(params, inputs_embeds=embeds[:, :5], cache=model.init_cache(2, 8))
        then = run(params, inputs_embeds=embeds[:, 5:], cache=first.cache)
        assert_close(then.last_hidden_state, whole[:, 5:], 2e-6 * 5)

    def test_longest_sequence(self):
        """The table's rows up to the padding token's are no positions of tokens."""
        assert CONFIG.max_positions == 9
        assert replaced(position_embedding_type="relative_key").max_positions == 14
        ids = jnp.full((1, 10), 7)
        init = jax.eval_shape(lambda: MODEL.init(jax.random.key(0), input_ids=ids[:, :9]))
        assert init["params"]["embed_positions"]["embedding"].value.shape == (14, 24)
        with pytest.raises(ValueError, match="10 tokens are more than the model's positions = 9"):
            jax.eval_shape(lambda: MODEL.init(jax.random.key(0), input_ids=ids))
        with pytest.raises(ValueError, match="max_length 10 is past the 9 positions"):
            MODEL.init_cache(1, 10)
        with pytest.raises(ValueError, match="max_position_embeddings = 5: positions begin at 5"):
            replaced(max_position_embeddings=5)
        with pytest.raises(ValueError, match="pad_token_id = None: positions are counted from it"):
            replaced(pad_token_id=None)

    def test_padding_rows_are_zero_and_stay_so(self, rng):
        params = quick_jit(MODEL.init)(rng, input_ids=IDS)["params"]
        for table in ("embed", "embed_positions"):
            rows = params[table]["embedding"].value
            assert (rows[4] == 0).all()
            assert (rows[5:] != 0).any(axis=1).all()
            assert (rows[:4] != 0).any(axis=1).all()
        ids, mask = IDS.at[:, :3].set(4), jnp.ones_like(IDS)  # attended to, so that a gradient could come

        def loss(params):
            out = MODEL.apply({"params": params}, input_ids=ids, attention_mask=mask)
            return jnp.sum(jnp.square(out.last_hidden_state))

        gradients = quick_jit(jax.grad(loss))(random_params(MODEL))
        for table, other in (("embed", IDS[0, 3]), ("embed_positions", 5)):
            rows = gradients[table]["embedding"]
            assert (rows[4] == 0).all()
            assert (rows[other] != 0).any()


class TestHeads:
    def test_dropout_of_classifiers(self):
        """`classifier_dropout` is for sequences and tokens; multiple choice has the trunk's."""
        for rate, want in ((None, 0.2), (0.0, 0.0), (0.4, 0.4)):
            config = replaced(hidden_dropout_prob=0.2, classifier_dropout=rate)
            assert modelzoo.RobertaForSequenceClassification(config).head_dropout == want
            assert modelzoo.RobertaForTokenClassification(config).head_dropout == want
            assert modelzoo.RobertaForMultipleChoice(config).head_dropout == 0.2
        with pytest.raises(ValueError, match="classifier_dropout = 1.5"):
            replaced(classifier_dropout=1.5)

    def test_the_lm_heads_activation_is_gelu(self):
        model: Any = modelzoo.RobertaForMaskedLM(replaced(hidden_act="relu"))
        params = random_params(model)
        out = quick_jit(lambda p: model.apply({"params": p}, input_ids=IDS, output_hidden_states=True))(
            params
        )
        head, table = params["lm_head"], params["trunk"]["embed"]["embedding"]
        x = out.hidden_states[-1] @ head["dense"]["kernel"] + head["dense"]["bias"]
        x = jax.nn.gelu(x, approximate=False)
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + CONFIG.layer_norm_eps)
        logits = (x * head["norm"]["scale"] + head["norm"]["bias"]) @ table.T + head["bias"]
        assert_close(out.logits, logits, 2e-5)

    def test_a_sequence_is_classified_by_its_first_token(self):
        model: Any = modelzoo.RobertaForSequenceClassification(replaced(num_labels=3))
        params = random_params(model)
        out = quick_jit(lambda p: model.apply({"params": p}, input_ids=IDS, output_hidden_states=True))(
            params
        )
        head = params["classifier"]
        x = jnp.tanh(out.hidden_states[-1][:, 0] @ head["dense"]["kernel"] + head["dense"]["bias"])
        assert_close(out.logits, x @ head["out"]["kernel"] + head["out"]["bias"], 1e-5)


def test_published_sizes():
    base, large = (
        modelzoo.num_params(modelzoo.RobertaForMaskedLM(modelzoo.get_config(f"roberta-{size}")))
        for size in ("base", "large")
    )
    assert (base, large) == (124_697_433, 355_412_057)
    assert modelzoo.get_config("roberta-large").max_positions == 512
