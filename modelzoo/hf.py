"""Hugging Face checkpoints in and out: `from_hf` streams a folder onto devices, `to_hf` writes one.

What a family's tensors are called and how they are laid out is in `<family>/weights.py`; this module decides
which class a folder holds, checks every tensor before any is read, and directs the traffic. Where it departs
from transformers: a missing tensor is an error, not a random value with a warning. Only a head that the
folder's class does not have at all (fine-tuning a classifier from a language model) is created, and a tensor
of another head of the family is left out; both are logged. A pooler is part of the head that reads it; a bare
trunk without one in its folder is loaded without. No torch is needed, and no code in a checkpoint is run.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from modelzoo import hf_files, hf_match, placing, registry
from modelzoo import weights as tables
from modelzoo.model import Model, abstract_params, logical_axes
from modelzoo.tensor_files import Reader, safetensors_header

default_rules: Callable[[Any], Any] | None = None
"""Makes sharding rules for a mesh; `parallel` sets it when it is imported, since modelzoo knows no meshes."""
Places = Mapping[tables.Path, tuple[tuple[int, ...], Sharding]]
"""Shape and sharding of every parameter."""
PROGRESS_BYTES = 256 << 20
"""Loads of more than this show a progress bar on a terminal."""


def from_hf(
    path: str | os.PathLike[str],
    model_class: type[Model] | str | None = None,
    mesh: Any = None,
    rules: Any = None,
    dtype: Any = None,
    param_dtype: Any = None,
) -> tuple[Any, dict[str, Any]]:
    """Loads a Hugging Face checkpoint, one tensor at a time, straight to where it is to lie.

    Args:
        path: a folder with config.json and model.safetensors or pytorch_model.bin (whole, or an index and its
            parts), or a hub id such as "EleutherAI/gpt-j-6b".
        model_class: the class to load, or its name; None takes the one that config.json names. A class with
            another head takes the trunk, and its own head is created.
        mesh: devices to spread the parameters over; None puts them on the first device.
        rules: `parallel.make_rules(mesh)` or a variant; None makes them from the mesh.
        dtype: computation dtype; None is the parameters' dtype.
        param_dtype: dtype to convert the parameters to on the way; None keeps what the file stores.

    Returns:
        (model, params): params is the canonical tree, the vocabulary padded as the mesh asks.

    Raises:
        OSError: there is no such folder or repository, or a file is missing or cannot be read.
        ValueError: an unknown model_type or class, a corrupt file, a pickle that would run code, or tensors
            that are missing, unexpected or of another shape than the config says: one error names all of
            them.
    """
    dtype, param_dtype = (
        _floating(name, value) for name, value in [("dtype", dtype), ("param_dtype", param_dtype)]
    )
    rules = _rules_for(mesh, rules)
    folder = hf_files.find_folder(path)
    hf_config = hf_files.read_json(folder / hf_files.CONFIG)
    try:
        family, chosen = hf_match.choose_class(hf_config, model_class)
        config = family.config_class.from_hf(hf_config)
    except ValueError as error:
        raise ValueError(f"{folder / hf_files.CONFIG}: {error}") from None
    refs = hf_files.find_tensors(folder)
    options = hf_match.trunk_options(family, chosen, refs)
    shapes = tables.flatten(abstract_params(chosen(config, **options)))
    other_class = chosen.__name__ not in (hf_config.get("architectures") or ())
    sources, new = hf_match.match_tensors(folder, chosen, family.weights, shapes, refs, other_class)

    dtypes = {
        path: hf_match.stored_dtype([source.ref for source in group], param_dtype)
        for path, group in sources.items()
    }
    if param_dtype is None:  # what most of the numbers are
        param_dtype = max(
            dtypes.values(), key=lambda d: sum(shapes[path].size for path in dtypes if dtypes[path] == d)
        )
    dtype = param_dtype if dtype is None else dtype
    model = chosen(config, dtype=dtype, param_dtype=param_dtype, **options)
    places = _places(model, shapes, rules)
    params = _read(sources, dtypes, places, folder.name)
    if new:
        params |= _initialise(model, {path: places[path] for path in new}, rules)
    return model, tables.unflatten({path: params[path] for path in shapes})


def _floating(name: str, value: Any) -> np.dtype | None:
    try:
        dtype = None if value is None else np.dtype(value)
    except TypeError:
        dtype = np.dtype(object)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name} = {value!r}: pass a floating-point dtype, such as jnp.bfloat16, or None")
    return dtype


def _read(
    sources: Mapping[tables.Path, list[placing.Source]],
    dtypes: Mapping[tables.Path, np.dtype],
    places: Places,
    what: str,
) -> dict[tables.Path, jax.Array]:
    """Reads all parameters, one after the other, the tensors of each side by side."""
    every = [source for group in sources.values() for source in group]
    total = sum(source.ref.nbytes // len(source.tensor.paths) for source in every)
    params = {}
    with (
        Reader() as reader,
        ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as workers,
        _progress(f"loading {what}", total) as progress,
    ):
        for file in {source.ref.file for source in every}:
            reader.open(file)
        for path, group in sources.items():
            shape, sharding = places[path]
            params[path] = placing.read_array(shape, dtypes[path], sharding, group, reader, workers, progress)
    return params


def _rules_for(mesh: Any, rules: Any) -> Any:
    if rules is None and mesh is not None:
        if default_rules is None:
            raise ValueError("a mesh without rules: pass rules=parallel.make_rules(mesh), or import parallel")
        return default_rules(mesh)
    if rules is not None and mesh is not None and rules.mesh != mesh:
        raise ValueError(
            "rules are of another mesh than mesh: pass one of the two, or rules=make_rules(mesh)"
        )
    return rules


def _places(model: Model, shapes: Mapping[tables.Path, jax.ShapeDtypeStruct], rules: Any) -> Places:
    """Shape, padded for the mesh, and sharding of every parameter."""
    if rules is None:
        device = SingleDeviceSharding(jax.local_devices()[0])
        return {path: (spec.shape, device) for path, spec in shapes.items()}
    places = {}
    for path, names in tables.flatten(logical_axes(model)).items():
        shape = tuple(rules.padded_shape(names, shapes[path].shape))
        try:
            places[path] = (shape, rules.sharding(names, shape))
        except ValueError as error:
            raise ValueError(f"parameter {'/'.join(path)} {shape}: {error}") from None
        rules.check_replication("/".join(path), names, shape)
    return places


def _initialise(model: Model, places: Places, rules: Any) -> dict[tables.Path, jax.Array]:
    """Fresh parameters at `places`, from a fixed key; the rest of the model is traced, never computed."""

    def init(rng: jax.Array) -> dict[tables.Path, jax.Array]:
        variables = model.init(rng, input_ids=jnp.zeros((1, 1), jnp.int32))
        params = tables.flatten(nn.meta.unbox(variables["params"]))
        grown = {}
        for path, (shape, _) in places.items():
            grown[path] = jnp.pad(
                params[path], [(0, to - dim) for to, dim in zip(shape, params[path].shape, strict=True)]
            )
        return grown

    shardings = {path: sharding for path, (_, sharding) in places.items()}
    mesh = placing.mesh_of(jax.local_devices()[0]) if rules is None else rules.mesh
    with jax.set_mesh(mesh), nn.logical_axis_rules(()):  # not what the caller may have set
        return jax.jit(init, out_shardings=shardings)(jax.random.key(0))


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on the terminal for long loads; yields what to call with bytes done, from any thread."""
    if total < PROGRESS_BYTES or not sys.stderr.isatty() or jax.process_index():
        yield lambda nbytes: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda nbytes: bar.advance(task, nbytes)


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
        ValueError: the parameters are not this model's, or are spread over processes; or a size that is none.
    """
    room = hf_files.parse_size(max_shard_size)
    family = next((family for family in registry.FAMILIES.values() if type(model) in family.classes), None)
    if family is None:
        raise ValueError(f"{type(model).__name__} is in no family that flaxtron can write")
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
