"""Which families there are: their configs, classes, presets and weight tables."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from modelzoo.config import ModelConfig
from modelzoo.gptj import config as gptj_config
from modelzoo.gptj import model as gptj_model
from modelzoo.gptj import weights as gptj_weights
from modelzoo.model import Model


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_type: transformers' name of it, as in config.json.
        config_class: its config.
        classes: its model classes; the first is the bare trunk.
        presets: named configs.
        weights: its table of Hugging Face names.
    """

    model_type: str
    config_class: type[ModelConfig]
    classes: tuple[type[Model], ...]
    presets: Mapping[str, ModelConfig]
    weights: Any


FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "gptj",
            gptj_config.GPTJConfig,
            (
                gptj_model.GPTJModel,
                gptj_model.GPTJForCausalLM,
                gptj_model.GPTJForSequenceClassification,
                gptj_model.GPTJForQuestionAnswering,
            ),
            gptj_config.PRESETS,
            gptj_weights.WEIGHTS,
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
