"""Decoders with knobs: against float64 numpy, through a cache, in packed rows; gradients reach every parameter."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import modelzoo
from modelzoo import quantizing
from tests import decoder_reference
from tests.zoo import assert_close, leaves_by_name, quick_jit, random_params, tiny_gptj
from train.optim import decay_mask

LENGTH = 9
CASES = {
    "rotary, llama": dict(
        block="sequential", norm="rms", activation_function="swiglu", num_key_value_heads=2
    ),
    "alibi": dict(position="alibi", norm="rms", qk_norm=True, tie_word_embeddings=True),
    "learned, gpt": dict(
        position="learned", block="sequential", norm_placement="post", tie_word_embeddings=True
    ),
    "relative": dict(
        position="relative", num_key_value_heads=1, norm_placement="post", activation_function="glu"
    ),
    "none": dict(
        position="none", block="sequential", qk_norm=True, num_key_value_heads=2, norm_placement="post"
    ),
    "bloom rotary": dict(
        position="rotary", block="parallel", qk_norm=True, norm_placement="post", norm="rms"
    ),
    "bloom alibi": dict(norm_placement="post", num_key_value_heads=1, tie_word_embeddings=False),
    "bloom learned": dict(position="learned", block="parallel", norm="rms", activation_function="geglu"),
    "bloom relative": dict(
        position="relative", qk_norm=True, num_key_value_heads=2, activation_function="reglu"
    ),
    "bloom none": dict(position="none", block="parallel", norm="rms", num_key_value_heads=2),
}
"""Every value of every knob in either family, in many company."""


def make(title: str) -> Any:
    knobs: Any = CASES[title]
    if "bloom" not in title:
        return modelzoo.GPTJForCausalLM(tiny_gptj(n_head=4, **knobs))
    sizes: Any = dict(vocab_size=37, hidden_size=24, n_layer=2, n_head=4, max_position_embeddings=16)
    return modelzoo.BloomForCausalLM(modelzoo.BloomConfig(**sizes, **knobs))


def rows() -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(3).integers(3, 37, (2, LENGTH)).astype(np.int32)
    mask = np.ones((2, LENGTH), np.int32)
    mask[0, :3] = 0
    return ids, mask


@functools.partial(quick_jit, static_argnums=0)
def run(model: Any, params: Any, ids: Any, mask: Any) -> Any:
    """Logits at once, and of a prompt and two more steps through a cache."""

    def apply(ids: Any, **given: Any) -> Any:
        return model.apply({"params": params}, input_ids=ids, **given)

    at_once, steps, cache = apply(ids, attention_mask=mask).logits, [], model.init_cache(2, LENGTH + 2)
    for start, end in ((0, 6), (6, 7), (7, LENGTH)):
        out = apply(ids[:, start:end], attention_mask=mask[:, start:end], cache=cache)
        steps.append(out.logits)
        cache = out.cache
    return at_once, jnp.concatenate(steps, axis=1)


@pytest.mark.parametrize("title", CASES)
def test_against_float64(title):
    model, (ids, mask) = make(title), rows()
    params = random_params(model)
    at_once, cached = run(model, params, ids, mask)
    expected = decoder_reference.logits(model.config, params, ids, mask)
    real = mask > 0  # what padding sees is nobody's business
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(np.asarray(at_once)[real], expected[real], atol=5e-6 * scale)
    np.testing.assert_allclose(np.asarray(cached)[real], np.asarray(at_once)[real], atol=2e-6 * scale)


def test_every_value_is_tried():
    values = {name: set() for name in ("position", "block", "norm_placement", "norm", "qk_norm")}
    for family in (modelzoo.GPTJConfig, modelzoo.BloomConfig):
        mine = [make(title).config for title in CASES if type(make(title).config) is family]
        for name, found in values.items():
            found |= {(family.model_type, getattr(config, name)) for config in mine}
        assert {config.num_key_value_heads for config in mine} == {None, 1, 2}
        assert {config.tie_word_embeddings for config in mine} == {True, False}
    assert {name: len(found) for name, found in values.items()} == dict(
        position=10, block=4, norm_placement=4, norm=4, qk_norm=4
    )


class TestManyAtOnce:
    """One model with most knobs on."""

    title = "bloom relative"

    def test_grouped_heads_are_full_heads_repeated(self):
        model, (ids, mask) = make(self.title), rows()
        params, whole = random_params(model), model.clone(config=_with(model, num_key_value_heads=None))

        def repeat(path: Any, leaf: jax.Array) -> jax.Array:
            names = [key.key for key in path]
            if names[-2] not in ("key", "value"):
                return leaf
            return jnp.repeat(leaf, 2, axis=-2)

        full = jax.tree_util.tree_map_with_path(repeat, params)
        assert_close(run(model, params, ids, mask), run(whole, full, ids, mask), 2e-5)

    def test_every_parameter_has_a_gradient(self):
        model, (ids, mask) = make(self.title), rows()
        params = random_params(model)

        @quick_jit
        def gradients(params: Any) -> Any:
            def loss(params: Any) -> Any:
                logits = model.apply({"params": params}, input_ids=ids, attention_mask=mask).logits
                return -jnp.mean(jax.nn.log_softmax(logits)[..., 5])

            return jax.grad(loss)(params)

        found = leaves_by_name(gradients(params))
        assert {name for name in found if "norm" in name and "attention/" in name} == {
            f"trunk/layers/attention/{name}_norm/scale" for name in ("query", "key")
        }
        for name, gradient in found.items():
            assert np.isfinite(gradient).all(), name
            # A bias of the keys moves all scores of a query alike, unless keys are normed.
            assert np.abs(gradient).max() > 1e-7, name

    def test_packed_documents_are_alone(self):
        """Each document of a packed row gets what it would get in a row of its own, whatever its place."""
        for title in (self.title, "bloom learned"):
            model = make(title)
            params, (ids, _) = random_params(model), rows()
            packed = _packed(model, params, ids[:1, :8], jnp.array([[1] * 4 + [2] * 4]))
            alone = _packed(model, params, ids[:1, :8].reshape(2, 4), None)
            assert_close(packed.reshape(alone.shape), alone, 5e-6)

    def test_int8_and_adapters_know_every_kernel(self):
        model = make("rotary, llama")
        kernels = {
            name for name in leaves_by_name(modelzoo.abstract_params(model)) if name.endswith("/kernel")
        }
        assert {"/".join(path) for path in quantizing.shared_dims(model)} == kernels
        assert "trunk/layers/mlp/fc_gate/kernel" in kernels
        adapted = modelzoo.tuned(model, modelzoo.Tuning(lora=modelzoo.Lora(rank=2, alpha=4, targets=".*")))
        shapes = leaves_by_name(modelzoo.abstract_params(adapted))
        assert shapes["trunk/layers/attention/key/lora/b"].shape == (2, 2, 2, 6)

    def test_scales_of_norms_do_not_decay(self):
        decays = leaves_by_name(decay_mask(modelzoo.abstract_params(make("alibi"))))
        spared = {name for name, decay in decays.items() if not decay}
        assert {"trunk/layers/attention/query_norm/scale", "trunk/final_norm/scale"} <= spared
        assert all(name.endswith(("/scale", "/bias")) for name in spared)


def _with(model: Any, **fields: Any) -> Any:
    return dataclasses.replace(model.config, **fields)


@functools.partial(quick_jit, static_argnums=0)
def _packed(model: Any, params: Any, ids: Any, segments: Any) -> Any:
    return model.apply({"params": params}, input_ids=ids, segment_ids=segments).logits


def test_bloom_counts_learned_positions_over_real_tokens():
    """A row padded on the left says what it says without padding: ALiBi and learned positions alike."""
    model, (ids, mask) = make("bloom learned"), rows()
    params = random_params(model)
    padded = run(model, params, ids, mask)[0][:1, 3:]
    assert_close(padded, _packed(model, params, ids[:1, 3:], None), 5e-6)


def test_too_long_for_a_table():
    with pytest.raises(ValueError, match="17 tokens are more than the model's max_position_embeddings = 16"):
        jax.eval_shape(make("bloom learned").init, jax.random.key(0), jnp.zeros((1, 17), jnp.int32))
    with pytest.raises(ValueError, match="max_length 17 is past the 16 positions"):
        make("bloom learned").init_cache(1, 17)
