"""The models of tests/fixtures: every class with drawn weights, its inputs, and what transformers answered."""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

import modelzoo
from modelzoo import registry
from tests.zoo import FIXTURES, drawn

CLASSES = {cls.__name__: family for family in registry.FAMILIES.values() for cls in family.classes}
"""Class -> its family, of the whole zoo."""


class Stored(NamedTuple):
    """A class under one config.

    Attributes:
        weights: transformers' name -> tensor.
        model: ours.
        params: as `from_hf` read them.
        answers: options of the inputs -> what is stored of them.
    """

    weights: dict[str, np.ndarray]
    model: Any
    params: Any
    answers: dict[str, dict[str, Any]]


@functools.cache
def fixtures(model_type: str) -> dict[str, Any]:
    """A family's file as a tree: class, config, options, inputs or outputs or labels."""
    tree: dict[str, Any] = {}
    with np.load(FIXTURES / f"{model_type}.npz") as arrays:
        for key in arrays.files:
            *parents, name = key.split("/")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[name] = arrays[key]
    return tree


def together(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields; those stored one by one, as hidden states are, as tuples."""
    return {k: tuple(v.values()) if isinstance(v, dict) else v for k, v in fields.items()}


@functools.cache
def stored(name: str) -> list[Stored]:
    """A class's models, read by `from_hf` from a folder such as transformers writes."""
    found = []
    for answers in fixtures(CLASSES[name].model_type)[name].values():
        answers = dict(answers)
        about = json.loads(str(answers.pop("about")))
        weights = {
            key: drawn(key, tuple(shape), 1.0 if key in about["scales"] else 0.0)
            for key, shape in about["tensors"].items()
        }
        with tempfile.TemporaryDirectory() as folder:
            save_file(weights, Path(folder, "model.safetensors"))
            Path(folder, "config.json").write_text(json.dumps(about["config"]), encoding="utf-8")
            found.append(Stored(weights, *modelzoo.from_hf(folder), answers))
    return found
