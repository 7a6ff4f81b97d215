"""A state read from a checkpoint, whatever mesh wrote it, and whatever else the run that goes on keeps."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

import modelzoo
from parallel import checkpoint
from train import canonical
from train.state import TrainState

RUN = "run/run.json"
"""What is no array, in a checkpoint's folder."""


def read_state(folder: Any, model: modelzoo.Model, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """Reads a checkpoint.

    What the state holds beside parameters and optimizer state may be new to the run: an average starts from the
    parameters, a guard with nothing counted. What the checkpoint has of these and the state has not is left out.

    Args:
        folder: of the checkpoint.
        model: the state's.
        state: what to read it as: an existing state, or `abstract_state`.

    Returns:
        The state, laid out as the one given, and what the run wrote beside it.

    Raises:
        OSError: a file is missing or damaged.
        ValueError: it is of another model or optimizer; names what differs.
    """
    name = type(model).__name__
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    params = checkpoint.restore_tree(
        folder / checkpoint.PARAMS, target.params, canonical.param_shapes(model), name
    )
    run = json.loads((folder / RUN).read_text())
    rest, rng = _read_rest(folder / "state", model, target, run["rng"], name)
    ema = target.ema
    if ema is not None and (folder / checkpoint.AVERAGE).is_dir():
        named, shapes = canonical.average_by_name(target), canonical.average_shapes(model, target)
        found = checkpoint.restore_tree(folder / checkpoint.AVERAGE, named, shapes, f"the average of {name}")
        ema = jax.tree.unflatten(jax.tree.structure(ema), [found[key] for key in named])
    elif ema is not None:
        ema = jax.tree.map(_first_average, ema, params, is_leaf=lambda x: x is None)
    return TrainState(params=params, rng=rng, ema=ema, **rest), run


def _read_rest(
    folder: Any, model: modelzoo.Model, target: TrainState, rng_impl: str, name: str
) -> tuple[dict[str, Any], Any]:
    """All but parameters and average."""
    shapes, wanted = canonical.rest_shapes(model, target), canonical.rest_by_name(target)
    key = jax.eval_shape(jax.random.key_data, target.rng)
    wanted["rng"] = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=target.rng.sharding)
    names = list(canonical.rest_by_name(target))
    of_guard = {key for key in checkpoint.stored_names(folder) if key.startswith(f"{canonical.GUARD}.")}
    new = {
        key: wanted.pop(key) for key in names if key.startswith(f"{canonical.GUARD}.") and key not in of_guard
    }
    extra = {key: jax.ShapeDtypeStruct((), jnp.float32) for key in of_guard - wanted.keys()}
    shapes = {key: shapes.get(key, ()) for key in (*wanted, *extra)}
    found = checkpoint.restore_tree(folder, wanted | extra, shapes, f"{name} with this optimizer")
    found |= {key: _zeros(leaf) for key, leaf in new.items()}
    rng = jax.random.wrap_key_data(found["rng"], impl=rng_impl)
    rest = jax.tree.unflatten(jax.tree.structure(canonical.rest_of(target)), [found[key] for key in names])
    return {"guard": None, **rest}, rng


def comparable(
    digests: Mapping[str, str], others: Mapping[str, str] | None
) -> tuple[dict[str, str], dict[str, str]]:
    """Two states' digests without those of an average and a guard that only one of them has."""
    pair = dict(digests), dict(others or {})
    alone = {
        name for name in pair[0].keys() ^ pair[1].keys() if name.startswith(("ema.", f"{canonical.GUARD}."))
    }
    first, second = ({name: text for name, text in one.items() if name not in alone} for one in pair)
    return first, second


def _first_average(wanted: Any, param: jax.Array) -> Any:
    return None if wanted is None else jnp.array(param, jnp.float32, copy=True)


def _zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=leaf.sharding)()
