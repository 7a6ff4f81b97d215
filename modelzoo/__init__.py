"""What a model computes: transformer families as pure Flax modules. Imports nothing else of flaxtron.

config = modelzoo.get_config("tiny-gptj")
model = modelzoo.GPTJForCausalLM(config)
out = model.apply({"params": params}, input_ids=ids)

Configs and classes are those of the registry (`modelzoo.registry`), under transformers' names.
"""

# ruff: noqa: F401, F403

import importlib
from typing import TYPE_CHECKING, Any

from modelzoo import registry
from modelzoo.registry import get_config, get_family, get_model_class, list_presets

if TYPE_CHECKING:
    from modelzoo.hf import from_hf
    from modelzoo.hf_write import to_hf
    from modelzoo.layers.cache import Cache
    from modelzoo.layers.stack import stack_layers, unstack_layers
    from modelzoo.lens import logit_lens
    from modelzoo.model import (
        Model,
        abstract_params,
        input_names,
        logical_axes,
        num_params,
        trainable,
        tuned,
        untuned,
    )
    from modelzoo.registry import *
    from modelzoo.tuning import Lora, Tuning

_HOMES = {
    "Cache": "layers.cache",
    "Lora": "tuning",
    "Model": "model",
    "Tuning": "tuning",
    "abstract_params": "model",
    "from_hf": "hf",
    "input_names": "model",
    "logical_axes": "model",
    "logit_lens": "lens",
    "num_params": "model",
    "stack_layers": "layers.stack",
    "to_hf": "hf_write",
    "trainable": "model",
    "tuned": "model",
    "unstack_layers": "layers.stack",
    "untuned": "model",
}
"""Loaded when first used: command lines answer before JAX is there, and a family that nobody asks for costs nothing."""


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return __dir__()
    if name in _HOMES:
        found = getattr(importlib.import_module(f"modelzoo.{_HOMES[name]}"), name)
    else:
        found = registry.find(name)
    if found is None:
        raise AttributeError(f"module 'modelzoo' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    families = registry.FAMILIES.values()
    classes = [cls.__name__ for family in families for cls in (family.config_class, *family.classes)]
    own = ("get_config", "get_family", "get_model_class", "list_presets")
    return sorted([*classes, *_HOMES, *own])
