"""What a model computes: transformer families as pure Flax modules. Imports nothing else of flaxtron.

config = modelzoo.get_config("tiny-gptj")
model = modelzoo.GPTJForCausalLM(config)
out = model.apply({"params": params}, input_ids=ids)
"""

from modelzoo.gptj.config import GPTJConfig
from modelzoo.gptj.model import (
    GPTJForCausalLM,
    GPTJForQuestionAnswering,
    GPTJForSequenceClassification,
    GPTJModel,
)
from modelzoo.hf import from_hf, to_hf
from modelzoo.layers.cache import Cache
from modelzoo.layers.stack import stack_layers, unstack_layers
from modelzoo.model import Model, abstract_params, input_names, logical_axes, num_params
from modelzoo.registry import get_config, get_family, get_model_class, list_presets

__all__ = [
    "Cache",
    "GPTJConfig",
    "GPTJForCausalLM",
    "GPTJForQuestionAnswering",
    "GPTJForSequenceClassification",
    "GPTJModel",
    "Model",
    "abstract_params",
    "from_hf",
    "get_config",
    "get_family",
    "get_model_class",
    "input_names",
    "list_presets",
    "logical_axes",
    "num_params",
    "stack_layers",
    "to_hf",
    "unstack_layers",
]
