"""What RoBERTa and MegatronBERT share: decoding, cross-attention, poolers, files, configs. Parity is tests/parity's."""

import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import modelzoo
from modelzoo.bert import POSITION_TYPES
from tests.zoo import assert_close, assert_equal, quick_jit, random_params

FAMILIES = ("Roberta", "MegatronBert")
SIZES: dict[str, Any] = dict(
    vocab_size=37,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=31,
    max_position_embeddings=20,
)
both_families = pytest.mark.parametrize("family", FAMILIES)


def config_of(family: str, **fields: Any) -> Any:
    return getattr(modelzoo, f"{family}Config")(**SIZES | fields)


def build(name: str, **fields: Any) -> Any:
    """A class with every size its own, and its parameters."""
    family = next(family for family in FAMILIES if name.startswith(family))
    model = modelzoo.get_model_class(name)(config_of(family, **fields))
    return model, random_params(model)


@functools.partial(quick_jit, static_argnums=0, static_argnames=("logits_to_keep",))
def _forward(model, params, inputs, **flags):
    flags = dict(output_hidden_states=True, output_attentions=True) | flags
    return model.apply({"params": params}, **inputs, **flags)


def forward(model: Any, params: Any, flags: Any = None, **inputs: Any) -> Any:
    return _forward(model, params, inputs, **flags or {})


def ids(rows: int = 3, length: int = 9, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(3, 37, (rows, length)), jnp.int32)


def padded(family: str, padding: int) -> tuple[jax.Array, jax.Array]:
    """(ids, mask): the first row padded on the left."""
    mask = jnp.ones((3, 9), jnp.int32).at[0, :padding].set(0)
    return jnp.where(mask == 0, config_of(family).pad_token_id, ids()), mask


def states(length: int = 6) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(3, length, 24)), jnp.float32)


class TestDecoding:
    @both_families
    @pytest.mark.parametrize(
        ("positions", "chunks", "layers_apart", "padding"),
        [
            ("absolute", [1] * 9, True, 2),
            pytest.param("relative_key", [5, 4], True, 0, marks=pytest.mark.long),
            ("relative_key_query", [7, 1, 1], False, 3),
        ],
        ids=POSITION_TYPES,
    )
    def test_cached_is_uncached(self, family, positions, chunks, layers_apart, padding):
        """An encoder's states are passed once, its mask every time; no positions are passed, and rows are padded."""
        model, params = build(
            f"{family}ForCausalLM",
            is_decoder=True,
            add_cross_attention=True,
            position_embedding_type=positions,
        )
        tokens, mask = padded(family, padding)
        encoder = dict(encoder_attention_mask=jnp.ones((3, 6), jnp.int32).at[1, 4:].set(0))
        expected = forward(
            model, params, input_ids=tokens, attention_mask=mask, encoder_hidden_states=states(), **encoder
        )
        cache, start, outs = model.init_cache(3, 11), 0, []
        if layers_apart:
            params, cache = modelzoo.unstack_layers(params), modelzoo.unstack_layers(cache)
        given = dict(encoder_hidden_states=states())
        for size in chunks:
            now = dict(
                input_ids=tokens[:, start : start + size], attention_mask=mask[:, start : start + size]
            )
            out = forward(model, params, **now, **encoder, **given, cache=cache)
            cache, start, given = out.cache, start + size, {}
            outs.append(out)
        real = np.asarray(mask, bool)
        logits = jnp.concatenate([out.logits for out in outs], axis=1)
        scale = max(1.0, float(jnp.abs(expected.logits).max()))
        np.testing.assert_allclose(logits[real], expected.logits[real], atol=2e-6 * scale)
        for layer in range(2):
            probs = jnp.concatenate([out.cross_attentions[layer] for out in outs], axis=2).swapaxes(1, 2)
            want = expected.cross_attentions[layer].swapaxes(1, 2)
            np.testing.assert_allclose(probs[real], want[real], atol=2e-6)

    @both_families
    def test_without_an_encoder_there_is_no_cross_attention(self, family):
        """Though there are weights for it: with a cache, too."""
        model, params = build(f"{family}Model", is_decoder=True, add_cross_attention=True)
        alone = model.clone(config=config_of(family, is_decoder=True))
        expected = forward(alone, params, input_ids=ids())
        out = forward(model, params, input_ids=ids())
        assert out.cross_attentions is None
        assert_equal(out, expected)
        cached = forward(model, params, input_ids=ids(), cache=model.init_cache(3, 9))
        assert cached.cache.cross is None
        assert_close(cached.last_hidden_state, expected.last_hidden_state, 2e-6 * 5)

    @both_families
    def test_a_later_token_changes_no_earlier_one(self, family):
        for is_decoder in (True, False):
            model, params = build(f"{family}ForCausalLM", is_decoder=is_decoder)
            before = forward(model, params, input_ids=ids()).logits
            after = forward(model, params, input_ids=ids().at[:, 5].set(2)).logits
            apart = np.abs(after - before).max((0, 2))
            assert apart[5] > 1e-3
            assert (apart[:5].max() == 0) == is_decoder

    @both_families
    @pytest.mark.parametrize("keep", [1, 4])
    def test_logits_of_the_last_positions(self, family, keep):
        model, params = build(f"{family}ForCausalLM", is_decoder=True)
        whole = forward(model, params, input_ids=ids()).logits
        some = forward(model, params, dict(logits_to_keep=keep), input_ids=ids()).logits
        np.testing.assert_allclose(some, whole[:, -keep:], atol=1e-5)

    @both_families
    def test_what_does_not_go_together(self, family):
        encoder, params = build(f"{family}Model")
        with pytest.raises(ValueError, match="a cache is a decoder's.*set is_decoder"):
            forward(encoder, params, input_ids=ids(), cache=encoder.init_cache(3, 9))
        given = dict(input_ids=ids(), encoder_hidden_states=states())
        assert_equal(forward(encoder, params, **given), forward(encoder, params, input_ids=ids()))
        decoder = encoder.clone(config=config_of(family, is_decoder=True))
        with pytest.raises(
            ValueError, match="encoder_hidden_states need cross-attention: set add_cross_attention"
        ):
            forward(decoder, params, **given)


class TestPositions:
    @both_families
    @pytest.mark.parametrize("kind", POSITION_TYPES[1:])
    def test_relative_ones_do_not_depend_on_where_a_row_begins(self, family, kind):
        model, params = build(f"{family}Model", position_embedding_type=kind)
        mask = jnp.ones((3, 12), jnp.int32).at[:, :3].set(0)
        shifted = jnp.pad(ids(), ((0, 0), (3, 0)), constant_values=2)
        plain = forward(model, params, input_ids=ids()).last_hidden_state
        moved = forward(model, params, input_ids=shifted, attention_mask=mask).last_hidden_state[:, 3:]
        assert_close(moved, plain, 1e-5)
        turned = forward(model, params, input_ids=ids()[:, ::-1]).last_hidden_state[:, ::-1]
        assert np.abs(turned - plain).max() > 0.1  # order does matter

    @both_families
    def test_their_table_is_kept_though_unread(self, family):
        model, params = build(f"{family}Model", position_embedding_type="relative_key")
        assert params["embed_positions"]["embedding"].shape == (20, 24)
        assert params["layers"]["attention"]["distance"].shape == (2, 39, 8)
        other = dict(params, embed_positions={"embedding": params["embed_positions"]["embedding"] + 1.0})
        out, changed = (forward(model, p, input_ids=ids()).last_hidden_state for p in (params, other))
        assert_equal(out, changed)

    @both_families
    def test_of_ones_own(self, family):
        """Tokens told to stand elsewhere; one position for all rows."""
        model, params = build(f"{family}Model")
        plain = forward(model, params, input_ids=ids()).last_hidden_state
        first = getattr(model.config, "first_position", 0)
        same = forward(model, params, input_ids=ids(), position_ids=first + jnp.arange(9)[None])
        assert_close(same.last_hidden_state, plain, 1e-6)
        assert (
            np.abs(
                forward(model, params, input_ids=ids(), position_ids=ids() % 20).last_hidden_state - plain
            ).max()
            > 0.1
        )
        wrong = forward(model, params, input_ids=ids(), position_ids=jnp.full((1, 9), 20))
        assert np.isnan(wrong.last_hidden_state).all()


class TestPooler:
    @both_families
    def test_a_trunk_may_have_none(self, family):
        model, params = build(f"{family}Model")
        out = forward(model, params, input_ids=ids())
        dense = params["pooler"]["dense"]
        pooled = jnp.tanh(out.last_hidden_state[:, 0] @ dense["kernel"] + dense["bias"])
        assert_close(out.pooler_output, pooled, 1e-5)
        without = model.clone(add_pooling_layer=False)
        assert forward(without, params, input_ids=ids()).pooler_output is None
        assert modelzoo.num_params(model) - modelzoo.num_params(without) == 24 * 25

    @both_families
    def test_tasks_have_one_where_they_read_it(self, family):
        read = {
            "ForMultipleChoice",
            "ForSequenceClassification",
            "ForNextSentencePrediction",
            "ForPreTraining",
        }
        read -= {"ForSequenceClassification"} if family == "Roberta" else set()
        classes = modelzoo.get_family({"Roberta": "roberta"}.get(family, "megatron-bert")).classes[1:]
        having = {
            cls for cls in classes if "pooler" in modelzoo.abstract_params(cls(config_of(family)))["trunk"]
        }
        assert {cls.__name__.removeprefix(family) for cls in having} == read & {
            cls.__name__.removeprefix(family) for cls in classes
        }

    @both_families
    def test_choices_are_rows_of_their_own(self, family):
        model, params = build(f"{family}ForMultipleChoice")
        choices = jnp.stack([ids(seed=seed) for seed in range(4)], axis=1)
        mask = jnp.ones_like(choices).at[:, :, 7:].set(0)
        together = forward(model, params, input_ids=choices, attention_mask=mask)
        assert together.logits.shape == (3, 4)
        assert together.hidden_states[0].shape == (12, 9, 24)
        for i in range(4):
            alone = forward(model, params, input_ids=choices[:, i : i + 1], attention_mask=mask[:, i : i + 1])
            assert_close(alone.logits[:, 0], together.logits[:, i], 1e-5)


class TestFiles:
    @both_families
    def test_a_trunk_from_a_language_model_has_no_pooler(self, family, tmp_path, caplog):
        model, params = build(f"{family}ForMaskedLM")
        modelzoo.to_hf(model, params, tmp_path)
        with caplog.at_level(logging.WARNING, logger="modelzoo.hf"):
            trunk, loaded = modelzoo.from_hf(tmp_path, f"{family}Model")
        assert f"{family}Model without a pooler, which the checkpoint does not have" in caplog.text
        assert trunk.add_pooling_layer is False
        assert_equal(loaded, params["trunk"])

    @both_families
    def test_a_trunk_saved_without_a_pooler_opens_without(self, family, tmp_path):
        model, params = build(f"{family}Model")
        for has_pooler in (True, False):
            some = model.clone(add_pooling_layer=has_pooler)
            want = {name: leaf for name, leaf in params.items() if has_pooler or name != "pooler"}
            modelzoo.to_hf(some, want, tmp_path / str(has_pooler))
            again, loaded = modelzoo.from_hf(tmp_path / str(has_pooler))
            assert again.add_pooling_layer == has_pooler
            assert_equal(loaded, want)

    @both_families
    def test_a_classifier_from_a_language_model_creates_its_pooler(self, family, tmp_path, caplog):
        model, params = build(f"{family}ForMaskedLM")
        modelzoo.to_hf(model, params, tmp_path)
        with caplog.at_level(logging.WARNING, logger="modelzoo.hf"):
            _, loaded = modelzoo.from_hf(tmp_path, f"{family}ForMultipleChoice")
        assert "newly initialised, to be trained: " in caplog.text
        assert "pooler.dense.weight" in caplog.text
        assert "classifier.weight" in caplog.text
        pooler = loaded["trunk"].pop("pooler")["dense"]
        assert_equal(loaded["trunk"], params["trunk"])
        assert not pooler["bias"].any()
        assert 0.01 < pooler["kernel"].std() < 0.03

    @both_families
    def test_half_a_pooler_is_an_error(self, family, tmp_path):
        model, params = build(f"{family}Model")
        modelzoo.to_hf(model, params, tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        del tensors["pooler.dense.bias"]
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="1 missing, such as pooler.dense.bias"):
            modelzoo.from_hf(tmp_path)

    @both_families
    @pytest.mark.parametrize("prefixed", [True, False])
    def test_names_of_other_times(self, family, prefixed, tmp_path):
        """Norms as gamma and beta, buffers, a tied head's copies, the trunk with its prefix or without."""
        model, params = build(f"{family}ForMaskedLM")
        modelzoo.to_hf(model, params, tmp_path)
        prefix, decoder = (
            ("roberta.", "lm_head.decoder.") if family == "Roberta" else ("bert.", "cls.predictions.decoder.")
        )
        norms = (
            "LayerNorm.weight",
            "LayerNorm.bias",
            ".ln.weight",
            ".ln.bias",
            "layer_norm.weight",
            "layer_norm.bias",
        )
        old = {}
        for name, tensor in load_file(tmp_path / "model.safetensors").items():
            if name.endswith(norms):
                name = name.removesuffix(".weight").removesuffix(".bias") + (
                    ".gamma" if name.endswith("weight") else ".beta"
                )
            if name == decoder.replace("decoder.", "bias"):
                name = f"{decoder}bias"
            old[name if prefixed else name.removeprefix(prefix)] = tensor
        assert any(name.endswith("gamma") for name in old)
        trunk = prefix if prefixed else ""
        old[f"{trunk}embeddings.position_ids"] = np.arange(20)[None]
        old[f"{decoder}weight"] = old[f"{trunk}embeddings.word_embeddings.weight"]
        save_file(old, tmp_path / "model.safetensors")
        assert_equal(modelzoo.from_hf(tmp_path)[1], params)

    @both_families
    def test_an_untied_head_must_be_there(self, family, tmp_path):
        model, params = build(f"{family}ForMaskedLM", tie_word_embeddings=False)
        assert params["lm_head"]["kernel"].shape == (24, 37)
        modelzoo.to_hf(model, params, tmp_path)
        assert_equal(modelzoo.from_hf(tmp_path)[1], params)
        tensors = load_file(tmp_path / "model.safetensors")
        biases = [
            tensors[name] for name in tensors if name.endswith(("lm_head.bias", "s.bias", "decoder.bias"))
        ]
        assert len(biases) == 2  # transformers 5 reads the one, 4 the other
        assert_equal(*biases)
        name = next(name for name in tensors if name.endswith("decoder.weight"))
        save_file(
            {key: value for key, value in tensors.items() if key != name}, tmp_path / "model.safetensors"
        )
        with pytest.raises(ValueError, match=f"1 missing, such as {name}"):
            modelzoo.from_hf(tmp_path)


class TestPadding:
    @both_families
    def test_its_row_learns_from_the_head_alone(self, family):
        """A lookup of padding trains nothing; the scores of a tied head do."""
        tokens, mask = padded(family, 3)
        padding = config_of(family).pad_token_id

        def gradient(tied: bool) -> Any:
            fields = dict(tie_word_embeddings=tied, num_hidden_layers=1)
            model, params = build(f"{family}ForMaskedLM", **fields)

            def loss(params):
                out = model.apply({"params": params}, input_ids=tokens, attention_mask=mask)
                return jnp.sum(jnp.square(out.logits))

            return quick_jit(jax.grad(loss))(params)["trunk"]["embed"]["embedding"]

        untied, tied = gradient(False), gradient(True)
        assert (untied[padding] == 0).all()
        assert (tied[padding] != 0).all()
        assert (untied[tokens[1, 0]] != 0).any()


class TestConfig:
    @both_families
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            *(({name: 0}, rf"{name} = 0: it is a size") for name in SIZES),
            (dict(type_vocab_size=0), "type_vocab_size = 0: it is a size"),
            (dict(num_attention_heads=5), "hidden_size = 24: num_attention_heads = 5 does not divide it"),
            (dict(pad_token_id=37), "pad_token_id = 37: it is an id below vocab_size = 37"),
            (dict(pad_token_id=-1), "pad_token_id = -1: it is an id"),
            (dict(position_embedding_type="rotary"), "position_embedding_type = 'rotary': choose from"),
            (
                dict(add_cross_attention=True),
                "add_cross_attention = True: only a decoder attends to an encoder",
            ),
            (dict(hidden_act="geloo"), "unknown activation 'geloo'"),
            (dict(hidden_dropout_prob=1.0), r"hidden_dropout_prob = 1.0: .* \[0, 1\)"),
            (dict(attention_probs_dropout_prob=-0.1), r"attention_probs_dropout_prob = -0.1: .* \[0, 1\)"),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else "",
    )
    def test_a_value_that_cannot_be_names_its_field(self, family, fields, message):
        with pytest.raises(ValueError, match=message):
            config_of(family, **fields)

    @both_families
    def test_files(self, family):
        config = config_of(family, is_decoder=True, add_cross_attention=True, num_labels=4)
        assert type(config).from_hf(config.to_hf()) == config
        assert dataclasses.replace(config, position_embedding_type="relative_key").relative == "relative_key"
        assert (config.relative, config.head_dim, config.cache_heads) == (None, 8, (3, 8))
