"""transformers' GPT-J beside ours: a model with the same weights, and what it says of numpy inputs."""

import dataclasses
from typing import Any

import numpy as np
import torch
import transformers

import modelzoo
from tests.gptj_state import params_from_state

CLASSES = ("GPTJModel", "GPTJForCausalLM", "GPTJForSequenceClassification", "GPTJForQuestionAnswering")


def torch_config(config: modelzoo.GPTJConfig) -> transformers.GPTJConfig:
    """The same config for transformers, its attention written out ("eager")."""
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name != "id2label"}
    return transformers.GPTJConfig(**fields, attn_implementation="eager")


def make_pair(
    name: str, config: modelzoo.GPTJConfig, seed: int = 0, scale: float = 0.2
) -> tuple[Any, Any, Any]:
    """(transformers' model, ours, our parameters), weights drawn so that attention is far from uniform."""
    theirs = getattr(transformers, name)(torch_config(config)).eval()
    torch.manual_seed(seed)  # here, so that the trunk, drawn first, is the same in every class
    for key, tensor in theirs.named_parameters():
        is_scale = key.endswith(("ln_1.weight", "ln_f.weight"))
        tensor.data.normal_(1.0 if is_scale else 0.0, scale)
    state = {key: tensor.detach().numpy().copy() for key, tensor in theirs.state_dict().items()}
    return theirs, modelzoo.get_model_class(name)(config), params_from_state(state, config)


def ask(theirs: Any, inputs: dict[str, Any], **flags: Any) -> Any:
    """The model's output for numpy inputs, without gradients."""
    with torch.no_grad():
        return theirs(**{name: to_torch(value) for name, value in inputs.items()}, **flags)


def to_torch(value: Any) -> Any:
    """A tensor; integers become int64, as torch's embeddings want them."""
    if not isinstance(value, np.ndarray):
        return value
    return torch.from_numpy(value.astype(np.int64) if value.dtype.kind == "i" else value)
