"""What is particular to MVP; tests/parity holds every output to transformers, tests/test_mvp_files.py has its files."""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import modelzoo
import parallel
from modelzoo import weights
from modelzoo.layers.stack import is_unstacked
from modelzoo.mvp.inputs import shift_right
from modelzoo.mvp.stacks import MvpDecoder
from modelzoo.outputs import BaseModelOutput
from tests.zoo import (
    assert_close,
    assert_close_relative,
    leaves_by_name,
    quick_jit,
    random_params,
    tiny_mvp,
    vector_jit,
)

START, PAD, END = 9, 1, 2
MODEL: Any = modelzoo.MvpForConditionalGeneration(tiny_mvp())
PARAMS = random_params(MODEL)
IDS = jnp.asarray(np.random.default_rng(0).integers(3, 37, (3, 8)), jnp.int32).at[:, -1].set(END)
DECODER_IDS = jnp.asarray(np.random.default_rng(1).integers(3, 37, (3, 6)), jnp.int32)
MASK = jnp.ones((3, 8), jnp.int32).at[0, 5:].set(0).at[1, :2].set(0)
BOTH = {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": DECODER_IDS}


@functools.partial(quick_jit, static_argnums=0, static_argnames=("deterministic",))
def forward(model: Any, params: Any, inputs: Any, rngs: Any = None, **flags: Any) -> Any:
    flags = dict(output_hidden_states=True, output_attentions=True) | flags
    return model.apply({"params": params}, **inputs, **flags, rngs=rngs)


in_the_same_roundings = vector_jit(forward.__wrapped__, static_argnums=0)
"""`forward` for bitwise comparisons: at level 0 XLA rounds the same sums of two programs in two ways."""


def shape_of(model: Any, **inputs: Any) -> Any:
    """A call that is traced and never computed: for errors."""
    params = modelzoo.abstract_params(model)
    return jax.eval_shape(lambda p, some: model.apply({"params": p}, **some), params, inputs)


@pytest.fixture(scope="module")
def expected():
    return forward(MODEL, PARAMS, BOTH)


class TestDecoderInputs:
    def test_shift(self):
        labels = np.array([[5, -100, 7, 8], [-100, -100, 4, END]])
        shifted = shift_right(labels, MODEL.config)
        np.testing.assert_array_equal(shifted, [[START, 5, PAD, 7], [START, PAD, PAD, 4]])
        assert shifted.dtype == jnp.int32

    @pytest.mark.parametrize("source", ["labels", "input_ids"])
    def test_without_its_own_the_decoder_reads_labels_or_else_the_encoders(self, source):
        forward = in_the_same_roundings
        labels = jnp.roll(DECODER_IDS, -1, axis=1).at[0, 2].set(-100)
        inputs = {"input_ids": IDS} | ({"labels": labels} if source == "labels" else {})
        target = labels if source == "labels" else IDS
        told = {"input_ids": IDS, "decoder_input_ids": shift_right(target, MODEL.config)}
        assert_close(forward(MODEL, PARAMS, inputs), forward(MODEL, PARAMS, told), 0.0)
        with_labels = forward(MODEL, PARAMS, BOTH | {"labels": labels})
        assert_close(with_labels, forward(MODEL, PARAMS, BOTH), 0.0)  # its own come first

    def test_a_training_batch_may_hold_labels(self):
        """The train step hands a model those of a batch's keys that it takes."""
        takes = {cls.__name__: "labels" in modelzoo.input_names(cls) for cls in CLASSES}
        assert takes == {name: name == "MvpForConditionalGeneration" for name in takes}

    def test_nothing_to_shift(self):
        states = jnp.zeros((3, 8, 24))
        with pytest.raises(ValueError, match="no input_ids to shift"):
            shape_of(MODEL, encoder_outputs=states)
        for field in ("decoder_start_token_id", "pad_token_id"):
            model: Any = modelzoo.MvpModel(tiny_mvp(**{field: None}))
            with pytest.raises(ValueError, match=f"MvpConfig.{field} is None"):
                shape_of(model, input_ids=IDS)
            shape_of(model, input_ids=IDS, decoder_input_ids=DECODER_IDS)

    def test_two_forms_of_one_input(self):
        embeds = jnp.zeros((3, 6, 24))
        with pytest.raises(ValueError, match="at most one of decoder_input_ids and decoder_inputs_embeds"):
            shape_of(MODEL, **BOTH, decoder_inputs_embeds=embeds)
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            shape_of(MODEL, **BOTH, inputs_embeds=jnp.zeros((3, 8, 24)))

    def test_embeddings_in_place_of_ids_are_not_scaled(self):
        model: Any = modelzoo.MvpForConditionalGeneration(tiny_mvp(scale_embedding=True))
        table = PARAMS["trunk"]["embed"]["embedding"] * 24**0.5
        embeds = {"inputs_embeds": table[IDS], "decoder_inputs_embeds": table[DECODER_IDS]}
        ids = {"input_ids": IDS, "decoder_input_ids": DECODER_IDS}
        assert_close(forward(model, PARAMS, embeds), forward(model, PARAMS, ids), 2e-6)

    def test_more_tokens_than_positions(self):
        with pytest.raises(ValueError, match="17 tokens are more than the model's max_position_embeddings"):
            shape_of(MODEL, input_ids=jnp.zeros((1, 17), jnp.int32), decoder_input_ids=DECODER_IDS[:1])


class TestEncoderOutputs:
    @pytest.mark.parametrize("form", ["array", "tuple", "list", "ours", "an object"])
    def test_forms(self, form, expected):
        """They stand for the encoder, and what they hold comes back."""
        states, layers, probs = (
            getattr(expected, f"encoder_{name}")
            for name in ("last_hidden_state", "hidden_states", "attentions")
        )
        given: Any = {
            "array": states,
            "tuple": (states, layers, probs),
            "list": [states, layers],
            "ours": BaseModelOutput(states, hidden_states=layers, attentions=probs),
            "an object": types.SimpleNamespace(last_hidden_state=states, attentions=probs),
        }[form]
        inputs = {name: BOTH[name] for name in ("attention_mask", "decoder_input_ids")}
        out = quick_jit(lambda: MODEL.apply({"params": PARAMS}, **inputs, encoder_outputs=given))()
        assert_close(out.logits, expected.logits, 2e-6)
        assert_close(out.encoder_last_hidden_state, states, 0.0)
        for field, value, forms in (
            ("encoder_hidden_states", layers, ("tuple", "list", "ours")),
            ("encoder_attentions", probs, ("tuple", "ours", "an object")),
        ):
            assert_close(getattr(out, field), value if form in forms else None, 0.0)

    def test_a_mask_that_does_not_fit_them(self):
        inputs = dict(encoder_outputs=jnp.zeros((3, 8, 24)), decoder_input_ids=DECODER_IDS)
        for mask in (MASK[:, :5], MASK[:, :1], jnp.ones((3, 8, 8))):
            with pytest.raises(
                ValueError, match=r"mask of the encoder's tokens has shape .*it is \[batch, 8\]"
            ):
                shape_of(MODEL, **inputs, attention_mask=mask)


class TestCache:
    @pytest.mark.parametrize("form", ["stacked", "unstacked"])
    def test_cached_is_uncached(self, form, expected):
        """Prompts, padding and all; the encoder is passed once."""
        params, cache = PARAMS, MODEL.init_cache(3, 9)
        assert cache.layers.key.shape == (3, 3, 4, 9, 6)  # [L, B, N, S, H] of the decoder
        if form == "unstacked":
            params, cache = modelzoo.unstack_layers(params), modelzoo.unstack_layers(cache)
        inputs, start, outs = {"input_ids": IDS}, 0, []
        for end in (3, 4, 6):
            inputs |= {"attention_mask": MASK, "decoder_input_ids": DECODER_IDS[:, start:end]}
            out = forward(MODEL, params, inputs | {"cache": cache})
            assert (out.encoder_last_hidden_state is None) == (start > 0)
            assert jax.tree.structure(out.cache.cross) == jax.tree.structure(out.cache.layers)
            inputs, start, cache = {}, end, out.cache
            outs.append(out)
        assert is_unstacked(cache.cross) == (form == "unstacked")
        assert int(cache.index) == 6
        for name in ("logits", "decoder_attentions", "cross_attentions"):
            parts = [getattr(out, name) for out in outs]
            axis = 1 if name == "logits" else 2
            got = jax.tree.map(lambda *some, axis=axis: jnp.concatenate(some, axis), *parts)
            want = getattr(expected, name)
            for have, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                scale = max(1.0, float(jnp.abs(wanted).max()))
                assert_close(have[..., : wanted.shape[-1]], wanted, 2e-6 * scale)
                assert (have[..., wanted.shape[-1] :] == 0).all()

    def test_the_encoder_runs_again_where_its_inputs_are_passed_again(self):
        """As in transformers; the decoder reads the cache all the same."""
        first = forward(MODEL, PARAMS, BOTH | {"cache": MODEL.init_cache(3, 9)})
        other = {"input_ids": IDS[::-1], "decoder_input_ids": IDS[:, :1], "cache": first.cache}
        again = forward(MODEL, PARAMS, other)
        alone = forward(MODEL, PARAMS, {name: other[name] for name in ("decoder_input_ids", "cache")})
        assert again.encoder_last_hidden_state is not None
        assert_close(again.logits, alone.logits, 2e-6)

    def test_the_first_call_needs_the_encoder(self):
        cache = MODEL.init_cache(3, 9)
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            shape_of(MODEL, decoder_input_ids=DECODER_IDS, cache=cache)
        seen = forward(MODEL, PARAMS, BOTH | {"cache": MODEL.init_cache(3, 9)}).cache
        with pytest.raises(ValueError, match=r"mask of the encoder's tokens .*it is \[batch, 8\]"):
            shape_of(MODEL, decoder_input_ids=IDS[:, :1], attention_mask=MASK[:, :3], cache=seen)


class TestPrompts:
    def test_they_stand_before_all_other_keys(self, expected):
        for name, columns in (("encoder_attentions", 8), ("decoder_attentions", 6), ("cross_attentions", 8)):
            for probs in getattr(expected, name):
                assert probs.shape[-1] == 5 + columns
                np.testing.assert_allclose(probs.sum(-1), 1.0, atol=1e-6)
                assert (probs[..., :5] > 0).all(), "no mask hides a prompt"
        assert (expected.encoder_attentions[0][0, :, :, 10:] == 0).all()  # padding, behind the prompt
        assert (expected.cross_attentions[0][1, :, :, 5:7] == 0).all()

    def test_every_layer_and_head_has_its_own(self):
        prompt = MODEL.bind({"params": PARAMS}).trunk.decoder.make_prompts(True)["cross_prompt"]
        assert prompt.shape == (3, 2, 4, 5, 6)  # [L, 2, N, P, H]
        flat = np.asarray(prompt).reshape(24, -1)
        assert len({row.tobytes() for row in flat}) == 24

    def test_none_without_use_prompt_nor_in_a_lone_decoder(self):
        for model in (modelzoo.MvpModel(tiny_mvp(use_prompt=False)), modelzoo.MvpForCausalLM(tiny_mvp())):
            assert not [name for name in leaves_by_name(modelzoo.abstract_params(model)) if "prompt" in name]

    def test_dropout(self):
        """One prompt for all rows, so that a dropped element is dropped for all."""
        model: Any = modelzoo.MvpModel(tiny_mvp(dropout=0.4, prompt_length=40))
        params = random_params(model)

        def prompts(deterministic):
            encoder = model.bind({"params": params}, rngs={"dropout": jax.random.key(0)}).encoder
            return encoder.make_prompts(deterministic)["self_prompt"]

        ratio = np.asarray(prompts(False) / prompts(True))
        assert abs((ratio == 0).mean() - 0.4) < 0.03  # 3840 elements: 3.8 standard deviations
        np.testing.assert_allclose(ratio[ratio != 0], 1 / 0.6, rtol=1e-5)


class TestLightweightTuning:
    @pytest.mark.parametrize("name", ["MvpModel", "MvpForConditionalGeneration", "MvpForQuestionAnswering"])
    def test_only_prompts_train(self, name):
        model: Any = modelzoo.get_model_class(name)(tiny_mvp())
        every = leaves_by_name(modelzoo.trainable(model))
        assert {key for key, trains in every.items() if not trains} <= {"final_logits_bias"}
        some = leaves_by_name(modelzoo.trainable(model.set_lightweight_tuning()))
        assert some.keys() == every.keys()
        prompts = {"encoder/self_prompt", "decoder/self_prompt", "decoder/cross_prompt"}
        for key, trains in some.items():
            assert trains == any(f"{prompt}/" in key for prompt in prompts), key
        assert sum(some.values()) == 3 * 5

    def test_a_buffer_never_trains(self):
        def loss(params):
            return jnp.sum(MODEL.apply({"params": params}, **BOTH).logits ** 2)

        assert not modelzoo.trainable(MODEL)["final_logits_bias"]
        gradient = quick_jit(jax.grad(loss))(PARAMS)
        assert (gradient["final_logits_bias"] == 0).all()
        assert (gradient["trunk"]["embed"]["embedding"] != 0).any()

    def test_needs_prompts(self):
        for model in (
            modelzoo.MvpForQuestionAnswering(tiny_mvp(use_prompt=False)),
            modelzoo.MvpForCausalLM(tiny_mvp()),
        ):
            with pytest.raises(ValueError, match=f"{type(model).__name__} has no prompts to tune"):
                model.set_lightweight_tuning()


class TestClassifier:
    model: Any = modelzoo.MvpForSequenceClassification(tiny_mvp(num_labels=4))
    params = random_params(model)

    def test_it_reads_the_last_end_token(self):
        out = forward(
            self.model,
            self.params,
            {
                "input_ids": IDS.at[:, 2]
                .set(END)
                .at[:, 5:]
                .set(PAD)
                .at[1, 4]
                .set(END)
                .at[0, 3]
                .set(END)
                .at[2, 7]
                .set(END)
            },
        )
        states = out.decoder_hidden_states[-1][jnp.arange(3), jnp.array([3, 4, 7])]
        head = self.model.bind({"params": self.params}).classifier
        assert_close(out.logits, head(states), 2e-6)

    @pytest.mark.parametrize("ends", ["none in a row", "another number in a row"])
    def test_rows_that_do_not_fit(self, ends):
        """Seen, an error; traced, NaN."""
        ids = IDS.at[1, -1].set(5) if ends == "none in a row" else IDS.at[1, 0].set(END)
        counts = "0 or 1" if ends == "none in a row" else "1 or 2"
        with pytest.raises(
            ValueError, match=rf"rows of input_ids hold {counts} end tokens \(eos_token_id = 2\)"
        ):
            self.model.apply({"params": self.params}, input_ids=ids)
        assert np.isnan(forward(self.model, self.params, {"input_ids": ids}).logits).all()
        assert np.isfinite(forward(self.model, self.params, {"input_ids": IDS}).logits).all()

    def test_inputs_that_do_not_tell(self):
        with pytest.raises(ValueError, match="looks for the end token in input_ids"):
            shape_of(self.model, inputs_embeds=jnp.zeros((3, 8, 24)), decoder_input_ids=IDS)
        with pytest.raises(ValueError, match=r"the decoder's input has shape \(3, 6\)"):
            shape_of(self.model, input_ids=IDS, decoder_input_ids=DECODER_IDS)


class TestDropout:
    @pytest.mark.parametrize("rate", ["attention_dropout", "activation_dropout", "classifier_dropout"])
    def test_each_rate_changes_the_logits(self, rate):
        """Alone; and nothing when deterministic."""
        exact = forward(TestClassifier.model, TestClassifier.params, {"input_ids": IDS}).logits
        model: Any = modelzoo.MvpForSequenceClassification(tiny_mvp(num_labels=4, **{rate: 0.5}))
        rngs = {"dropout": jax.random.key(0)}
        dropped = forward(model, TestClassifier.params, {"input_ids": IDS}, rngs, deterministic=False).logits
        assert not np.allclose(dropped, exact, atol=1e-3)
        kept = forward(model, TestClassifier.params, {"input_ids": IDS}, rngs, deterministic=True).logits
        assert_close(kept, exact, 0.0)

    @pytest.mark.parametrize("side", ["encoder", "decoder"])
    def test_layers_are_skipped_as_often_as_the_config_says(self, side):
        model: Any = modelzoo.MvpModel(tiny_mvp(**{f"{side}_layerdrop": 0.3}))
        params, other = random_params(model), {"encoder": "decoder", "decoder": "encoder"}[side]

        @quick_jit
        def run(keys):
            def one(key):
                flags = dict(output_hidden_states=True, deterministic=False, rngs={"dropout": key})
                out = model.apply({"params": params}, IDS[:1], **flags)
                sides = (getattr(out, f"{name}_hidden_states") for name in (side, other))
                return [
                    jnp.stack([(a == b).all() for a, b in zip(x[:-1], x[1:], strict=True)]) for x in sides
                ]

            return jax.vmap(one)(keys)

        skipped, unskipped = run(jax.random.split(jax.random.key(0), 400))
        assert np.abs(skipped.mean(0) - 0.3).max() < 0.09  # 400 draws for each layer: 3.9 standard deviations
        assert not unskipped.any()


@pytest.mark.long
def test_gradients_are_one_in_every_form():
    """Of the decoder scanned, or unstacked and recomputed; with dropout, prompts and skipped layers."""
    config, params = tiny_mvp(dropout=0.1, attention_dropout=0.1), PARAMS["trunk"]["decoder"]
    x, source = (jnp.asarray(np.random.default_rng(0).normal(size=(3, n, 24)), jnp.float32) for n in (6, 8))

    def gradients(params, **fields):
        model: Any = MvpDecoder(config, layer_drop=0.3, **fields)

        def loss(params):
            options = dict(deterministic=False, rngs={"dropout": jax.random.key(1)})
            out = model.apply({"params": params}, x, source_BSD=source, source_mask=MASK, **options)
            return jnp.mean(out.last_hidden_state[..., :7] ** 2)

        return quick_jit(jax.value_and_grad(loss))(params)

    value, unstacked = gradients(modelzoo.unstack_layers(params), remat="full")
    assert_close_relative((value, modelzoo.stack_layers(unstacked)), gradients(params), 2e-6)


def test_prompts_on_a_mesh():
    """Every parameter of the published size has its place, and a traced step lays activations where they may be."""
    rules = parallel.make_rules(parallel.make_mesh(fsdp=2, tensor=2, data=2))
    large = modelzoo.MvpForConditionalGeneration(modelzoo.get_config("mvp", use_prompt=True))
    shapes = weights.flatten(modelzoo.abstract_params(large))
    for path, names in weights.flatten(modelzoo.logical_axes(large)).items():
        shape = rules.padded_shape(names, shapes[path].shape)
        rules.check_replication("/".join(path), names, shape)
        assert rules.sharding(names, shape).shard_shape(shape)
    with parallel.use(rules):
        out = shape_of(
            modelzoo.MvpForConditionalGeneration(tiny_mvp(encoder_attention_heads=4)), input_ids=IDS
        )
    assert out.logits.shape == (3, 8, 37)


CLASSES = (
    modelzoo.MvpModel,
    modelzoo.MvpForConditionalGeneration,
    modelzoo.MvpForSequenceClassification,
    modelzoo.MvpForQuestionAnswering,
    modelzoo.MvpForCausalLM,
)
