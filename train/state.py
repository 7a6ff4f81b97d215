"""What a run carries from step to step, and where it lies on a mesh.

The optimizer's state is laid out by name: whatever it keeps under the path of a parameter, in that
parameter's shape, lies as the parameter does; the rest (counters) lies whole on every device. Nothing is ever
held twice or moved through the host.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import modelzoo
import parallel
from train.optim import only_trainable


@struct.dataclass
class TrainState:
    """A run at one moment.

    Attributes:
        params: the canonical parameter tree, vocabularies padded to what the mesh divides.
        opt_state: the optimizer's, padded and laid out like the parameters.
        step: int32 [], steps taken so far.
        rng: PRNG key of the run; step k draws dropout from fold_in(rng, k).
    """

    params: Any
    opt_state: Any
    step: Any
    rng: Any


def resolve_rules(mesh: Mesh | None, rules: parallel.Rules | None) -> parallel.Rules | None:
    """The rules in force: those given, else the default ones of the mesh, else None (one device).

    Raises:
        ValueError: the rules are of another mesh.
    """
    if rules is not None and mesh is not None and rules.mesh != mesh:
        raise ValueError(f"the rules are of mesh {dict(rules.mesh.shape)}, not of mesh {dict(mesh.shape)}")
    return parallel.make_rules(mesh) if rules is None and mesh is not None else rules


def abstract_state(
    model: modelzoo.Model,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh | None = None,
    rules: parallel.Rules | None = None,
) -> TrainState:
    """Shapes, dtypes and shardings of a state, nothing allocated: for restoring and compiling ahead of time.

    Args:
        model: any model of the zoo.
        optimizer: an optax transformation.
        mesh, rules: where the state lies; rules alone are enough, and a mesh alone gets its default rules.

    Returns:
        A TrainState of jax.ShapeDtypeStruct, with shardings if there is a mesh.

    Raises:
        ValueError: the rules do not fit the model.
    """
    rules = resolve_rules(mesh, rules)
    params = parallel.abstract_sharded_params(model, rules)
    return _abstract_around(params, only_trainable(model, optimizer), rules)


def init_state(
    model: modelzoo.Model,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh | None = None,
    rules: parallel.Rules | None = None,
    rng: jax.Array | None = None,
    params: Any = None,
) -> TrainState:
    """The state that a run starts from.

    Args:
        model: any model of the zoo.
        optimizer: an optax transformation.
        mesh, rules: where the state lies; rules alone are enough, and a mesh alone gets its default rules.
        rng: PRNG key of initialisation and dropout; None is jax.random.key(0).
        params: the canonical parameters to start from, such as `from_hf` returns; None initialises them in
            place. They are copied: a training step overwrites its state.

    Raises:
        ValueError: the rules do not fit the model, or the parameters are another model's.
    """
    rules, optimizer = resolve_rules(mesh, rules), only_trainable(model, optimizer)
    key = jax.random.key(0) if rng is None else rng
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    init_rng, step_rng = jax.random.split(key)
    if params is None:
        params = parallel.init_params(model, init_rng, rules)
    else:
        if rules is None:
            params = parallel.unpad_params(params, model)
        else:
            params = parallel.shard_params(params, model, rules)
        params = jax.tree.map(lambda a: jnp.array(a, copy=True), params)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), params)
    target = _abstract_around(shapes, optimizer, rules)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes integer and float scalars
        init = jax.jit(
            optimizer.init, out_shardings=None if rules is None else shardings_of(target.opt_state)
        )
        opt_state = init(params)
    step = jnp.zeros([], jnp.int32)
    if rules is not None:
        # Not device_put: it lays no PRNG key on the devices of other processes.
        replicate = jax.jit(lambda pair: pair, out_shardings=(target.step.sharding, target.rng.sharding))
        step, step_rng = replicate((step, step_rng))
    return TrainState(params=params, opt_state=opt_state, step=step, rng=step_rng)


def shardings_of(tree: Any) -> Any:
    """The sharding of every array, abstract or not."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def param_of(path: Any, shape: tuple[int, ...], shapes: Mapping[Any, tuple[int, ...]]) -> Any:
    """The parameter that a leaf of the optimizer's state belongs to.

    Args:
        path: the leaf's path in its tree; it ends with the parameter's.
        shape: its shape.
        shapes: the parameters' shapes by path.

    Returns:
        The parameter's path, or None: it belongs to none, or has not its shape.
    """
    ends = (path[i:] for i in range(len(path)))
    return next((end for end in ends if end in shapes and shapes[end] == shape), None)


def _abstract_around(
    params: Any, optimizer: optax.GradientTransformation, rules: parallel.Rules | None
) -> TrainState:
    """The abstract state of these abstract parameters."""
    replicated = None if rules is None else NamedSharding(rules.mesh, PartitionSpec())
    by_path = dict(jax.tree.leaves_with_path(params))
    shapes = {path: leaf.shape for path, leaf in by_path.items()}

    def place(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        owner = param_of(path, leaf.shape, shapes)
        sharding = replicated if owner is None else by_path[owner].sharding
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    with jax.numpy_dtype_promotion("standard"):
        opt_state = jax.eval_shape(optimizer.init, params)
    rng = jax.eval_shape(lambda: jax.random.key(0))
    return TrainState(
        params=params,
        opt_state=opt_state if rules is None else jax.tree.map_with_path(place, opt_state),
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated),
        rng=jax.ShapeDtypeStruct((), rng.dtype, sharding=replicated),
    )
