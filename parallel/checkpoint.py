"""Sharded arrays to and from disk, by Orbax, in one canonical layout whatever the mesh.

A checkpoint is a folder named by its step. It holds one Orbax item per tree (`params`, and whatever else a run keeps),
one JSON item `extra`, and plain text files beside them. Layers are stacked and vocabularies cut back to their true
size, so any checkpoint opens on any mesh: what a mesh pads is padded again as it is read. Orbax writes a folder under
another name and renames it when it is whole, so a numbered folder is a whole checkpoint.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

import modelzoo
from parallel.rules import Rules
from parallel.shard import abstract_sharded_params

FOLDER = "checkpoints"
"""Where a run keeps its checkpoints, inside its own folder."""
PARAMS, EXTRA, TEXTS = "params", "extra", "texts"


@dataclasses.dataclass
class _TextFiles(ocp.args.CheckpointArgs):
    """Text files that become part of a checkpoint's folder."""

    texts: Mapping[str, str]


class _TextHandler(ocp.CheckpointHandler):
    """Writes text files beside the items, before Orbax gives the folder its final name."""

    def save(self, directory: epath.Path, args: _TextFiles) -> None:
        if jax.process_index() == 0:
            for name, text in args.texts.items():
                (epath.Path(directory).parent / name).write_text(text)

    def restore(self, directory: epath.Path, args: Any = None) -> None:
        raise ValueError(f"{directory}: text files are read as files, not restored")


ocp.args.register_with_handler(_TextHandler, for_save=True, for_restore=True)(_TextFiles)


class Checkpoints:
    """The numbered checkpoints of one folder. Saves in the background; `close` waits.

    Args:
        folder: made if it is not there.
        keep: how many of the newest stay; None keeps all.

    Raises:
        OSError: the folder cannot be made or written.
    """

    def __init__(self, folder: str | Path, keep: int | None = None):
        folder = Path(folder).absolute()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"cannot make the checkpoint folder {folder}: {error.strerror}") from None
        self._manager = ocp.CheckpointManager(
            epath.Path(folder), options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=False)
        )

    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(
        self, step: int, model: modelzoo.Model, trees: Mapping[str, Any], extra: Any, texts: Mapping[str, str]
    ) -> None:
        """Starts to save; returns when the arrays have been copied, so they may be overwritten.

        Args:
            step: the folder's name.
            model: whose vocabulary the trees may have padded.
            trees: item name -> tree of arrays.
            extra: anything JSON can hold.
            texts: file name -> contents.
        """
        items: dict[str, Any] = {
            name: ocp.args.PyTreeSave(canonical(tree, model)) for name, tree in trees.items()
        }
        items[EXTRA] = ocp.args.JsonSave(extra)
        items[TEXTS] = _TextFiles(texts)
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        """Returns when everything is on disk; raises what went wrong in the background."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and lets go."""
        self._manager.close()


def latest_checkpoint(path: str | Path) -> Path:
    """The newest checkpoint under a path.

    Args:
        path: a run's folder, its checkpoints folder, or one checkpoint.

    Raises:
        OSError: there is none.
    """
    path = Path(path)
    if not path.exists():
        raise OSError(f"{path}: no such folder")
    if _is_checkpoint(path):
        return path
    for folder in (path / FOLDER, path):
        if folder.is_dir():
            found = [child for child in folder.iterdir() if child.name.isdigit() and _is_checkpoint(child)]
            if found:
                return max(found, key=lambda child: int(child.name))
    raise OSError(f"{path}: no checkpoint in it: it is no run's folder, or the run has not saved yet")


def restore(checkpoint: str | Path, name: str, target: Any, model: modelzoo.Model) -> Any:
    """Reads one tree of a checkpoint, each device its own shards.

    Args:
        checkpoint: the numbered folder.
        name: the item.
        target: the tree to get, of jax.ShapeDtypeStruct: shapes as the mesh pads them, dtypes to convert to, shardings
            (None is the first device).
        model: says which of the target's rows are padding.

    Returns:
        The tree; padded rows are zero.

    Raises:
        OSError: no such checkpoint or item, or it cannot be read.
        ValueError: the checkpoint's tree or shapes are not the target's; the parameters are named.
    """
    folder = Path(checkpoint).absolute() / name
    if not folder.is_dir():
        raise OSError(f"{checkpoint}: the checkpoint has no {name!r}")
    true = _true_shapes(target, model)
    _check_same(folder, name, target, true)

    def how(leaf: jax.ShapeDtypeStruct, shape: tuple[int, ...]) -> ocp.ArrayRestoreArgs:
        return ocp.ArrayRestoreArgs(
            sharding=leaf.sharding or SingleDeviceSharding(jax.devices()[0]),
            global_shape=leaf.shape,
            dtype=leaf.dtype,
            strict=leaf.shape == shape,  # not strict: rows past the file's are zero
        )

    with ocp.PyTreeCheckpointer() as reader:
        args = ocp.args.PyTreeRestore(item=target, restore_args=jax.tree.map(how, target, true))
        return reader.restore(folder, args=args)


def restore_params(
    checkpoint: str | Path, model: modelzoo.Model, rules: Rules | None = None, dtype: Any = None
) -> Any:
    """Reads a checkpoint's parameters alone.

    Args:
        checkpoint: the numbered folder, as `latest_checkpoint` finds it.
        model: the model that they are of.
        rules: the mesh to lay them on; None is the first device.
        dtype: to convert them to; None keeps the model's param_dtype.

    Returns:
        The canonical parameter tree.

    Raises:
        OSError, ValueError: as `restore`.
    """
    target = abstract_sharded_params(model, rules)
    if dtype is not None:
        target = jax.tree.map(lambda leaf: leaf.update(dtype=dtype), target)
    return restore(checkpoint, PARAMS, target, model)


def read_extra(checkpoint: str | Path) -> Any:
    """What was saved as `extra`.

    Raises:
        OSError: it is not there or cannot be read.
    """
    file = Path(checkpoint) / EXTRA / "metadata"
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise OSError(f"{file}: is not JSON ({error})") from None


def canonical(tree: Any, model: modelzoo.Model) -> Any:
    """Cuts the rows that a mesh added off every array that lies under a parameter's name, at any depth."""
    tree = nn.meta.unbox(tree)

    def cut(array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        if array.shape == shape:
            return array
        sharding = array.sharding
        if isinstance(sharding, NamedSharding):
            # A dimension of the true size may not divide: it lies whole for the moment that it takes to write it.
            spec = (*sharding.spec, *(None,) * (array.ndim - len(sharding.spec)))
            whole = (axis if have == want else None for axis, have, want in zip(spec, array.shape, shape))
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*whole))
        return jax.jit(lambda a: a[tuple(map(slice, shape))], out_shardings=sharding)(array)

    return jax.tree.map(cut, tree, _true_shapes(tree, model))


def _is_checkpoint(path: Path) -> bool:
    return (path / PARAMS).is_dir() and (path / "_CHECKPOINT_METADATA").exists()


class _Shape(tuple):
    """A shape that is one leaf of a tree."""


def _true_shapes(tree: Any, model: modelzoo.Model) -> Any:
    """The canonical shape of every array: a parameter's own for whatever lies under its name and has its rank."""
    true = {path: leaf.shape for path, leaf in jax.tree.leaves_with_path(modelzoo.abstract_params(model))}

    def of(path: tuple[Any, ...], leaf: Any) -> _Shape:
        for start in range(len(path)):
            shape = true.get(path[start:])
            if shape is not None and len(shape) == leaf.ndim and all(map(int.__ge__, leaf.shape, shape)):
                return _Shape(shape)
        return _Shape(leaf.shape)

    return jax.tree.map_with_path(of, tree)


def _check_same(folder: Path, name: str, target: Any, true: Any) -> None:
    def paths(tree: Any, shape_of: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, _Shape))
        return {jax.tree_util.keystr(path, simple=True, separator="/"): shape_of(leaf) for path, leaf in leaves}

    try:
        metadata = ocp.PyTreeCheckpointHandler().metadata(epath.Path(folder))
        stored = paths(metadata.tree, lambda leaf: tuple(leaf.shape))
    except Exception as error:  # Orbax raises many kinds; for a user they are one: the file is damaged
        raise OSError(f"{folder}: the checkpoint cannot be read ({type(error).__name__}: {error})") from None
    wanted = paths(true, tuple)
    differences = [f"{path} is missing" for path in wanted if path not in stored]
    differences += [f"{path} is not the model's" for path in stored if path not in wanted]
    differences += [
        f"{path} has shape {stored[path]}, not {shape}"
        for path, shape in wanted.items()
        if path in stored and stored[path] != shape
    ]
    if differences:
        raise ValueError(f"{folder.parent}: {name} of another architecture or size: {'; '.join(differences)}")
