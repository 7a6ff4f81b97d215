"""transformers' model beside ours, with the same weights: drawn, saved by transformers, read by `modelzoo.from_hf`."""

import functools
import inspect
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from transformers.modeling_outputs import ModelOutput

import modelzoo
from modelzoo.model import CHOICE_TASKS
from tests.parity.cases import cases_of
from tests.parity.inputs import CHOICES, make_inputs
from tests.parity.labels import Labelled
from tests.zoo import drawn, quick_jit


class Pair(NamedTuple):
    """One class under one config.

    Attributes:
        theirs: transformers' model, in evaluation mode.
        ours: the model.
        params: its parameters.
    """

    theirs: Any
    ours: Any
    params: Any

    def inputs(self, options: str, seed: int = 0) -> dict[str, Any]:
        """Numpy inputs for `options` of tests/parity/inputs.py."""
        name = type(self.ours).__name__
        choices = CHOICES if self.ours.task in CHOICE_TASKS else None
        return make_inputs(options, self.theirs.config, choices, cases_of(name).options, seed)


def torch_model(name: str, fields: Mapping[str, Any], seed: int = 0, scale: float = 0.2) -> Any:
    """transformers' model of a class, every tensor that a file keeps drawn so that it shows in the outputs."""
    fields = dict(fields)
    if name.endswith("QuestionAnswering"):
        fields["num_labels"] = 2  # it sizes the head, which is split in two
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**fields, attn_implementation="eager")).eval()
    scales = norm_scales(model)
    with torch.no_grad():
        for key, tensor in stored_tensors(model).items():
            center = 1.0 if key in scales else 0.0
            tensor.copy_(torch.from_numpy(drawn(key, tuple(tensor.shape), center, seed, scale)))
    return model


def norm_scales(model: Any) -> set[str]:
    """The parameters that lie around one."""
    norms = (
        (path, module) for path, module in model.named_modules() if isinstance(module, torch.nn.LayerNorm)
    )
    return {f"{path}.weight" for path, _ in norms}


def stored_tensors(model: Any) -> dict[str, Any]:
    """Parameters, tied ones once, and floating-point buffers that files keep."""
    kept = model.state_dict(keep_vars=True)
    buffers = {key: kept[key] for key, value in model.named_buffers() if key in kept}
    tensors = dict(model.named_parameters()) | buffers
    return {key: tensor for key, tensor in tensors.items() if tensor.is_floating_point()}


@functools.cache
def pair(name: str, title: str, **changes: Any) -> Pair:
    """The models of a class and a config of its cases; weights travel by files.

    Args:
        name: the class.
        title: the config's.
        changes: fields of transformers' config to change.
    """
    return make_pair(name, {**cases_of(name).configs[title], **changes})


def make_pair(name: str, fields: Mapping[str, Any], seed: int = 0, scale: float = 0.2) -> Pair:
    """As `pair`, of any config."""
    theirs = torch_model(name, fields, seed, scale)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours, params = modelzoo.from_hf(folder)
    assert type(ours).__name__ == name
    return Pair(theirs, ours, params)


def to_torch(value: Any) -> Any:
    """Tensors for numpy arrays; integers become int64, as torch's embeddings want them."""
    if isinstance(value, tuple):
        return tuple(map(to_torch, value))
    if not isinstance(value, np.ndarray):
        return value
    return torch.from_numpy(value.astype(np.int64) if value.dtype.kind == "i" else value)


def ask(theirs: Any, inputs: Mapping[str, Any], **flags: Any) -> Any:
    """The model's output for numpy inputs, without gradients."""
    with torch.no_grad():
        return theirs(**{name: to_torch(value) for name, value in inputs.items()}, **flags)


def their_loss(theirs: Any, inputs: Mapping[str, Any], given: Labelled) -> Any:
    """The loss that transformers computes, with its graph; of two heads, whose losses it returns apart, their sum."""
    theirs.config.problem_type = given.problem_type  # a first call sets it, where it was None
    try:
        out = theirs(**{name: to_torch(value) for name, value in {**inputs, **given.labels}.items()})
        return sum(value for name, value in out.items() if name in LOSSES)
    finally:
        theirs.config.problem_type = None


@functools.partial(quick_jit, static_argnames=("model", "flags"))
def _forward(model: Any, params: Any, inputs: Any, flags: Any) -> Any:
    return model.apply({"params": params}, **inputs, **dict(flags))


def forward(model: Any, params: Any, inputs: Mapping[str, Any], **flags: Any) -> Any:
    """Ours, with hidden states and attentions, in one program."""
    flags = dict(output_attentions=True, output_hidden_states=True) | flags
    return _forward(model, params, jax.tree.map(jnp.asarray, dict(inputs)), tuple(sorted(flags.items())))


Fields = dict[str, Any]
"""Documented fields that are not None: name -> array, or tuple of arrays."""
LOSSES = {"loss", "mc_loss"}
APART = {"past_key_values", "cache"} | LOSSES


def their_fields(out: ModelOutput) -> Fields:
    """The fields of transformers' output as numpy."""

    def plain(value: Any) -> Any:
        return tuple(map(plain, value)) if isinstance(value, tuple) else value.detach().numpy()

    return {name: plain(value) for name, value in out.items() if name not in APART}


def our_fields(out: Any) -> Fields:
    """The fields of our output."""
    found = {name: getattr(out, name) for name in type(out).__dataclass_fields__}
    return {name: value for name, value in found.items() if name not in APART and value is not None}


def differences(have: Fields, want: Fields) -> dict[str, float]:
    """The largest absolute difference of every array; the fields and shapes must be the same ones.

    Returns:
        Names such as "logits" or "attentions[1]" with the difference; infinite where one holds no number.
    """
    assert have.keys() == want.keys(), (
        f"fields only of ours: {sorted(have.keys() - want.keys())}, only of theirs: {sorted(want.keys() - have.keys())}"
    )
    found = {}
    for name, value in want.items():
        mine = have[name]
        if not isinstance(value, tuple):
            found[name] = _difference(name, mine, value)
            continue
        assert isinstance(mine, tuple), f"{name}: ours is no tuple"
        assert len(mine) == len(value), f"{name}: ours has {len(mine)} entries, theirs {len(value)}"
        for i, (a, b) in enumerate(zip(mine, value, strict=True)):
            found[f"{name}[{i}]"] = _difference(f"{name}[{i}]", a, b)
    return found


def _difference(name: str, have: Any, want: np.ndarray) -> float:
    have = np.asarray(have, np.float64)
    assert have.shape == want.shape, f"{name}: shape {have.shape}, theirs {want.shape}"
    assert np.isfinite(want).all(), f"{name}: theirs is not finite; choose other inputs"
    difference = np.max(np.abs(have - want), initial=0.0)
    return float(difference) if np.isfinite(difference) else float("inf")


def check_within(found: Mapping[str, float], tolerance: float) -> float:
    """The largest of some differences, which must lie within a tolerance."""
    wrong = [f"{name}: {value:.3g}" for name, value in found.items() if not value <= tolerance]
    assert not wrong, f"more than {tolerance:.3g} apart: {', '.join(wrong)}"
    return max(found.values())


NO_INPUTS = {
    *(
        "self",
        "kwargs",
        "deprecated_arguments",
        "past_key_values",
        "use_cache",
        "cache_position",
        "return_dict",
    ),
    *("labels", "mc_labels", "next_sentence_label", "start_positions", "end_positions"),
    *("output_attentions", "output_hidden_states"),
}


def keywords(name: str) -> set[str]:
    """The keywords of transformers' forward that are inputs: neither labels, flags nor its cache."""
    return set(inspect.signature(getattr(transformers, name).forward).parameters) - NO_INPUTS
