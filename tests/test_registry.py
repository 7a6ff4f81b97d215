"""Names find configs and classes, and every family is whole."""

from pathlib import Path

import pytest

import modelzoo
from modelzoo import registry
from modelzoo.config import ModelConfig
from modelzoo.model import Model
from modelzoo.weights import WeightTable


@pytest.mark.parametrize("family", registry.FAMILIES.values(), ids=registry.FAMILIES)
def test_families_are_whole(family):
    assert family.config_class.model_type == family.model_type
    assert issubclass(family.config_class, ModelConfig)
    assert isinstance(family.weights, WeightTable)
    assert family.classes[0].task == "base"
    assert all(issubclass(cls, Model) for cls in family.classes)
    assert all(isinstance(preset, family.config_class) for preset in family.presets.values())
    assert any(name.startswith("tiny-") for name in family.presets)


@pytest.mark.parametrize("family", registry.FAMILIES.values(), ids=registry.FAMILIES)
def test_families_are_public(family):
    """modelzoo.X is the class that the registry calls X."""
    for cls in (family.config_class, *family.classes):
        assert getattr(modelzoo, cls.__name__) is cls
        assert cls.__name__ in modelzoo.__all__
        assert cls.__name__ in dir(modelzoo)
        assert registry.find(cls.__name__) is cls


def test_type_checkers_know_every_family():
    """The registry's imports for them are those of its lines: they load nothing, so that nothing else would tell."""
    text = Path(registry.__file__).read_text()
    for family in registry.FAMILIES.values():
        package = f"modelzoo.{family.model_type.replace('-', '_')}"
        assert f"    from {package}.config import {family.config_class.__name__}\n" in text
        assert f"    from {package}.model import *\n" in text


def test_other_names_are_no_names():
    with pytest.raises(AttributeError, match="module 'modelzoo' has no attribute 'GPTJForCausal'"):
        _ = modelzoo.GPTJForCausal
    assert registry.find("GPTJBlock") is None


def test_family_of():
    assert registry.family_of(modelzoo.MvpModel) is modelzoo.get_family("mvp")
    assert registry.family_of(Model) is None


def test_relatives_are_named():
    found = registry.relatives(modelzoo.MvpForQuestionAnswering, ("unshifted_lm", "seq2seq_lm"))
    assert found == "MvpForConditionalGeneration or MvpForCausalLM"
    assert registry.relatives(modelzoo.GPT2Model, ("causal_lm",)) == "GPT2LMHeadModel"
    assert registry.relatives(Model, ("causal_lm",)) == "a class of another family"


def test_get_model_class():
    assert modelzoo.get_model_class("GPTJForCausalLM") is modelzoo.GPTJForCausalLM
    with pytest.raises(
        ValueError,
        match="unknown model class 'GPTJForCausalLMs': did you mean GPTJForCausalLM.* flaxtron has .*BloomModel",
    ):
        modelzoo.get_model_class("GPTJForCausalLMs")


def test_tasks_tell_the_classes_apart():
    tasks = [cls.task for cls in modelzoo.get_family("gptj").classes]
    assert tasks == ["base", "causal_lm", "sequence_classification", "question_answering"]


def test_get_family():
    assert modelzoo.get_family("gptj").config_class is modelzoo.GPTJConfig
    with pytest.raises(ValueError, match="unknown model_type 'gpt3': flaxtron has .*gptj"):
        modelzoo.get_family("gpt3")


def test_every_preset_is_found():
    presets = modelzoo.list_presets()
    assert presets == sorted(presets)
    assert {"gpt-j-6b", "tiny-gptj"} <= set(presets)
    for name in presets:
        assert isinstance(modelzoo.get_config(name), ModelConfig)


def test_get_config_changes_fields():
    config = modelzoo.get_config("tiny-gptj", n_layer=5, rotary_dim=None)
    assert (config.n_layer, config.rotary_dim) == (5, None)
    assert config.n_embd == modelzoo.get_config("tiny-gptj").n_embd
    assert modelzoo.get_config("tiny-gptj").n_layer != 5


def test_get_config_refuses():
    with pytest.raises(
        ValueError, match="unknown preset 'gpt-j-7b': did you mean gpt-j-6b.* flaxtron has bloom-176b, "
    ):
        modelzoo.get_config("gpt-j-7b")
    with pytest.raises(ValueError, match="GPTJConfig has no field 'n_layers': it has .*'n_layer'"):
        modelzoo.get_config("tiny-gptj", n_layers=5)
    with pytest.raises(ValueError, match=r"GPTJConfig\.n_head"):
        modelzoo.get_config("tiny-gptj", n_head=0)


def test_the_gpt_j_preset_is_the_published_model():
    """EleutherAI/gpt-j-6b's config.json."""
    config = modelzoo.get_config("gpt-j-6b")
    sizes = dict(
        vocab_size=50400, n_positions=2048, n_embd=4096, n_layer=28, n_head=16, rotary_dim=64, n_inner=None
    )
    assert {name: getattr(config, name) for name in sizes} == sizes
    assert (config.activation_function, config.layer_norm_epsilon) == ("gelu_new", 1e-5)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (50256, 50256, None)
    assert (config.num_layers, config.hidden_size, config.max_positions) == (28, 4096, 2048)
    assert (config.head_dim, config.mlp_dim, config.cache_heads) == (256, 16384, (16, 256))
