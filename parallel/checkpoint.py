"""Sharded arrays to and from disk (Orbax), in a layout that shows no trace of the mesh.

A checkpoint holds vocabularies at their true size and layers stacked, so it opens on any mesh: what a mesh
pads is cut on the way out and filled with zeros on the way in, and each process writes and reads only its
devices' slices.

A run's folder has checkpoints/STEP/, and each step's folder

    params/        the canonical parameters
    ema/           by name, the moving average of those that were trained, if the run kept one
    ...            what else the writer keeps (`train.saving`)
    config.json    and other texts: config.gin, tokenizer.json; lora.json where the parameters have adapters

`latest_checkpoint` and `restore_params` are all that inference needs of it.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

import modelzoo
from modelzoo import tuning
from parallel.rules import Rules
from parallel.shard import abstract_sharded_params

PARAMS = "params"
"""The folder of a checkpoint that holds the parameters."""

AVERAGE = "ema"
"""The folder of a checkpoint that holds the moving average of the parameters that train, by name, if there is one."""

CHECKPOINTS = "checkpoints"
"""The folder of a run that holds its checkpoints."""

CONFIG, ADAPTERS = "config.json", "lora.json"
"""Beside the arrays of a checkpoint: the model's config, and what adapters it has, if any."""

_CHUNK_BYTES = 2**26  # pieces that a file is cut into: a reader of one shard need not read the whole array
_COMMITTED = "commit_success.txt"  # Orbax writes it last


def as_path(path: str | os.PathLike[str]) -> epath.Path:
    """An absolute path, of a local file or of a store such as gs://."""
    text = os.fspath(path)
    return epath.Path(text if "://" in text else os.path.abspath(os.path.expanduser(text)))


def latest_checkpoint(path: str | os.PathLike[str]) -> epath.Path:
    """The newest finished checkpoint under a path. Needs no Orbax.

    Args:
        path: a run's folder, its checkpoints folder, or a checkpoint itself.

    Returns:
        The checkpoint's folder, named by its step; it has the methods of pathlib.Path.

    Raises:
        OSError: there is none.
    """
    folder = as_path(path)
    if _is_finished(folder):
        return folder
    where = folder / CHECKPOINTS if (folder / CHECKPOINTS).is_dir() else folder
    steps = finished_steps(where)
    if not steps:
        why = "it has no finished checkpoint" if where.is_dir() else "there is no such folder"
        raise OSError(f"no checkpoint at {str(path)!r}: {why}")
    return where / str(steps[-1])


def finished_steps(checkpoints: str | os.PathLike[str]) -> list[int]:
    """The steps in a checkpoints folder that were written to their end, in order."""
    folder = as_path(checkpoints)
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(f.name) for f in found if re.fullmatch("[0-9]+", f.name) and _is_finished(f))


def restore_params(
    path: str | os.PathLike[str],
    model: modelzoo.Model,
    rules: Rules | None = None,
    dtype: Any = None,
    average: bool = True,
) -> Any:
    """Reads a checkpoint's parameters, each device its own slices; adapters come merged into their kernels.

    Args:
        path: a checkpoint, or a run's folder: its newest one.
        model: the model that they belong to, without its tuning.
        rules: where they are to lie; None is the default device.
        dtype: to convert them to; None is the model's param_dtype.
        average: where the run kept a moving average of what it trained, take that.

    Returns:
        The canonical parameter tree, vocabularies padded to what the mesh divides.

    Raises:
        OSError: there is no checkpoint.
        ValueError: it is of another architecture or shape; names what differs.
    """
    dtype = model.param_dtype if dtype is None else dtype
    return tuning.merge(restore_adapted(path, model, rules, dtype, average)[1], dtype)


def restore_adapted(
    path: str | os.PathLike[str],
    model: modelzoo.Model,
    rules: Rules | None = None,
    dtype: Any = None,
    average: bool = True,
) -> tuple[Any, Any]:
    """As `restore_params`, with adapters beside their kernels.

    Returns:
        (the model with the adapters that the checkpoint has, the parameters; adapters and their kernels in float32).
    """
    folder = latest_checkpoint(path)
    model, dtype = with_saved_adapters(folder, model), model.param_dtype if dtype is None else dtype
    target = abstract_sharded_params(model, rules)
    shapes = jax.tree.map(lambda t: t.shape, modelzoo.abstract_params(model))
    # What is merged is rounded once, from what the file says.
    kept = tuning.adapted(shapes)
    target = jax.tree.map(
        lambda leaf, exact: leaf.update(dtype=jnp.float32 if exact else dtype), target, kept
    )
    params = restore_tree(folder / PARAMS, target, shapes, type(model).__name__)
    if average and (folder / AVERAGE).is_dir():
        params = _with_average(folder / AVERAGE, params, target, shapes, type(model).__name__)
    return model, params


def _with_average(folder: epath.Path, params: Any, target: Any, shapes: Any, what: str) -> Any:
    """The parameters, those that have an average replaced by it."""
    stored = stored_names(folder)

    def chosen(tree: Any) -> dict[str, Any]:
        leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda x: isinstance(x, tuple))
        named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
        return {name: leaf for name, leaf in named.items() if name in stored}

    found = restore_tree(folder, chosen(target), chosen(shapes), f"the average of {what}")

    def choose(path: Any, leaf: Any) -> Any:
        return found.get(jax.tree_util.keystr(path, simple=True, separator="."), leaf)

    return jax.tree.map_with_path(choose, params)


def stored_names(folder: str | os.PathLike[str]) -> set[str]:
    """The names in a folder that `save_args` wrote from a flat dict.

    Raises:
        OSError: there is no such folder, or it is damaged.
    """
    import orbax.checkpoint as ocp

    silence()
    folder = as_path(folder)
    if not folder.is_dir():
        raise OSError(f"no checkpoint at {str(folder)!r}")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader, _damage(folder):
        return set(reader.metadata(folder).item_metadata.tree)


def texts_of(model: modelzoo.Model) -> dict[str, str]:
    """What lies beside the arrays of a checkpoint to say what model it is of: {file: contents}."""
    texts = {CONFIG: model.config.to_hf() | {"architectures": [type(model).__name__]}}
    if model.tuning is not None and model.tuning.lora is not None:
        texts[ADAPTERS] = dataclasses.asdict(model.tuning.lora)
    return {name: json.dumps(content, indent=2) + "\n" for name, content in texts.items()}


def with_saved_adapters(folder: Any, model: Any) -> Any:
    """The model with the adapters that a checkpoint of it has.

    Args:
        folder: of the checkpoint.
        model: its own tuning is left out.

    Raises:
        ValueError: the file that describes them is damaged.
    """
    file, model = folder / ADAPTERS, modelzoo.untuned(model)
    if not file.exists():
        return model
    try:
        lora = modelzoo.Lora(**json.loads(file.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    return modelzoo.tuned(model, modelzoo.Tuning(lora=lora))


def save_args(tree: Any, shapes: Any) -> Any:
    """What Orbax needs to write a tree, as `orbax.checkpoint.args`.

    Args:
        tree: nested dicts of arrays.
        shapes: the same tree of the shapes to write; larger arrays are cut.
    """
    import orbax.checkpoint as ocp

    tree = jax.tree.map(cut, tree, shapes)
    pieces = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
    return ocp.args.PyTreeSave(tree, save_args=pieces)


def save_tree(folder: str | os.PathLike[str], tree: Any, shapes: Any) -> None:
    """Writes a tree of arrays and returns when it is on disk.

    Args:
        folder: to be created.
        tree, shapes: as in `save_args`.

    Raises:
        OSError: the folder is there already or cannot be written.
    """
    import orbax.checkpoint as ocp

    silence()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
        try:
            writer.save(as_path(folder), args=save_args(tree, shapes))
        except ValueError as error:  # Orbax's way to say that the folder exists
            raise OSError(f"cannot write {str(folder)!r}: {str(error).splitlines()[0]}") from None


def restore_tree(folder: str | os.PathLike[str], target: Any, shapes: Any, what: str) -> Any:
    """Reads a tree of arrays onto its devices.

    Args:
        folder: as written by `save_args`.
        target: nested dicts of jax.ShapeDtypeStruct: the shapes wanted, dtypes, and shardings (None: default
            device).
        shapes: the same tree of the shapes that the file must have; a larger target is filled up with zeros.
        what: what the tree belongs to, for the error.

    Raises:
        OSError: there is no such folder, or it is damaged.
        ValueError: the file holds other names or shapes; all of them are listed.
    """
    import orbax.checkpoint as ocp

    silence()
    folder = as_path(folder)
    if not folder.is_dir():
        raise OSError(f"no checkpoint at {str(folder)!r}")

    def read_as(leaf: jax.ShapeDtypeStruct) -> Any:
        sharding = SingleDeviceSharding(jax.local_devices()[0]) if leaf.sharding is None else leaf.sharding
        return ocp.ArrayRestoreArgs(
            dtype=leaf.dtype, sharding=sharding, global_shape=leaf.shape, strict=False
        )

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        with _damage(folder):
            found = _by_name(reader.metadata(folder).item_metadata.tree)
        _check_same(found, _by_name(shapes), f"{folder} is not a checkpoint of {what}")
        with _damage(folder):
            restore = ocp.args.PyTreeRestore(item=target, restore_args=jax.tree.map(read_as, target))
            return reader.restore(folder, args=restore)


def silence() -> None:
    """Keeps Orbax's own log off the terminal; its errors are exceptions."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)


@contextlib.contextmanager
def _damage(folder: epath.Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Orbax and TensorStore raise many kinds; they all mean one thing to a user
        _silence_late_reads()
        reason = next(iter(str(error).splitlines()), "")
        raise OSError(f"{folder} cannot be read: {type(error).__name__}: {reason}") from error


@functools.cache
def _silence_late_reads() -> None:
    """When one read fails, Orbax closes its event loop under the others, and each of them would print a traceback."""
    others = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            others(unraisable)

    sys.unraisablehook = hook


def _is_finished(folder: epath.Path) -> bool:
    return (folder / _COMMITTED).exists() and (folder / PARAMS).is_dir()


def _by_name(tree: Any) -> dict[str, tuple[int, ...]]:
    def is_leaf(x: Any) -> bool:
        return isinstance(x, tuple) or hasattr(x, "shape")

    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(getattr(leaf, "shape", leaf))
        for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_leaf)
    }


def _check_same(found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], wrong: str) -> None:
    both = [name for name in wanted if name in found]
    listed = [f"{name} is {found[name]}, not {wanted[name]}" for name in both if found[name] != wanted[name]]
    listed += [f"{name} is missing" for name in wanted if name not in found]
    listed += [f"{name} is not of the model" for name in found if name not in wanted]
    if listed:
        more = f"; and {len(listed) - 3} more" if len(listed) > 3 else ""
        rest = "".join(f"\n  {line}" for line in listed[3:])
        raise ValueError(f"{wrong}: {'; '.join(listed[:3])}{more}{rest}")


def cut(array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The first `shape` of a sharded array, sharded as evenly: no device gathers it to cut it."""
    if array.shape == tuple(shape):
        return array
    return _cutter(tuple(shape), _even_sharding(array.sharding, tuple(shape)))(array)


@functools.lru_cache(maxsize=256)
def _cutter(shape: tuple[int, ...], sharding: Any) -> Any:
    return jax.jit(lambda a: a[tuple(slice(dim) for dim in shape)], out_shardings=sharding)


def _even_sharding(sharding: Any, shape: tuple[int, ...]) -> Any:
    """For an array that was cut: mesh axes that no longer divide their dimension move to one they do."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    mesh, homeless = sharding.mesh, []
    entries = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    kept: list[list[str]] = [[entry] if isinstance(entry, str) else [*(entry or ())] for entry in entries]

    def divides(dim: int, axes: list[str]) -> bool:
        return shape[dim] % functools.reduce(lambda n, axis: n * mesh.shape[axis], axes, 1) == 0

    for dim, axes in enumerate(kept):
        while not divides(dim, axes):
            homeless.append(axes.pop())
    for axis in homeless:
        home = next((axes for dim, axes in enumerate(kept) if divides(dim, [*axes, axis])), None)
        if home is not None:  # else every device along the axis holds a copy
            home.append(axis)
    return NamedSharding(mesh, PartitionSpec(*(tuple(axes) or None for axes in kept)))
