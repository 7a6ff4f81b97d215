"""How stacked layers lie on the stages of a pipeline, and who is whose neighbour.

Of L layers, chunk c of stage s holds the S-th part of the c-th part: a microbatch that goes round the stages once for
every chunk passes all layers in order. Without virtual stages that is how the parameters lie anyway; with them, cutting
moves layers between stages, once a step.
"""

from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

STAGE = "stage"


def cut(layers: Any, virtual: int, num_stages: int) -> Any:
    """[L, ...] to [virtual, stage, L / (virtual stage), ...]."""
    return jax.tree.map(lambda a: a.reshape(virtual, num_stages, -1, *a.shape[1:]), layers)


def join(layers: Any) -> Any:
    """The inverse of `cut`."""
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[3:]), layers)


def pin(layers: Any, shardings: Any) -> Any:
    """Keeps cut layers on their stages, and cut otherwise as the parameters are.

    Args:
        layers: from `cut`.
        shardings: NamedSharding of the stacked parameters.
    """

    def one(a: jax.Array, sharding: NamedSharding) -> jax.Array:
        _, *others = (*sharding.spec, *[None] * (a.ndim - 2 - len(sharding.spec)))
        return lax.with_sharding_constraint(a, PartitionSpec(None, STAGE, None, *others))

    return jax.tree.map(one, layers, shardings)


def pin_inside(layers: Any, shardings: Any) -> Any:
    """As `pin`, for one chunk of one stage inside its `shard_map`: [L / (virtual stage), ...].

    Where a stage's own layers are differentiated, nothing else says that their gradients are to be summed into shards:
    left alone, the compiler keeps those of all layers whole on every device.

    Args:
        layers: a chunk's parameters or their gradients.
        shardings: NamedSharding of the stacked parameters.
    """

    def one(a: jax.Array, sharding: NamedSharding) -> jax.Array:
        _, *others = (*sharding.spec, *[None] * (a.ndim - len(sharding.spec)))
        return lax.with_sharding_constraint(a, PartitionSpec(None, *others))

    return jax.tree.map(one, layers, shardings)


def neighbours(num_stages: int, step: int, wraps: bool) -> list[tuple[int, int]]:
    """(from, to) of every stage that sends to the one `step` on; `wraps`: the last one sends to the first."""
    pairs = [(s, s + step) for s in range(num_stages)]
    if wraps:
        return [(a, b % num_stages) for a, b in pairs]
    return [(a, b) for a, b in pairs if 0 <= b < num_stages]


def inner(tree: Any, axis: int) -> Any:
    """One stage's part of arrays, inside its `shard_map`, without the dimension of stages."""
    return jax.tree.map(lambda a: lax.index_in_dim(a, 0, axis, keepdims=False), tree)


def pick(layers: Any, chunk: jax.Array) -> Any:
    """One chunk of a stage's layers."""
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, chunk, keepdims=False), layers)


def put(ring: jax.Array, value: jax.Array, chunk: jax.Array, place: jax.Array) -> jax.Array:
    """Writes one microbatch's array into a stage's ring [chunk, place, ...]."""
    return lax.dynamic_update_slice(ring, value[None, None], (chunk, place, *(0,) * value.ndim))
