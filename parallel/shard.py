"""Parameters on a mesh: abstract init, shardings, sharded init, and placing parameters that exist already."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

import modelzoo
from modelzoo import weights as tables
from modelzoo.model import new_params
from parallel.rules import Rules


def param_shardings(model: modelzoo.Model, rules: Rules) -> Any:
    """Where each parameter lies, checked: the canonical tree of NamedSharding.

    Raises:
        ValueError: an axis that the mesh does not divide, a colliding or unknown axis, or a large parameter left
            replicated; the parameter is named.
    """
    return jax.tree.map(lambda placed: placed.sharding, abstract_sharded_params(model, rules))


def abstract_sharded_params(model: modelzoo.Model, rules: Rules | None) -> Any:
    """Shapes (vocabularies padded to what the mesh divides), dtypes and shardings; nothing allocated.

    Args:
        model: any model of the zoo.
        rules: None gives the true shapes and no shardings.

    Returns:
        The canonical parameter tree of jax.ShapeDtypeStruct.

    Raises:
        ValueError: as `param_shardings`.
    """
    abstract = modelzoo.abstract_params(model)
    if rules is None:
        return abstract

    def place(path: Any, leaf: jax.ShapeDtypeStruct, names: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        shape = rules.padded_shape(names, leaf.shape)
        try:
            sharding = rules.sharding(names, shape)
        except ValueError as error:
            raise ValueError(f"parameter {name} {shape}: {error}") from None
        rules.check_replication(name, names, shape)
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, abstract, modelzoo.logical_axes(model))


def abstract_unstacked_params(model: modelzoo.Model, rules: Rules | None) -> Any:
    """As `abstract_sharded_params`, with `layers` as a tuple of one tree a layer, as decoding takes them."""
    return _unstack_targets(abstract_sharded_params(model, rules))


def init_params(model: modelzoo.Model, rng: jax.Array, rules: Rules | None = None) -> Any:
    """Initialises parameters where they will lie: no device ever holds more than its shards.

    The values do not depend on the mesh; the rows that pad a vocabulary are zero.

    Args:
        model: any model of the zoo.
        rng: PRNG key.
        rules: None initialises on the default device.

    Returns:
        The canonical parameter tree.

    Raises:
        ValueError: as `param_shardings`.
    """
    target = abstract_sharded_params(model, rules)

    def init(rng: jax.Array) -> Any:
        params = nn.meta.unbox(new_params(model, rng))
        return jax.tree.map(lambda a, t: _pad(a, t.shape), params, target)

    shardings = None if rules is None else jax.tree.map(lambda t: t.sharding, target)
    # The one row that the shapes are traced with divides over no mesh that may be in force around the caller.
    with nn.logical_axis_rules(()):
        return jax.jit(init, out_shardings=shardings)(rng)


def fill_params(params: Any, model: modelzoo.Model, rng: jax.Array, rules: Rules | None = None) -> Any:
    """Parameters completed by new ones of what they lack, such as a head or adapters, where these will lie.

    Args:
        params: a part of the canonical tree; its arrays come back.
        model: the model of the whole.
        rng: PRNG key: what is new is what `init_params` would make it.
        rules: None makes it on the default device.

    Raises:
        ValueError: as `param_shardings`.
    """
    known = tables.flatten(params)
    target = tables.flatten(abstract_sharded_params(model, rules))
    lacking = {path: leaf for path, leaf in target.items() if path not in known}
    if not lacking:
        return params

    def init(rng: jax.Array) -> Any:
        made = tables.flatten(nn.meta.unbox(new_params(model, rng)))
        return {path: _pad(made[path], leaf.shape) for path, leaf in lacking.items()}

    shardings = None if rules is None else {path: leaf.sharding for path, leaf in lacking.items()}
    with nn.logical_axis_rules(()):
        made = jax.jit(init, out_shardings=shardings)(rng)
    return tables.unflatten({path: known.get(path, made.get(path)) for path in target})


def shard_params(params: Any, model: modelzoo.Model, rules: Rules) -> Any:
    """Lays parameters that exist already on the mesh, padding vocabularies to what it divides.

    Args:
        params: the canonical tree, at true or padded vocabulary size; layers stacked or as tuples.
        model: their model.
        rules: where to.

    Raises:
        ValueError: as `param_shardings`, or the tree is not the model's.
    """
    # Cut first: another mesh may have padded more than this one does.
    params, target = _matched(unpad_params(params, model), model, rules)
    return jax.tree.map(lambda a, t: jax.device_put(_pad(a, t.shape), t.sharding), params, target)


def unpad_params(params: Any, model: modelzoo.Model) -> Any:
    """Cuts vocabularies back to their true size: the layout of checkpoints and files.

    Raises:
        ValueError: the tree is not the model's.
    """
    return jax.tree.map(
        lambda a, t: a if a.shape == t.shape else a[tuple(map(slice, t.shape))],
        *_matched(params, model, None),
    )


def batch_sharding(rules: Rules) -> NamedSharding:
    """Where a batch [B, ...] lies: its first dimension over the data axes."""
    return rules.sharding(("act_batch",))


def _pad(a: Any, shape: tuple[int, ...]) -> Any:
    if a.shape == shape:
        return a
    return jnp.pad(a, [(0, want - have) for have, want in zip(a.shape, shape, strict=True)])


def _matched(params: Any, model: modelzoo.Model, rules: Rules | None) -> tuple[Any, Any]:
    """(params unboxed, their abstract targets in the same structure)."""
    params, target = nn.meta.unbox(params), abstract_sharded_params(model, rules)
    if jax.tree.structure(params) != jax.tree.structure(target):
        target = _unstack_targets(target)
        if jax.tree.structure(params) != jax.tree.structure(target):
            raise ValueError(
                f"the parameters are not those of {type(model).__name__}: their tree differs from the model's"
            )
    _check_shapes(params, model)
    return params, target


def _check_shapes(params: Any, model: modelzoo.Model) -> None:
    """Refuses parameters of another config: padding and cutting are for vocabularies alone."""
    shapes = {path: leaf.shape for path, leaf in jax.tree.leaves_with_path(modelzoo.abstract_params(model))}
    axes = dict(
        jax.tree.leaves_with_path(modelzoo.logical_axes(model), is_leaf=lambda x: isinstance(x, tuple))
    )
    for path, leaf in jax.tree.leaves_with_path(params):
        canonical = tuple(key for key in path if not isinstance(key, jax.tree_util.SequenceKey))
        unstacked = len(path) - len(canonical)
        shape, names = shapes[canonical][unstacked:], axes[canonical][unstacked:]
        if leaf.ndim != len(shape) or any(
            have != want and (name != "vocab" or have < want)
            for have, want, name in zip(leaf.shape, shape, names, strict=True)
        ):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"parameter {name} has shape {tuple(leaf.shape)}, but the config makes it {shape}"
            )


def _unstack_targets(tree: Any) -> Any:
    """The abstract counterpart of `modelzoo.unstack_layers`."""
    if not isinstance(tree, dict):
        return tree

    def one(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = leaf.sharding
        if sharding is not None:
            sharding = NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[1:]))
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding)

    def split(layers: Any) -> tuple[Any, ...]:
        return (jax.tree.map(one, layers),) * jax.tree.leaves(layers)[0].shape[0]

    return {
        name: split(value) if name == "layers" else _unstack_targets(value) for name, value in tree.items()
    }
