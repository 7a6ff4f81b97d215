"""Writes tests/fixtures: transformers' answers, losses, gradients and parameter counts, so that tests need no torch.

    python -m tests.parity.make_fixtures [MODEL_TYPE ...]

Weights are not stored: they follow from their names (`tests.zoo.drawn`), and the files hold names and shapes. Of each
gradient there is its norm and its product with a drawn direction.
"""

import json
import sys
from typing import Any

import numpy as np
import torch
import transformers

from modelzoo import registry
from tests.parity import cases
from tests.parity.labels import batches
from tests.parity.pairs import (
    Pair,
    ask,
    forward,
    norm_scales,
    our_fields,
    pair,
    stored_tensors,
    their_fields,
    their_loss,
)
from tests.zoo import COUNTS, FIXTURES, drawn

LABELS = 5


def answers(name: str, with_gradients: bool) -> dict[str, np.ndarray]:
    """Everything that is kept of a class, under CLASS/CONFIG/INPUTS/..."""
    arrays: dict[str, np.ndarray] = {}
    is_trunk = registry.get_model_class(name).task == "base"
    for title, options in cases.cells("fixtures", name):
        both, place = pair(name, title, num_labels=LABELS), f"{name}/{title}/{options}"
        shapes = {key: list(tensor.shape) for key, tensor in stored_tensors(both.theirs).items()}
        about = {"config": both.theirs.config.to_diff_dict() | {"architectures": [name]}}
        about |= {"tensors": shapes, "scales": sorted(norm_scales(both.theirs))}
        arrays[f"{name}/{title}/about"] = np.array(json.dumps(about))
        inputs = both.inputs(options)
        out = ask(both.theirs, inputs, output_attentions=is_trunk, output_hidden_states=is_trunk)
        arrays |= _flat(f"{place}/inputs", inputs) | _flat(f"{place}/outputs", their_fields(out))
        if not is_trunk:
            arrays |= loss(both, inputs, place, with_gradients)
            with_gradients = False
    return arrays


def loss(both: Pair, inputs: dict[str, Any], place: str, with_gradients: bool) -> dict[str, np.ndarray]:
    """Labels and their loss, and perhaps what shows its gradients."""
    given = batches(both.ours.task, our_fields(forward(both.ours, both.params, inputs)))[0]
    both.theirs.zero_grad()
    value = their_loss(both.theirs, inputs, given)
    arrays = _flat(f"{place}/labels", given.labels) | {f"{place}/loss": value.detach().numpy()}
    if with_gradients:
        value.backward()
        for key, tensor in both.theirs.named_parameters():
            gradient = np.zeros(tensor.shape) if tensor.grad is None else tensor.grad.double().numpy()
            slope = np.vdot(drawn(f"{key} direction", gradient.shape).astype(np.float64), gradient)
            arrays[f"{place}/gradients/{key}"] = np.array([np.linalg.norm(gradient), slope])
    return arrays


def _flat(place: str, values: dict[str, Any]) -> dict[str, np.ndarray]:
    arrays = {}
    for key, value in values.items():
        if isinstance(value, tuple):
            arrays |= {f"{place}/{key}/{i}": array for i, array in enumerate(value)}
        else:
            arrays[f"{place}/{key}"] = value
    return arrays


def counts(family: registry.Family) -> dict[str, dict[str, int]]:
    """transformers' parameter counts of every preset and class; nothing is allocated."""
    return {
        preset: {
            cls.__name__: sum(t.numel() for t in stored_tensors(unallocated(cls.__name__, config)).values())
            for cls in family.classes
        }
        for preset, config in family.presets.items()
    }


def unallocated(name: str, config: Any) -> Any:
    """transformers' model of one of our configs, on torch's meta device."""
    theirs = getattr(transformers, name)
    with torch.device("meta"):
        return theirs(theirs.config_class.from_dict(config.to_hf()))


def main(model_types: list[str]) -> None:
    """Writes the families' files."""
    FIXTURES.mkdir(exist_ok=True)
    numbers = json.loads(COUNTS.read_text(encoding="utf-8")) if COUNTS.exists() else {}
    for model_type in model_types or registry.FAMILIES:
        family = registry.get_family(model_type)
        names = [cls.__name__ for cls in family.classes]
        shown = next(cls.__name__ for cls in family.classes if cls.task != "base")
        arrays: dict[str, Any] = {}
        for name in names:
            arrays |= answers(name, with_gradients=name == shown)
        np.savez_compressed(FIXTURES / f"{model_type}.npz", **arrays)
        numbers |= counts(family)
        print(model_type, len(arrays), "arrays", (FIXTURES / f"{model_type}.npz").stat().st_size, "bytes")
    COUNTS.write_text(json.dumps(numbers, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
