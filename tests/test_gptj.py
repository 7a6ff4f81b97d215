"""GPT-J: what its forms and options owe each other; tests/test_zoo_answers.py holds it to transformers."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import modelzoo
from tests.zoo import assert_close, assert_close_relative, leaves_by_name, quick_jit, random_params, tiny_gptj

HEADS = {
    "GPTJModel": None,
    "GPTJForCausalLM": "lm_head",
    "GPTJForSequenceClassification": "score",
    "GPTJForQuestionAnswering": "qa_outputs",
}
MODEL: Any = modelzoo.GPTJForCausalLM(tiny_gptj())


@functools.partial(quick_jit, static_argnums=0, static_argnames=("logits_to_keep", "deterministic"))
def forward(model, params, inputs, **flags):
    flags = dict(output_hidden_states=True, output_attentions=True) | flags
    return model.apply({"params": params}, **inputs, **flags)


def ids(batch=3, length=9, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(1, 37, (batch, length)), jnp.int32)


class TestForms:
    """Scanned, unrolled and unstacked layers; recomputed or not: the same numbers."""

    inputs = {
        "input_ids": ids(),
        "attention_mask": jnp.ones((3, 9)).at[0, :3].set(0),
        "head_mask": jnp.arange(3.0),
    }

    @pytest.mark.parametrize("form", ["unrolled", "unstacked"])
    def test_forward(self, form):
        params = random_params(MODEL)
        expected = forward(MODEL, params, self.inputs)
        if form == "unstacked":
            got = forward(MODEL, modelzoo.unstack_layers(params), self.inputs)
        else:
            got = forward(MODEL.clone(scan_layers=False), params, self.inputs)
        assert_close(got, expected, 1e-6 * float(jnp.abs(expected.logits).max()))

    def test_gradients(self):
        """With dropout, whose masks no form may change."""
        config = tiny_gptj(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
        params = random_params(MODEL)

        def gradients(**fields):
            model: Any = modelzoo.GPTJForCausalLM(config, **fields)

            def loss(params):
                rngs = {"dropout": jax.random.key(1)}
                logits = model.apply({"params": params}, **self.inputs, deterministic=False, rngs=rngs).logits
                return jnp.mean(logits**2)

            return quick_jit(jax.value_and_grad(loss))

        expected = gradients()(params)
        for fields in (dict(remat="full"), dict(scan_layers=False)):
            assert_close_relative(gradients(**fields)(params), expected, 2e-6)
        value, unstacked = gradients()(modelzoo.unstack_layers(params))
        assert_close_relative((value, modelzoo.stack_layers(unstacked)), expected, 2e-6)


class TestCache:
    @pytest.mark.parametrize(
        ("chunks", "form", "padding", "long_mask"),
        [
            ([9], "stacked", 0, False),
            ([1] * 9, "unstacked", 2, False),
            ([4, 4, 1], "stacked", 3, True),
            ([5, 1, 1, 2], "unstacked", 3, True),
            ([2, 7], "stacked params, unstacked cache", 1, False),
            ([7, 2], "unstacked params, stacked cache", 0, False),
        ],
        ids=str,
    )
    def test_cached_is_uncached(self, chunks, form, padding, long_mask):
        """In any chunks, with positions of one's own, and the mask given for the new tokens or for all so far."""
        params, tokens = random_params(MODEL), ids()
        mask = jnp.ones((3, 9), jnp.int32).at[0, :padding].set(0)
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        expected = forward(MODEL, params, inputs)

        cache = MODEL.init_cache(3, 13)
        if form in ("unstacked", "unstacked params, stacked cache"):
            params = modelzoo.unstack_layers(params)
        if form in ("unstacked", "stacked params, unstacked cache"):
            cache = modelzoo.unstack_layers(cache)
        form_of_cache, outs, start = jax.tree.structure(cache), [], 0
        for size in chunks:
            end = start + size
            some = {name: value[:, start:end] for name, value in inputs.items()}
            some["attention_mask"] = mask[:, :end] if long_mask else some["attention_mask"]
            out = forward(MODEL, params, some | {"cache": cache})
            cache, start = out.cache, end
            outs.append(out)
        assert jax.tree.structure(cache) == form_of_cache
        assert int(cache.index) == 9
        np.testing.assert_array_equal(cache.mask[:, :9], mask.astype(bool))
        assert not cache.mask[:, 9:].any()

        real = np.asarray(
            mask, bool
        )  # a padding position attends evenly over all slots, of which there are more
        scale = max(1.0, float(jnp.abs(expected.logits).max()))
        logits = jnp.concatenate([out.logits for out in outs], axis=1)
        np.testing.assert_allclose(logits[real], expected.logits[real], atol=2e-6 * scale)
        for layer in range(2):
            probs = jnp.concatenate([out.attentions[layer] for out in outs], axis=2).swapaxes(1, 2)[real]
            np.testing.assert_allclose(
                probs[..., :9], expected.attentions[layer].swapaxes(1, 2)[real], atol=2e-6
            )
            assert (probs[..., 9:] == 0).all()

    def test_positions_go_on_from_the_next_slot(self):
        params, tokens = random_params(MODEL), ids()
        first = forward(MODEL, params, {"input_ids": tokens[:, :5], "cache": MODEL.init_cache(3, 9)})
        then = forward(MODEL, params, {"input_ids": tokens[:, 5:], "cache": first.cache})
        expected = forward(MODEL, params, {"input_ids": tokens}).logits[:, 5:]
        np.testing.assert_allclose(then.logits, expected, atol=2e-6 * float(jnp.abs(expected).max()))

    def test_a_bias_may_stand_for_the_mask(self):
        """And later calls see the slots that went with it."""
        params, tokens = random_params(MODEL), ids()
        bias = jnp.where(jnp.tril(jnp.ones((5, 9))) > 0, 0.0, -1e30)[None, None]
        some = {"input_ids": tokens[:, :5], "attention_mask": bias, "cache": MODEL.init_cache(3, 9)}
        first = forward(MODEL, params, some)
        then = forward(MODEL, params, {"input_ids": tokens[:, 5:], "cache": first.cache})
        expected = forward(MODEL, params, {"input_ids": tokens}).logits
        scale = float(jnp.abs(expected).max())
        np.testing.assert_allclose(first.logits, expected[:, :5], atol=2e-6 * scale)
        np.testing.assert_allclose(then.logits, expected[:, 5:], atol=2e-6 * scale)


class TestInputs:
    params = random_params(MODEL)

    def test_embeddings_in_place_of_ids(self):
        embeds = self.params["trunk"]["embed"]["embedding"][ids()]
        expected = forward(MODEL, self.params, {"input_ids": ids()})
        assert_close(forward(MODEL, self.params, {"inputs_embeds": embeds}), expected, 0.0)
        for inputs in ({}, {"input_ids": ids(), "inputs_embeds": embeds}):
            with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
                forward(MODEL, self.params, inputs)

    def test_no_row_sees_another(self):
        """An id that is none spoils its own row alone, from its place on."""
        tokens = ids().at[1, 4].set(37)
        logits = forward(MODEL, self.params, {"input_ids": tokens}).logits
        assert np.isfinite(logits[np.array([0, 2])]).all()
        assert np.isnan(logits[1, 4:]).all()

    @pytest.mark.parametrize("keep", [1, 4, 20])
    def test_logits_of_the_last_positions(self, keep):
        whole = forward(MODEL, self.params, {"input_ids": ids()}).logits
        some = forward(MODEL, self.params, {"input_ids": ids()}, logits_to_keep=keep).logits
        np.testing.assert_allclose(some, whole[:, -keep:], atol=2e-6 * float(jnp.abs(whole).max()))

    def test_more_tokens_than_positions_are_refused(self):
        model = modelzoo.GPTJForCausalLM(modelzoo.get_config("tiny-gptj", n_positions=8))
        ids = jnp.zeros((1, 9), jnp.int32)
        with pytest.raises(ValueError, match=r"9 tokens are more than the model's n_positions = 8"):
            jax.eval_shape(lambda: model.init(jax.random.key(0), input_ids=ids))

    def test_logits_of_chosen_positions(self):
        whole = forward(MODEL, self.params, {"input_ids": ids()}).logits
        chosen = jnp.array([7, 0, 3])
        some = forward(MODEL, self.params, {"input_ids": ids(), "logits_to_keep": chosen}).logits
        np.testing.assert_allclose(some, whole[:, chosen], atol=2e-6 * float(jnp.abs(whole).max()))

    def test_classifying_a_batch_needs_a_padding_token(self):
        model = modelzoo.GPTJForSequenceClassification(tiny_gptj(pad_token_id=None))
        params = random_params(model)
        assert forward(model, params, {"input_ids": ids(1)}).logits.shape == (1, 2)
        with pytest.raises(ValueError, match="batch of 3 sequences without a padding token"):
            forward(model, params, {"input_ids": ids(3)})

    def test_bfloat16(self):
        expected = forward(MODEL, self.params, {"input_ids": ids()})
        out = forward(MODEL.clone(dtype=jnp.bfloat16), self.params, {"input_ids": ids()})
        assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {jnp.dtype("bfloat16")}
        error = (
            jnp.abs(out.logits.astype(jnp.float32) - expected.logits).max() / jnp.abs(expected.logits).max()
        )
        assert 0 < error < 0.03


class TestDropout:
    """Each of the three, alone: where it falls, how often, and that what is kept grows by 1 / (1 - rate)."""

    rate = 0.3

    def run(self, params=None, deterministic=False, seed=0, **rates: Any):
        model = modelzoo.GPTJModel(tiny_gptj(n_layer=1, **rates))
        params = random_params(model) if params is None else params
        inputs = {"input_ids": ids(16, 24)}
        rngs = {"dropout": jax.random.key(seed)}
        return forward(model, params, inputs, deterministic=deterministic, rngs=rngs)

    def check(self, dropped, kept):
        ratio = np.asarray(dropped / kept)[np.abs(kept) > 1e-4]
        hit = ratio == 0
        assert ratio.size > 9000
        assert abs(hit.mean() - self.rate) < 0.02  # 4.2 standard deviations of 9000
        np.testing.assert_allclose(ratio[~hit], 1 / (1 - self.rate), rtol=2e-2)

    def test_on_embeddings(self):
        self.check(self.run(embd_pdrop=self.rate).hidden_states[0], self.run().hidden_states[0])

    def test_on_attention_weights(self):
        self.check(self.run(attn_pdrop=self.rate).attentions[0], self.run().attentions[0])

    @pytest.mark.parametrize("branch", ["attention", "mlp"])
    def test_on_each_branch(self, branch):
        """The other branch silenced, what a block adds to its input is this one's."""
        model = modelzoo.GPTJModel(tiny_gptj(n_layer=2))
        params = random_params(model)
        other = (
            params["layers"]["mlp"]["fc_out"]
            if branch == "attention"
            else params["layers"]["attention"]["out"]
        )
        other |= jax.tree.map(jnp.zeros_like, other)

        def added(rate):
            model = modelzoo.GPTJModel(tiny_gptj(n_layer=2, resid_pdrop=rate))
            rngs = {"dropout": jax.random.key(0)}
            out = forward(model, params, {"input_ids": ids(16, 24)}, deterministic=False, rngs=rngs)
            return out.hidden_states[1] - out.hidden_states[0]

        self.check(jnp.where(jnp.abs(added(self.rate)) < 1e-5, 0.0, added(self.rate)), added(0.0))

    def test_off_when_deterministic(self):
        rates: dict[str, Any] = dict(embd_pdrop=0.5, attn_pdrop=0.5, resid_pdrop=0.5)
        assert_close(self.run(deterministic=True, **rates), self.run(deterministic=True), 0.0)

    def test_differs_by_key_alone(self):
        a, b, c = (self.run(embd_pdrop=0.5, seed=seed).last_hidden_state for seed in (0, 0, 1))
        assert (a == b).all()
        assert (a != c).any()


class TestInit:
    def test_moments(self):
        """Normal kernels and embeddings of the config's deviation, layer by layer; zero biases; unit scales."""
        model = modelzoo.GPTJForCausalLM(
            tiny_gptj(n_embd=96, vocab_size=401, n_inner=120, initializer_range=0.05)
        )
        params = quick_jit(lambda rng: model.init(rng, input_ids=jnp.zeros((1, 1), jnp.int32)))(
            jax.random.key(3)
        )
        seen = set()
        for name, leaf in leaves_by_name(modelzoo.unstack_layers(params["params"])).items():
            last = name.split("/")[-1]
            if last in ("kernel", "embedding"):
                deviations = np.asarray(leaf).ravel() / 0.05
                assert abs(deviations.std() - 1) < 0.03, name  # at least 9216 of them: 4 standard deviations
                assert abs(deviations.mean()) < 0.045, name
                assert 3.3 < np.abs(deviations).max() < 6, name  # not truncated
                seen.add(float(deviations[0]))
            else:
                assert (leaf == (1 if last == "scale" else 0)).all(), name
        assert len(seen) == 2 * 6 + 2  # no two are drawn alike

    def test_other_heads(self):
        for name, head in list(HEADS.items())[2:]:
            model = modelzoo.get_model_class(name)(tiny_gptj(n_embd=192, num_labels=9, initializer_range=0.5))
            params = jax.eval_shape(
                lambda m=model: m.init(jax.random.key(0), input_ids=jnp.zeros((1, 1), jnp.int32))
            )
            outputs = 2 if head == "qa_outputs" else 9
            assert params["params"][head]["kernel"].value.shape == (192, outputs)
            assert ("bias" in params["params"][head]) == (head == "qa_outputs")


class TestConfig:
    @pytest.mark.parametrize(
        ("field", "value", "why"),
        [
            *(
                (name, 0, "a size, at least 1")
                for name in ("vocab_size", "n_positions", "n_layer", "n_head", "n_inner")
            ),
            ("n_embd", 25, "n_head = 3 does not divide it"),
            ("rotary_dim", 3, "it is even and at most the head width 8, or None"),
            ("rotary_dim", 10, "it is even and at most the head width 8"),
            ("rotary_dim", 0, "it is even"),
            *((name, 1.0, r"lies in \[0, 1\)") for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")),
            ("attn_pdrop", -0.1, r"lies in \[0, 1\)"),
        ],
    )
    def test_a_value_that_cannot_be_names_its_field(self, field, value, why):
        with pytest.raises(ValueError, match=rf"GPTJConfig\.{field} = {value}: .*{why}"):
            tiny_gptj(**{field: value})

    def test_an_unknown_activation(self):
        with pytest.raises(ValueError, match="unknown activation 'geloo'"):
            tiny_gptj(activation_function="geloo")

    def test_derived_sizes(self):
        config = tiny_gptj()
        assert (config.num_layers, config.hidden_size, config.max_positions) == (2, 24, 32)
        assert (config.head_dim, config.mlp_dim, config.cache_heads) == (8, 31, (3, 8))
        assert dataclasses.replace(config, n_inner=None).mlp_dim == 96


def test_no_rotary_dim_rotates_all_of_every_head():
    model, whole = (modelzoo.GPTJModel(tiny_gptj(rotary_dim=dim)) for dim in (None, 8))
    params, ids = random_params(model), jnp.array([[5, 6, 7, 8]])
    states = [m.apply({"params": params}, ids).last_hidden_state for m in (model, whole)]
    np.testing.assert_array_equal(*states)
