"""modelzoo/lens.py: the last layer's scores are the model's, and each layer's those of a model that ends there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import modelzoo
from modelzoo import registry
from tests.zoo import TINY, quick_jit, random_params, tiny_gptj

IDS = jnp.array([[5, 6, 7, 8, 9]])


SPEAKERS = [
    pytest.param(TINY[model_type], cls, id=cls.__name__)
    for model_type, family in registry.FAMILIES.items()
    for cls in family.classes
    if cls.task in ("causal_lm", "masked_lm", "unshifted_lm")
]


@pytest.mark.parametrize(("preset", "model_class"), SPEAKERS)
def test_the_last_layer_says_what_the_model_says(preset, model_class):
    model = model_class(modelzoo.get_config(preset, vocab_size=61))
    params = random_params(model)

    @quick_jit
    def run(params):
        out = model.apply({"params": params}, input_ids=IDS, output_hidden_states=True)
        return out.logits, modelzoo.logit_lens(model, params, out.hidden_states)

    logits, lens = run(params)
    assert lens.shape == (model.config.num_layers + 1, *logits.shape)
    np.testing.assert_allclose(lens[-1], logits, atol=1e-6)
    assert np.abs(lens[0] - logits).max() > 1e-2


def test_a_layer_says_what_a_model_without_the_later_ones_says():
    model = modelzoo.GPTJForCausalLM(tiny_gptj())
    params = random_params(model)
    shorter = modelzoo.GPTJForCausalLM(dataclasses.replace(model.config, n_layer=1))
    trunk = dict(params["trunk"], layers=jax.tree.map(lambda p: p[:1], params["trunk"]["layers"]))
    expected = shorter.apply({"params": dict(params, trunk=trunk)}, input_ids=IDS).logits
    states = model.apply({"params": params}, input_ids=IDS, output_hidden_states=True).hidden_states
    np.testing.assert_allclose(modelzoo.logit_lens(model, params, states)[1], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("preset", "model_class"),
    [
        ("tiny-gptj", modelzoo.GPTJForSequenceClassification),
        ("tiny-mvp", modelzoo.MvpForConditionalGeneration),
        ("tiny-gpt2", modelzoo.GPT2DoubleHeadsModel),
    ],
)
def test_a_model_without_one_is_named(preset, model_class):
    with pytest.raises(ValueError, match=f"{model_class.__name__} has no logit lens"):
        modelzoo.logit_lens(model_class(modelzoo.get_config(preset)), {}, ())
