"""Which families there are: their configs, classes, presets and weight tables."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from modelzoo.bloom import config as bloom_config
from modelzoo.bloom import model as bloom_model
from modelzoo.bloom import weights as bloom_weights
from modelzoo.config import ModelConfig
from modelzoo.gptj import config as gptj_config
from modelzoo.gptj import model as gptj_model
from modelzoo.gptj import weights as gptj_weights
from modelzoo.megatron_bert import config as megatron_bert_config
from modelzoo.megatron_bert import model as megatron_bert_model
from modelzoo.megatron_bert import weights as megatron_bert_weights
from modelzoo.model import Model
from modelzoo.mvp import config as mvp_config
from modelzoo.mvp import model as mvp_model
from modelzoo.mvp import weights as mvp_weights
from modelzoo.roberta import config as roberta_config
from modelzoo.roberta import model as roberta_model
from modelzoo.roberta import weights as roberta_weights


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        title: its name in prose.
        paper: where it was published, and the address.
        model_type: transformers' name of it, as in config.json.
        config_class: its config.
        classes: its model classes; the first is the bare trunk.
        presets: named configs.
        weights: its table of Hugging Face names.
    """

    title: str
    paper: tuple[str, str]
    model_type: str
    config_class: type[ModelConfig]
    classes: tuple[type[Model], ...]
    presets: Mapping[str, ModelConfig]
    weights: Any


FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "GPT-J",
            ("Wang and Komatsuzaki, 2021", "https://github.com/kingoflolz/mesh-transformer-jax"),
            "gptj",
            gptj_config.GPTJConfig,
            gptj_model.CLASSES,
            gptj_config.PRESETS,
            gptj_weights.WEIGHTS,
        ),
        Family(
            "BLOOM",
            ("BigScience, 2022", "https://arxiv.org/abs/2211.05100"),
            "bloom",
            bloom_config.BloomConfig,
            bloom_model.CLASSES,
            bloom_config.PRESETS,
            bloom_weights.WEIGHTS,
        ),
        Family(
            "RoBERTa",
            ("Liu et al., 2019", "https://arxiv.org/abs/1907.11692"),
            "roberta",
            roberta_config.RobertaConfig,
            roberta_model.CLASSES,
            roberta_config.PRESETS,
            roberta_weights.WEIGHTS,
        ),
        Family(
            "MegatronBERT",
            ("Shoeybi et al., 2019", "https://arxiv.org/abs/1909.08053"),
            "megatron-bert",
            megatron_bert_config.MegatronBertConfig,
            megatron_bert_model.CLASSES,
            megatron_bert_config.PRESETS,
            megatron_bert_weights.WEIGHTS,
        ),
        Family(
            "MVP",
            ("Tang et al., 2022", "https://arxiv.org/abs/2206.12131"),
            "mvp",
            mvp_config.MvpConfig,
            mvp_model.CLASSES,
            mvp_config.PRESETS,
            mvp_weights.WEIGHTS,
        ),
    )
}


def get_family(model_type: str) -> Family:
    """The family that transformers calls `model_type`.

    Raises:
        ValueError: no such family.
    """
    if model_type not in FAMILIES:
        raise ValueError(f"unknown model_type {model_type!r}: flaxtron has {sorted(FAMILIES)}")
    return FAMILIES[model_type]


def get_model_class(name: str) -> type[Model]:
    """The model class of this name, such as "GPTJForCausalLM".

    Raises:
        ValueError: no such class.
    """
    classes = {cls.__name__: cls for family in FAMILIES.values() for cls in family.classes}
    if name not in classes:
        raise ValueError(f"unknown model class {name!r}: flaxtron has {sorted(classes)}")
    return classes[name]


def list_presets() -> list[str]:
    """The names that `get_config` takes."""
    return sorted(name for family in FAMILIES.values() for name in family.presets)


def get_config(name: str, **overrides: Any) -> Any:
    """A preset's config.

    Args:
        name: such as "gpt-j-6b"; `list_presets` lists them.
        overrides: fields to change.

    Raises:
        ValueError: no such preset or field.
    """
    for family in FAMILIES.values():
        if name in family.presets:
            known = {field.name for field in dataclasses.fields(family.config_class)}
            if unknown := sorted(set(overrides) - known):
                raise ValueError(
                    f"{family.config_class.__name__} has no field {unknown[0]!r}: it has {sorted(known)}"
                )
            return dataclasses.replace(family.presets[name], **overrides)
    raise ValueError(f"unknown preset {name!r}: flaxtron has {list_presets()}")
