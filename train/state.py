"""What a run carries from step to step, and where it lies on a mesh.

The optimizer's state is laid out by name: whatever it keeps under the path of a parameter, in that parameter's shape
or with some of its dimensions reduced to 1, lies as the parameter does; the rest (counters) lies whole on every device.
Nothing is ever held twice or moved through the host.
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
from train.averaging import averaged, new_average
from train.guard import NO_OPTIONS, StateOptions, new_guard
from train.optim import fitted
from train.trained import Trained


@struct.dataclass
class TrainState:
    """A run at one moment.

    Attributes:
        params: the canonical parameter tree, vocabularies padded to what the mesh divides.
        opt_state: the optimizer's, padded and laid out like the parameters.
        step: int32 [], steps taken so far.
        rng: PRNG key of the run; step k draws dropout from fold_in(rng, k).
        ema: the moving average of what trains (`train.averaging`), laid out like it; None where the run keeps none.
        guard: what there is to remember of bad steps (`train.guard.Guard`); None where they are not skipped.
    """

    params: Any
    opt_state: Any
    step: Any
    rng: Any
    ema: Any = None
    guard: Any = None

    @property
    def averaged(self) -> Any:
        """The parameters that the run is judged by: their average if it keeps one."""
        return averaged(self.params, self.ema)


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
    options: StateOptions = NO_OPTIONS,
) -> TrainState:
    """Shapes, dtypes and shardings of a state, nothing allocated: for restoring and compiling ahead of time.

    Args:
        model: any model of the zoo.
        optimizer: an optax transformation.
        mesh, rules: where the state lies; rules alone are enough, and a mesh alone gets its default rules.
        options: what else it holds.

    Returns:
        A TrainState of jax.ShapeDtypeStruct, with shardings if there is a mesh.

    Raises:
        ValueError: the rules do not fit the model.
    """
    rules = resolve_rules(mesh, rules)
    params = parallel.abstract_sharded_params(model, rules)
    return _abstract_around(model, params, fitted(model, optimizer), rules, options)


def init_state(
    model: modelzoo.Model,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh | None = None,
    rules: parallel.Rules | None = None,
    rng: jax.Array | None = None,
    params: Any = None,
    options: StateOptions = NO_OPTIONS,
) -> TrainState:
    """The state that a run starts from.

    Args:
        model: any model of the zoo.
        optimizer: an optax transformation.
        mesh, rules: where the state lies; rules alone are enough, and a mesh alone gets its default rules.
        rng: PRNG key of initialisation and dropout; None is jax.random.key(0).
        params: the canonical parameters to start from, such as `from_hf` returns; None initialises them in
            place. They are copied: a training step overwrites its state.
        options: what else the state holds.

    Raises:
        ValueError: the rules do not fit the model, or the parameters are another model's.
    """
    rules, optimizer = resolve_rules(mesh, rules), fitted(model, optimizer)
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
    target = _abstract_around(model, shapes, optimizer, rules, options)

    def first(params: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integer and float scalars
            opt_state = optimizer.init(params)
        return opt_state, *_beside(model, params, options)

    placed = (target.opt_state, target.ema, target.guard)
    opt_state, ema, guard = jax.jit(first, out_shardings=None if rules is None else shardings_of(placed))(
        params
    )
    step = jnp.zeros([], jnp.int32)
    if rules is not None:
        # Not device_put: it lays no PRNG key on the devices of other processes.
        replicate = jax.jit(lambda pair: pair, out_shardings=(target.step.sharding, target.rng.sharding))
        step, step_rng = replicate((step, step_rng))
    return TrainState(params=params, opt_state=opt_state, step=step, rng=step_rng, ema=ema, guard=guard)


def _beside(model: modelzoo.Model, params: Any, options: StateOptions) -> tuple[Any, Any]:
    """(average, guard) of a run's start, or None for what the options leave out."""
    average = None if options.ema is None else new_average(Trained(model), params)
    return average, new_guard() if options.guarded else None


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
        The parameter's path, or None: it belongs to none, or has neither its shape nor that with dimensions of 1.
    """

    def fits(whole: tuple[int, ...]) -> bool:
        return len(whole) == len(shape) and all(
            have in (1, want) for have, want in zip(shape, whole, strict=True)
        )

    ends = (path[i:] for i in range(len(path)))
    return next((end for end in ends if end in shapes and fits(shapes[end])), None)


def _reduced(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """A parameter's sharding for an array with some of its dimensions reduced to 1."""
    entries = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    spec = [None if size == 1 else entry for entry, size in zip(entries, shape, strict=True)]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _abstract_around(
    model: modelzoo.Model,
    params: Any,
    optimizer: optax.GradientTransformation,
    rules: parallel.Rules | None,
    options: StateOptions,
) -> TrainState:
    """The abstract state of these abstract parameters."""
    replicated = None if rules is None else NamedSharding(rules.mesh, PartitionSpec())
    by_path = dict(jax.tree.leaves_with_path(params))
    shapes = {path: leaf.shape for path, leaf in by_path.items()}

    def place(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        owner = param_of(path, leaf.shape, shapes)
        if owner is None:
            sharding = replicated
        else:
            whole = by_path[owner]
            sharding = whole.sharding if leaf.shape == whole.shape else _reduced(whole.sharding, leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    with jax.numpy_dtype_promotion("standard"):
        opt_state = jax.eval_shape(optimizer.init, params)
    rest = (opt_state, *jax.eval_shape(lambda params: _beside(model, params, options), params))
    opt_state, ema, guard = rest if rules is None else jax.tree.map_with_path(place, rest)
    rng = jax.eval_shape(lambda: jax.random.key(0))
    return TrainState(
        params=params,
        opt_state=opt_state,
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated),
        rng=jax.ShapeDtypeStruct((), rng.dtype, sharding=replicated),
        ema=ema,
        guard=guard,
    )
