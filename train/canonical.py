"""Everything in a state by name, with the shapes that it has on disk: no trace of a mesh or of optax's tuples."""

from typing import Any

import jax

import modelzoo
from train.state import TrainState, param_of

Shape = tuple[int, ...]

GUARD = "guard"
"""What the names of a state's `guard` begin with."""


def param_shapes(model: modelzoo.Model) -> Any:
    """The parameters' tree of true shapes."""
    return jax.tree.map(lambda leaf: leaf.shape, modelzoo.abstract_params(model))


def rest_of(state: TrainState) -> dict[str, Any]:
    """All but the parameters, their average and the PRNG key."""
    guard = {} if state.guard is None else {GUARD: state.guard}
    return {"opt_state": state.opt_state, "step": state.step, **guard}


def rest_by_name(state: TrainState) -> dict[str, Any]:
    """`rest_of` in the order of its leaves: optax's tuples leave no trace on disk."""
    return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(rest_of(state))}


def rest_shapes(model: modelzoo.Model, state: TrainState) -> dict[str, Shape]:
    """The shapes on disk of `rest_of` and of the key's data, "rng": a parameter's padded shape becomes its true one.

    Args:
        model: the state's.
        state: may be abstract.
    """
    padded = {path: leaf.shape for path, leaf in jax.tree.leaves_with_path(state.params)}
    true = _by_path(param_shapes(model))
    shapes = {"rng": jax.eval_shape(jax.random.key_data, state.rng).shape}
    for path, leaf in jax.tree.leaves_with_path(rest_of(state)):
        owner = param_of(path, leaf.shape, padded)
        shapes[_name(path)] = leaf.shape if owner is None else _true(leaf.shape, padded[owner], true[owner])
    return shapes


def average_by_name(state: TrainState) -> dict[str, Any]:
    """The moving average of the parameters, by their names."""
    return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(state.ema)}


def average_shapes(model: modelzoo.Model, state: TrainState) -> dict[str, Shape]:
    """The shapes on disk of `average_by_name`."""
    true = _by_path(param_shapes(model))
    return {_name(path): true[path] for path, _ in jax.tree.leaves_with_path(state.ema)}


def leaves_of(model: modelzoo.Model, state: TrainState) -> dict[str, tuple[Any, Shape]]:
    """{name: (array, its shape on disk)} of everything in a state.

    Args:
        model: the state's.
        state: arrays, padded as the mesh needs.
    """
    shapes = _by_path(param_shapes(model))
    rest = {"rng": jax.random.key_data(state.rng), **rest_by_name(state)}
    average = average_by_name(state)
    return {
        **{
            f"params.{_name(path)}": (leaf, shapes[path])
            for path, leaf in jax.tree.leaves_with_path(state.params)
        },
        **{name: (rest[name], shape) for name, shape in rest_shapes(model, state).items()},
        **{f"ema.{name}": (average[name], shape) for name, shape in average_shapes(model, state).items()},
    }


def _true(shape: Shape, padded: Shape, true: Shape) -> Shape:
    """The true shape of what has a parameter's padded one, but for dimensions that it reduced to 1."""
    return tuple(t if have == p else have for have, p, t in zip(shape, padded, true, strict=True))


def _by_path(shapes: Any) -> dict[Any, Shape]:
    return dict(jax.tree.leaves_with_path(shapes, is_leaf=lambda x: isinstance(x, tuple)))


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
