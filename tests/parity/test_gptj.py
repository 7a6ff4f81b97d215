"""GPT-J against transformers 4.57 (torch, eager attention) with the same weights: every class, option and position."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.activations import ACT2CLS, ACT2FN
from transformers.models.gptj.modeling_gptj import create_sinusoidal_positions

import modelzoo
from modelzoo.layers.mlp import ACTIVATIONS
from modelzoo.layers.position import rotary_tables
from tests.gptj_state import params_from_state
from tests.parity.gptj_torch import CLASSES, ask, make_pair, to_torch, torch_config
from tests.zoo import assert_close, assert_close_relative, quick_jit, tiny_gptj

TOLERANCE = 2e-5
B, T = 4, 9
CONFIGS = {
    "three heads": tiny_gptj(vocab_size=211, num_labels=3),
    "five heads": tiny_gptj(vocab_size=257, n_embd=50, n_head=5, rotary_dim=10, n_inner=77, n_layer=3),
    "one head, all of it rotary": tiny_gptj(n_embd=12, n_head=1, rotary_dim=None, n_inner=None),
    "little rotary, rough": tiny_gptj(n_embd=48, n_head=2, rotary_dim=2, n_layer=1, layer_norm_epsilon=0.1),
    "another activation": tiny_gptj(activation_function="quick_gelu", rotary_dim=6, num_labels=1),
}
FIELDS = ("last_hidden_state", "logits", "start_logits", "end_logits", "hidden_states", "attentions")


@functools.cache
def pair(name, title="three heads"):
    config = CONFIGS[title]
    if (
        name == "GPTJForQuestionAnswering"
    ):  # transformers' answer head has num_labels outputs, and works with two alone
        config = dataclasses.replace(config, num_labels=2)
    return make_pair(name, config)


@functools.partial(quick_jit, static_argnums=0)
def forward(model, params, inputs):
    return model.apply({"params": params}, **inputs, output_attentions=True, output_hidden_states=True)


def check(name: str, inputs: dict[str, Any], title: str = "three heads") -> Any:
    """Every output of every position, hidden states and attentions of every layer included."""
    theirs, ours, params = pair(name, title)
    expected = ask(theirs, inputs, output_attentions=True, output_hidden_states=True)
    out = forward(ours, params, {name: jnp.asarray(value) for name, value in inputs.items()})
    compared = 0
    for field in FIELDS:
        want = getattr(expected, field, None)
        if want is None:
            assert getattr(out, field, None) is None
            continue
        have = getattr(out, field)
        want = (torch.stack(want) if isinstance(want, tuple) else want).numpy()
        have = jnp.stack(have) if isinstance(have, tuple) else have
        assert np.isfinite(want).all()
        assert_close(have, want, TOLERANCE)
        compared += 1
    assert compared >= 3
    return out


def make_inputs(config, *options, seed=0):
    """Tokens, and whichever options are named; "left", "right" and "inside" are padding."""
    random = np.random.default_rng(seed)
    ids = random.integers(1, config.vocab_size, (B, T)).astype(np.int32)
    mask = np.ones((B, T), np.int32)
    if "left" in options:
        mask[0, :3] = mask[1, : T - 1] = 0
    if "right" in options:
        mask[2, 5:] = mask[1, 1:] = 0
    if "inside" in options:
        mask[3, 2:4] = 0
    inputs: dict[str, Any] = {"input_ids": np.where(mask > 0, ids, 0).astype(np.int32)}
    if {"left", "right", "inside", "mask"} & set(options):
        inputs["attention_mask"] = mask
    if "types" in options:
        inputs["token_type_ids"] = random.integers(0, config.vocab_size, (B, T)).astype(np.int32)
    if "positions" in options:
        inputs["position_ids"] = random.integers(0, config.n_positions, (B, T)).astype(np.int32)
        inputs["position_ids"][0, 0] = config.n_positions - 1
    if "shared positions" in options:
        inputs["position_ids"] = np.arange(3, 3 + T, dtype=np.int32)[None]
    if "head mask" in options:
        inputs["head_mask"] = random.uniform(0, 1.5, config.n_head).astype(np.float32)
    if "layer head mask" in options:
        inputs["head_mask"] = random.integers(0, 2, (config.n_layer, config.n_head)).astype(np.float32)
    if "embeds" in options:
        del inputs["input_ids"]
        inputs["inputs_embeds"] = random.normal(size=(B, T, config.n_embd)).astype(np.float32)
    if "bias" in options:  # 4-D, used as it is: here it lets some keys through that lie ahead
        hidden = random.uniform(size=(B, 1, T, T)) < 0.4
        inputs["attention_mask"] = np.where(
            hidden, np.finfo(np.float32).min, random.normal(size=(B, 1, T, T))
        )
        inputs["attention_mask"] = inputs["attention_mask"].astype(np.float32)
    return inputs


OPTIONS = [
    (),
    ("mask",),
    ("left",),
    ("right",),
    ("left", "right", "inside"),
    ("types",),
    ("positions",),
    ("shared positions",),
    ("head mask",),
    ("layer head mask",),
    ("embeds", "left"),
    ("bias",),
    ("left", "right", "types", "positions", "layer head mask"),
    ("embeds", "bias", "types", "positions", "head mask"),
]


@pytest.mark.parametrize("options", OPTIONS, ids="+".join)
def test_options(options):
    check("GPTJModel", make_inputs(CONFIGS["three heads"], *options))


@pytest.mark.parametrize("title", CONFIGS)
@pytest.mark.parametrize("name", CLASSES)
def test_classes_and_configs(name, title):
    options = ("left", "right", "types", "positions", "layer head mask")
    check(name, make_inputs(CONFIGS[title], *options), title)


def test_one_token_of_one_row():
    check("GPTJForCausalLM", {"input_ids": np.array([[7]], np.int32)})


def test_weights_of_unit_scale():
    """Scores of some hundreds: a softmax that is nearly hard, whose arguments must be right in the last bits."""
    theirs, ours, params = make_pair("GPTJModel", CONFIGS["three heads"], scale=0.6)
    inputs = make_inputs(CONFIGS["three heads"], "left")
    expected = ask(theirs, inputs, output_attentions=True)
    out = forward(ours, params, inputs)
    assert max(float(a.max()) for a in expected.attentions) > 0.999
    assert_close(out.attentions, tuple(a.numpy() for a in expected.attentions), 1e-4)
    assert_close(out.last_hidden_state, expected.last_hidden_state.numpy(), 1e-3)


def test_attention_is_far_from_uniform():
    """What the other tests compare is worth comparing: head, position and order all show in it."""
    out = check("GPTJModel", make_inputs(CONFIGS["three heads"]))
    last = np.asarray(out.attentions[-1])[:, :, -1]
    assert (last.max(-1) > 2 / T).mean() > 0.5
    assert np.abs(last[:, 0] - last[:, 1]).max() > 0.05


class TestSequenceClassification:
    """Which token is classified."""

    name = "GPTJForSequenceClassification"

    @pytest.mark.parametrize(
        "pads",
        [
            [[], [], []],
            [[6, 7], [7], []],
            [[0, 1], [0], []],
            [[0, 6, 7], [3], [2, 5]],
            [[0, 1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6]],
        ],
        ids=["none", "right", "left", "inside", "only"],
    )
    def test_the_rightmost_token_that_is_not_padding(self, pads):
        ids = np.random.default_rng(0).integers(1, 211, (3, 8)).astype(np.int32)
        for row, places in zip(ids, pads, strict=True):
            row[places] = 0
        check(self.name, {"input_ids": ids})
        check(self.name, {"input_ids": ids, "attention_mask": (ids != 0).astype(np.int32)})

    def test_embeddings_are_classified_by_the_last(self):
        check(self.name, make_inputs(CONFIGS["three heads"], "embeds", "right"))

    def test_without_a_padding_token(self):
        theirs, ours, params = make_pair(self.name, tiny_gptj(pad_token_id=None))
        one = np.array([[5, 6, 0, 0]], np.int32)
        np.testing.assert_allclose(
            forward(ours, params, {"input_ids": one}).logits,
            ask(theirs, {"input_ids": one}).logits,
            atol=TOLERANCE,
        )
        two = {"input_ids": np.concatenate([one, one])}
        with pytest.raises(ValueError, match="batch sizes > 1"):
            ask(theirs, two)
        with pytest.raises(ValueError, match="batch of 2 sequences without a padding token"):
            forward(ours, params, two)


class TestCache:
    @pytest.mark.parametrize("chunks", [[9], [5, 4], [4, 1, 1, 3]], ids=str)
    @pytest.mark.parametrize("padding", [0, 3])
    def test_past_key_values(self, chunks, padding):
        """Fed in the same chunks: the same logits and attentions, and the same keys and values at the end."""
        theirs, ours, params = pair("GPTJForCausalLM")
        ids = make_inputs(ours.config)["input_ids"]
        mask = np.ones_like(ids)
        mask[0, :padding] = 0
        real = mask.astype(bool)
        past: Any = None
        cache, start = ours.init_cache(B, T), 0
        for size in chunks:
            end = start + size
            new = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end]}
            expected = ask(theirs, new | {"past_key_values": past}, use_cache=True, output_attentions=True)
            out = forward(ours, params, new | {"cache": cache})
            cache, past, now = out.cache, expected.past_key_values, real[:, start:end]
            np.testing.assert_allclose(out.logits[now], expected.logits.numpy()[now], atol=TOLERANCE)
            for have, want in zip(out.attentions, expected.attentions, strict=True):
                have, want = np.swapaxes(have, 1, 2)[now], want.numpy().swapaxes(1, 2)[now]
                np.testing.assert_allclose(have[..., :end], want, atol=TOLERANCE)
                assert (have[..., end:] == 0).all()
            start = end
        for i, layer in enumerate(past.layers):
            for have, want in ((cache.layers.key[i], layer.keys), (cache.layers.value[i], layer.values)):
                have, want = np.swapaxes(have, 1, 2)[real], want.numpy().swapaxes(1, 2)[real]
                np.testing.assert_allclose(have, want, atol=TOLERANCE)


@pytest.mark.parametrize("padding", [0, 3])
def test_causal_lm_loss_and_gradients(padding):
    theirs, ours, params = make_pair("GPTJForCausalLM", CONFIGS["three heads"])
    inputs = make_inputs(ours.config, "types", "head mask", "mask")
    inputs["attention_mask"][0, :padding] = 0
    labels = np.where(inputs["attention_mask"] > 0, inputs["input_ids"], -100)
    labels[1, 4] = -100
    loss = theirs(**{name: to_torch(value) for name, value in inputs.items()}, labels=to_torch(labels)).loss
    loss.backward()

    def our_loss(params):
        logits = ours.apply({"params": params}, **inputs).logits[:, :-1]
        valid = labels[:, 1:] != -100
        chosen = jnp.take_along_axis(logits, jnp.maximum(labels[:, 1:], 0)[..., None], axis=-1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen, where=valid)

    value, gradients = quick_jit(jax.value_and_grad(our_loss))(params)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    expected = {name: tensor.grad.numpy() for name, tensor in theirs.named_parameters()}
    assert_close_relative(gradients, params_from_state(expected, ours.config), 1e-4)


def test_activations_are_those_of_transformers():
    """Name by name; those with parameters of their own are no config's to name."""
    assert ACTIVATIONS.keys() == ACT2CLS.keys() - {"prelu", "xielu"}
    x = torch.cat([torch.linspace(-15, 15, 3001), torch.tensor([0.0, -1e-6, 1e-6])])
    for name, ours in ACTIVATIONS.items():
        np.testing.assert_allclose(
            ours(jnp.asarray(x.numpy())), ACT2FN[name](x).numpy(), atol=3e-6, err_msg=name
        )


@pytest.mark.parametrize("rotary_dim", [2, 4, 6, 10, 24, 64, 80, 128, 256])
def test_rotary_tables_at_every_position(rotary_dim):
    """To 1e-6 up to position 2047, where one rounding of a frequency would show as 1e-4."""
    expected = create_sinusoidal_positions(2048, rotary_dim).numpy()
    sin, cos = rotary_tables(jnp.arange(2048)[None], rotary_dim)
    np.testing.assert_allclose(sin[0, :, ::2], expected[:, : rotary_dim // 2], atol=1e-6)
    np.testing.assert_allclose(cos[0, :, ::2], expected[:, rotary_dim // 2 :], atol=1e-6)
    np.testing.assert_array_equal(sin[..., ::2], sin[..., 1::2])


def test_far_positions():
    """Of a model as wide a head as GPT-J's rotates, near the end of 2048 positions."""
    config = tiny_gptj(n_positions=2048, n_embd=128, n_head=1, rotary_dim=64, n_layer=1)
    theirs, ours, params = make_pair("GPTJModel", config, scale=0.1)
    inputs = make_inputs(config) | {"position_ids": np.arange(2039, 2048, dtype=np.int32)[None]}
    expected = ask(theirs, inputs, output_attentions=True)
    out = forward(ours, params, inputs)
    np.testing.assert_allclose(out.attentions[0], expected.attentions[0].numpy(), atol=TOLERANCE)
    np.testing.assert_allclose(out.last_hidden_state, expected.last_hidden_state.numpy(), atol=TOLERANCE)


def test_bfloat16_is_as_far_off_as_theirs():
    """From float32's answer; the two round differently, so they are compared by size of error alone."""
    theirs, ours, params = make_pair("GPTJForCausalLM", CONFIGS["three heads"])
    inputs = make_inputs(ours.config, "left")
    exact = ask(theirs, inputs).logits.numpy()
    rounded = ask(theirs.to(torch.bfloat16), inputs).logits.float().numpy()
    out = forward(
        ours.clone(dtype=jnp.bfloat16), jax.tree.map(lambda a: a.astype(jnp.bfloat16), params), inputs
    )
    error = np.sqrt(np.mean((np.asarray(out.logits, np.float32) - exact) ** 2))
    assert error <= 1.3 * np.sqrt(np.mean((rounded - exact) ** 2))


@pytest.mark.parametrize("title", CONFIGS)
def test_config_files_go_both_ways(title):
    """Also with names for the classes and a problem type."""
    ours = dataclasses.replace(
        CONFIGS[title], num_labels=2, id2label={0: "no", 1: "yes"}, problem_type="regression"
    )
    for config in (CONFIGS[title], ours):
        theirs = transformers.GPTJConfig.from_dict(config.to_hf())
        for field in dataclasses.fields(config):
            want = getattr(config, field.name)
            if field.name == "id2label":
                want = dict(want or ((i, f"LABEL_{i}") for i in range(config.num_labels)))
            assert getattr(theirs, field.name) == want, field.name
        assert modelzoo.GPTJConfig.from_hf(theirs.to_dict()) == config
        assert modelzoo.GPTJConfig.from_hf(torch_config(CONFIGS[title]).to_diff_dict()) == CONFIGS[title]


def test_the_defaults_are_transformers():
    assert modelzoo.GPTJConfig.from_hf(transformers.GPTJConfig().to_dict()) == modelzoo.GPTJConfig()


@pytest.mark.parametrize("name", CLASSES)
def test_parameter_counts_of_gpt_j(name):
    with torch.device("meta"):
        theirs = getattr(transformers, name)(transformers.GPTJConfig())
    ours = modelzoo.get_model_class(name)(modelzoo.get_config("gpt-j-6b"))
    assert modelzoo.num_params(ours) == sum(parameter.numel() for parameter in theirs.parameters())
