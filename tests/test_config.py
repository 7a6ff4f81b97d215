"""Configs: reading and writing config.json, and what they refuse."""

import dataclasses
import json

import pytest

from modelzoo import config as config_module
from modelzoo.config import ModelConfig
from modelzoo.gptj.config import GPTJConfig
from tests.zoo import tiny_gptj

CONFIGS = [
    GPTJConfig(),
    tiny_gptj(),
    tiny_gptj(num_labels=5),
    tiny_gptj(id2label={1: "b", 0: "a"}, problem_type="multi_label_classification"),
    tiny_gptj(rotary_dim=24, n_head=1, n_inner=None, pad_token_id=None, resid_pdrop=0.25),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_round_trip_through_a_file(config):
    assert GPTJConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_all_of_a_head_is_written_as_a_number():
    """transformers would read None as the model's width, which is a head's only where there is one."""
    assert tiny_gptj(rotary_dim=None).to_hf()["rotary_dim"] == 8


def test_written_names_are_those_of_transformers():
    written = tiny_gptj(num_labels=3, n_inner=31).to_hf()
    assert written["model_type"] == "gptj"
    assert written["n_inner"] == 31
    assert written["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert written["label2id"] == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    assert "num_labels" not in written  # transformers counts the names
    assert "problem_type" not in written  # transformers refuses null


def test_from_hf_leaves_unknown_keys_out():
    config = GPTJConfig.from_hf(
        {"model_type": "gptj", "n_layer": 3, "summary_type": "cls_index", "torch_dtype": "bfloat16"}
    )
    assert config == GPTJConfig(n_layer=3)


def test_from_hf_refuses_another_family():
    with pytest.raises(ValueError, match="model_type 'gpt2' is not 'gptj'"):
        GPTJConfig.from_hf({"model_type": "gpt2"})


def test_the_names_decide_the_number_of_classes():
    """As in transformers, also where a file holds another num_labels beside them."""
    names = {"0": "no", "1": "yes", "2": "perhaps"}
    config = GPTJConfig.from_hf({"id2label": names, "num_labels": 7})
    assert config.num_labels == 3
    assert config.id2label == ((0, "no"), (1, "yes"), (2, "perhaps"))
    assert GPTJConfig.from_hf({"num_labels": 7}).num_labels == 7
    assert GPTJConfig.from_hf({}).num_labels == 2


def test_names_that_only_count_are_no_names():
    """So that a config read from a file can be given another number of classes."""
    config = GPTJConfig.from_hf(tiny_gptj(num_labels=3).to_hf())
    assert config.id2label is None
    assert dataclasses.replace(config, num_labels=4).num_labels == 4


def test_names_and_number_must_agree():
    with pytest.raises(ValueError, match=r"GPTJConfig\.num_labels = 2: id2label names 3 classes"):
        tiny_gptj(id2label={0: "a", 1: "b", 2: "c"})


def test_configs_are_hashable_values():
    """They are fields of modules, and modules are static arguments of jit."""
    a, b = (tiny_gptj(id2label={"1": "b", "0": "a"}) for _ in range(2))
    assert a == b
    assert hash(a) == hash(b)
    assert a != tiny_gptj()
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.__setattr__("n_layer", 7)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_embd", "64"),
        ("n_embd", 64.0),
        ("n_embd", True),
        ("n_layer", None),
        ("rotary_dim", "4"),
        ("layer_norm_epsilon", "1e-5"),
        ("activation_function", 3),
        ("eos_token_id", [1, 2]),
        ("pad_token_id", 1.5),
        ("id2label", ["a", "b"]),
        ("tie_word_embeddings", "no"),
    ],
)
def test_a_value_of_the_wrong_type_names_its_field(field, value):
    with pytest.raises(ValueError, match=rf"GPTJConfig\.{field} = .*: it is of type"):
        tiny_gptj(**{field: value})


def test_an_integer_is_a_float():
    assert tiny_gptj(resid_pdrop=0, initializer_range=1).resid_pdrop == 0


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("problem_type", "guessing", "choose from"),
        ("num_labels", 0, "number of classes"),
    ],
)
def test_a_value_out_of_range_names_its_field(field, value, why):
    with pytest.raises(ValueError, match=rf"GPTJConfig\.{field} = .*{why}"):
        tiny_gptj(**{field: value})


def test_problem_types():
    for problem_type in (None, *config_module.PROBLEM_TYPES):
        assert tiny_gptj(problem_type=problem_type).problem_type == problem_type


def test_a_family_must_name_its_sizes():
    class Nameless(ModelConfig):
        model_type = "nameless"

    for name in ("num_layers", "hidden_size", "max_positions"):
        with pytest.raises(NotImplementedError):
            getattr(Nameless(), name)
