"""Writing Hugging Face folders: `to_hf`, the inverse of `hf.from_hf`."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from modelzoo import hf_files, hf_match, placing, registry
from modelzoo import weights as tables
from modelzoo.model import Model, abstract_params
from modelzoo.tensor_files import safetensors_header


def to_hf(model: Model, params: Any, path: str | os.PathLike[str], max_shard_size: int | str = "5GB") -> None:
    """Writes a folder that transformers and `from_hf` open: safetensors and config.json.

    Nothing is seen half-written: files are made aside and moved into place, config.json last. The host holds
    one tensor at a time beside the parameters. Tokenizer files are the caller's. In a program of several
    processes call it on all of them, with parameters that each holds in full; the first writes.

    Args:
        model: the model.
        params: its parameters: as `from_hf` returns them, sharded, padded, unstacked (`unstack_layers`),
            boxed or numpy. Their dtype is the file's.
        path: the folder, made where it does not exist; a checkpoint in it is replaced.
        max_shard_size: bytes of tensors in one file, or a size such as "5GB"; past it there are several and
            an index.

    Raises:
        OSError: the folder cannot be written.
        ValueError: the parameters are not this model's, or are spread over processes; or a size that is none; or the
            model has knobs on (`modelzoo.knobs`), so that transformers has no class for it.
    """
    room = hf_files.parse_size(max_shard_size)
    family = registry.family_of(type(model))
    if family is None:
        raise ValueError(f"{type(model).__name__} is in no family that flaxtron can write")
    hf_match.check_knobs(model.config)
    shapes = tables.flatten(abstract_params(model))
    leaves = _leaves(nn.meta.unbox(params))
    hf_match.check_params(model, shapes, leaves)
    bound, ties = tables.bind(family.weights, shapes), model.config.tie_word_embeddings
    tensors = {name: tensor for tensor in bound for name in tensor.written(ties)}

    def parts(tensor: tables.StoredTensor) -> list[tuple[Any, int | None]]:
        """Of every parameter in a tensor, the array and the row of it."""
        held = [leaves[path] for path in tensor.paths]
        return [(leaf[None], tensor.layer) if None in leaf else (leaf[tensor.layer], None) for leaf in held]

    dtypes = {name: np.dtype(parts(tensor)[0][0].dtype) for name, tensor in tensors.items()}
    nbytes = {name: int(np.prod(tensor.shape)) * dtypes[name].itemsize for name, tensor in tensors.items()}
    shards = hf_files.plan_shards(nbytes, room)
    if jax.process_index():
        return
    with hf_files.replacing(Path(path)) as scratch:
        for shard in shards:
            # Wide elements first, so that every tensor begins on a multiple of its element.
            names = sorted(shard.tensors, key=lambda name: -dtypes[name].itemsize)
            with open(scratch / shard.name, "wb") as stream:
                stream.write(
                    safetensors_header({name: (dtypes[name], tensors[name].shape) for name in names})
                )
                for name in names:
                    data = placing.gather_tensor(tensors[name], parts(tensors[name]), dtypes[name])
                    stream.write(data.reshape(-1).view(np.uint8).data)
                stream.flush()
                os.fsync(stream.fileno())
        if len(shards) > 1:
            index = {
                "metadata": {
                    "total_parameters": sum(int(np.prod(tensor.shape)) for tensor in tensors.values()),
                    "total_size": sum(nbytes.values()),
                },
                "weight_map": {name: shard.name for shard in shards for name in shard.tensors},
            }
            _write_json(scratch / (hf_files.SAFETENSORS + hf_files.INDEX), index)
        widest = max(nbytes, key=lambda name: nbytes[name])
        config = model.config
        if (
            model.task == "question_answering"
        ):  # transformers makes that head num_labels wide, and splits it in two
            config = dataclasses.replace(config, num_labels=2, id2label=None)
        hf_config = config.to_hf() | {
            "architectures": [type(model).__name__],
            "torch_dtype": dtypes[widest].name,
        }
        _write_json(scratch / hf_files.CONFIG, hf_config)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _leaves(params: Any) -> dict[tables.Path, dict[int | None, Any]]:
    """Arrays by path and layer; layer None is a stacked array, or one that no stack holds."""
    leaves: dict[tables.Path, dict[int | None, Any]] = {}

    def walk(node: Any, path: tables.Path, layer: int | None) -> None:
        if isinstance(node, Mapping):
            for name, sub in node.items():
                walk(sub, (*path, name), layer)
        elif isinstance(node, (tuple, list)):
            for i, sub in enumerate(node):
                walk(sub, path, i)
        else:
            leaves.setdefault(path, {})[layer] = node

    walk(params, (), None)
    return leaves
