"""Hugging Face checkpoints in: `from_hf` streams a folder onto devices (`hf_write.to_hf` writes one).

What a family's tensors are called and how they are laid out is in `<family>/weights.py`; this module decides
which class a folder holds, checks every tensor before any is read, and directs the traffic. Where it departs
from transformers: a missing tensor is an error, not a random value with a warning. Only a head that the
folder's class does not have at all (fine-tuning a classifier from a language model) is created, and a tensor
of another head of the family is left out; both are logged. A pooler is part of the head that reads it; a bare
trunk without one in its folder is loaded without. No torch is needed, and no code in a checkpoint is run.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from modelzoo import hf_files, hf_match, placing, quantizing
from modelzoo import weights as tables
from modelzoo.hf_headers import Headers
from modelzoo.model import Model, abstract_params, logical_axes
from modelzoo.tensor_files import Reader

default_rules: Callable[[Any], Any] | None = None
"""Makes sharding rules for a mesh; `parallel` sets it when it is used, since modelzoo knows no meshes."""


class Place(NamedTuple):
    """Shape and sharding of a parameter."""

    shape: tuple[int, ...]
    sharding: Sharding


Places = Mapping[tables.Path, Place]
PROGRESS_BYTES = 256 << 20
"""Loads of more than this show a progress bar on a terminal."""


def from_hf(
    path: str | os.PathLike[str],
    model_class: type[Model] | str | None = None,
    mesh: Any = None,
    rules: Any = None,
    dtype: Any = None,
    param_dtype: Any = None,
    unstack: bool = False,
    quantize: str | None = None,
    config: Any = None,
) -> tuple[Any, dict[str, Any]]:
    """Loads a Hugging Face checkpoint, one tensor at a time, straight to where it is to lie.

    In a program of several processes each reads only what its own devices hold.

    Args:
        path: a folder with config.json and model.safetensors or pytorch_model.bin (whole, or an index and its
            parts), or a hub id such as "EleutherAI/gpt-j-6b".
        model_class: the class to load, or its name; None takes the one that config.json names. A class with
            another head takes the trunk, and its own head is created.
        mesh: devices to spread the parameters over; None puts them on the first device.
        rules: `parallel.make_rules(mesh)` or a variant; None makes them from the mesh.
        dtype: computation dtype; None is the parameters' dtype.
        param_dtype: dtype to convert the parameters to on the way; None keeps what the file stores.
        unstack: one tree per layer rather than stacked layers, which is what decoding wants: then nothing has to be
            copied afterwards.
        quantize: "int8" turns the kernels (`modelzoo.quantizing`) into int8 on the way in. Of one layer's kernel at a
            time there is a copy in full precision, sharded, on the devices. It unstacks too.
        config: in place of config.json's, such as one with other classes or dropout; None takes that.

    Returns:
        (model, params): params is the canonical tree, or with layers unstacked, the vocabulary padded as the mesh asks.

    Raises:
        OSError: there is no such folder or repository, or a file is missing or cannot be read.
        ValueError: an unknown model_type or class, a corrupt file, a pickle that would run code, or tensors
            that are missing, unexpected or of another shape than the config says: one error names all of
            them.
    """
    dtype, param_dtype = (
        _floating(name, value) for name, value in [("dtype", dtype), ("param_dtype", param_dtype)]
    )
    quantizing.check_kind(quantize)
    rules = _rules_for(mesh, rules)
    opened = open_folder(path, model_class, dtype, param_dtype, config=config)
    model, shapes = opened.model, opened.shapes
    places = _places(model, shapes, rules)
    shared = {} if quantize is None else quantizing.shared_dims(model)
    params = _read(opened, places, shared, unstack or quantize is not None)
    if opened.new:
        params |= _initialise(model, {path: places[path] for path in opened.new}, rules)
    ordered = sorted(params, key=lambda path: list(shapes).index(_canonical(path)))
    return model, _tuples(tables.unflatten({path: params[path] for path in ordered}))


@dataclasses.dataclass(frozen=True)
class OpenedFolder:
    """A folder whose headers have been read and matched with a model, and whose tensors have not.

    Attributes:
        folder: where it is.
        model: the model that it becomes.
        shapes: its parameters.
        sources: the tensors that each of them consists of.
        dtypes: the dtype that each of them gets.
        new: the parameters that the folder does not have.
    """

    folder: Path
    model: Model
    shapes: Mapping[tables.Path, jax.ShapeDtypeStruct]
    sources: Mapping[tables.Path, list[placing.Source]]
    dtypes: Mapping[tables.Path, np.dtype]
    new: list[tables.Path]


def open_folder(
    path: str | os.PathLike[str],
    model_class: type[Model] | str | None = None,
    dtype: Any = None,
    param_dtype: Any = None,
    headers: Headers | None = None,
    config: Any = None,
) -> OpenedFolder:
    """Reads a checkpoint's config and headers, and matches them.

    Args:
        path, model_class, dtype, param_dtype, config: as `from_hf`.
        headers: finds what is in a folder that need not be whole.

    Raises:
        OSError, ValueError: as `from_hf`.
    """
    folder = hf_files.find_folder(path)
    hf_files.check_is_no_run(folder)
    hf_config = hf_files.read_json(folder / hf_files.CONFIG)
    try:
        family, chosen = hf_match.choose_class(hf_config, model_class)
        config = family.config_class.from_hf(hf_config) if config is None else config
        hf_match.check_knobs(config)
    except ValueError as error:
        raise ValueError(f"{folder / hf_files.CONFIG}: {error}") from None
    if headers is None:
        refs = hf_files.find_tensors(folder)
    else:
        wanted = tables.bind(family.weights, tables.flatten(abstract_params(chosen(config))))
        refs = headers.find(folder, family.weights, wanted)
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
    return OpenedFolder(folder, model, shapes, sources, dtypes, new)


def _floating(name: str, value: Any) -> np.dtype | None:
    try:
        dtype = None if value is None else np.dtype(value)
    except TypeError:
        dtype = np.dtype(object)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name} = {value!r}: pass a floating-point dtype, such as jnp.bfloat16, or None")
    return dtype


def _read(
    opened: OpenedFolder, places: Places, shared: Mapping[tables.Path, tuple[int, ...]], unstack: bool
) -> dict[tables.Path, Any]:
    """Reads all parameters, one array after the other, the tensors of each, or the parts of one, side by side.

    An unstacked array has its layer's number in its path, before the names of what is in the layer.
    """
    sources = opened.sources
    regions = {path: placing.local_regions(place.sharding, place.shape) for path, place in places.items()}
    total = sum(placing.bytes_to_read(regions[path], one) for path, group in sources.items() for one in group)
    params: dict[tables.Path, Any] = {}
    with (
        Reader() as reader,
        ThreadPoolExecutor(max_workers=placing.WORKERS) as workers,
        _progress(f"loading {opened.folder.name}", total) as progress,
    ):
        for file in {source.ref.file for group in sources.values() for source in group}:
            reader.open(file)
        for path, group in sources.items():
            parts = [(path, places[path], group)]
            if unstack and group[0].tensor.layer is not None:
                parts = [_layer(path, places[path], source) for source in group]
            for name, place, part in parts:
                # What becomes int8 is rounded once, from what the file says.
                dtype = hf_match.rounded_dtype(part[0].ref) if path in shared else opened.dtypes[path]
                array = placing.read_array(
                    place.shape, dtype, place.sharding, part, reader, workers, progress
                )
                if path in shared:
                    array = jax.block_until_ready(quantizing.quantize_array(array, shared[path]))
                params[name] = array
    return params


def _layer(
    path: tables.Path, place: Place, source: placing.Source
) -> tuple[tables.Path, Place, list[placing.Source]]:
    """One layer of a stacked parameter, as an array of its own."""
    number, sharding = source.tensor.layer, place.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    at = path.index("layers") + 1
    alone = dataclasses.replace(source, tensor=dataclasses.replace(source.tensor, layer=None))
    return (*path[:at], str(number), *path[at:]), Place(place.shape[1:], sharding), [alone]


def _canonical(path: tables.Path) -> tables.Path:
    """The path without a layer's number."""
    return tuple(name for name in path if not name.isdigit())


def _tuples(tree: Any) -> Any:
    """A tree with tuples for the mappings from layers' numbers."""
    if not isinstance(tree, Mapping):
        return tree
    below = {name: _tuples(sub) for name, sub in tree.items()}
    if not all(name.isdigit() for name in below):
        return below
    return tuple(below[str(number)] for number in range(len(below)))


def _rules_for(mesh: Any, rules: Any) -> Any:
    if rules is None and mesh is not None:
        if default_rules is None:
            raise ValueError("a mesh without rules: pass rules=parallel.make_rules(mesh)")
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
        return {path: Place(spec.shape, device) for path, spec in shapes.items()}
    places = {}
    for path, names in tables.flatten(logical_axes(model)).items():
        shape = tuple(rules.padded_shape(names, shapes[path].shape))
        try:
            places[path] = Place(shape, rules.sharding(names, shape))
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
