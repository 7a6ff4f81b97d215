"""Logical axis names, and the letters that shapes are written in.

Layers say what a dimension *is*; `parallel.rules` alone says which mesh axis it lies on. Parameters and
activations have different names so that FSDP can shard the one and leave the other.

Shape letters (logical sizes, never per-device ones):

    B batch   T query length   S key length   D model width   N heads   K key/value heads   H head width
    F MLP hidden width   V vocabulary (possibly padded)   L layers   P prompt prefix   M microbatches   C classes

A name carries its letters where a rank changes: `q_BTNH`.
"""

import math

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec

PARAMETER_AXES = ("layers", "vocab", "embed", "heads", "kv", "head_dim", "mlp")
ACTIVATION_AXES = ("act_batch", "act_length", "act_stream", "act_embed", "act_heads", "act_mlp", "act_vocab")

LAYERS = "layers"
"""The leading axis of what is stacked."""

LENGTH_AXES = ("act_length", "act_stream")
"""Axes whose size is the user's to choose, call by call: one that does not divide is refused, not padded in silence."""


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Tells the compiler how an activation lies on the mesh, by the logical names of its dimensions.

    A no-op unless logical-axis rules and a mesh are in force (`parallel.use`).

    Args:
        x: any array.
        names: one logical name, or None for "not sharded", per dimension of `x`.

    Returns:
        `x`, constrained.

    Raises:
        ValueError: a name that the rules do not know, two names that resolve to one mesh axis, or a sequence that the
            mesh does not divide.
    """
    rules = dict(nn.get_logical_axis_rules())
    if not rules:
        return x
    assert len(names) == x.ndim, f"{len(names)} names for an array of rank {x.ndim}"
    used: dict[str, str] = {}
    spec: list[str | tuple[str, ...] | None] = []
    mesh = jax.sharding.get_abstract_mesh()
    for name, dim in zip(names, x.shape, strict=True):
        if name is not None and name not in rules:
            raise ValueError(f"unknown logical axis {name!r}: the rules in force know {sorted(rules)}")
        target = rules[name] if name is not None else None
        for mesh_axis in (target,) if isinstance(target, str) else target or ():
            if mesh_axis in used:
                raise ValueError(
                    f"mesh axis {mesh_axis!r} twice in one spec: logical axes {used[mesh_axis]!r} and {name!r} "
                    "of one activation both lie on it; change the rule of one of them"
                )
            used[mesh_axis] = name or ""
        if name in LENGTH_AXES:
            _check_length(
                dim, {axis: mesh.shape.get(axis, 1) for axis, owner in used.items() if owner == name}
            )
        spec.append(target)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def _check_length(length: int, sizes: dict[str, int]) -> None:
    """Refuses a sequence that does not divide over mesh axes of these sizes."""
    shards = math.prod(sizes.values())
    if length % shards == 0:
        return
    over = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)
    fits = math.gcd(length, shards)
    raise ValueError(
        f"a sequence of {length} tokens does not divide over the {shards} shards of mesh {over}: the nearest that does "
        f"has {fits} of them; or pad the sequence to {-(-length // shards) * shards}"
    )


COMPUTE_AXES = {"vocab": "act_vocab", "heads": "act_heads", "kv": "act_heads", "mlp": "act_mlp"}


def gather_parameter(value: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Lays a parameter out for its use: split as the activations that it makes are, whole along all else.

    Parameters rest in finer shards than they compute in (FSDP cuts "embed"). Saying so where a parameter is used makes
    the compiler gather the parameter, once, and reduce-scatter its gradient; left alone it may move the far
    larger activations instead.

    Args:
        value: the parameter.
        axes: its logical names.
    """
    return constrain(value, *(COMPUTE_AXES.get(name or "") for name in axes))


def num_inputs(axes: tuple[str | None, ...]) -> int:
    """How many dimensions of one layer's kernel are its inputs.

    A kernel reads the model's width or makes it: where its first dimension is "embed" that is what it reads, and
    otherwise it reads all but the last.

    Args:
        axes: its logical names, without the layers'.
    """
    return 1 if axes[0] == "embed" else len(axes) - 1
