"""Building and checking a device mesh. Mesh axes are spelled here, in `rules.py` and in configs/, nowhere else."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

MESH_AXES = ("stage", "data", "fsdp", "context", "tensor")
"""Slowest first: neighbouring devices share `tensor`, the axis that talks most."""


def make_mesh(
    stage: int = 1,
    data: int = 1,
    fsdp: int = 1,
    context: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Arranges devices into a mesh with all five axes.

    Args:
        stage: pipeline stages.
        data: copies of the model that share the batch.
        fsdp: like data, and parameters, gradients and optimizer state are sharded over it.
        context: shards of the sequence.
        tensor: shards of heads, MLP and vocabulary.
        devices: the devices to use; None takes all of them.

    One axis may be -1: it takes what the others leave.

    Returns:
        A mesh whose axes are (stage, data, fsdp, context, tensor), all of type Auto.

    Raises:
        ValueError: a size below 1, more than one -1, or sizes whose product is not the number of devices.
    """
    sizes: dict[str, int] = dict(zip(MESH_AXES, (stage, data, fsdp, context, tensor), strict=True))
    devices = list(jax.devices() if devices is None else devices)
    if not devices:
        raise ValueError("a mesh needs devices, but devices= is empty")
    sizes = mesh_sizes(sizes, len(devices))
    return Mesh(arranged(sizes, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def arranged(sizes: Mapping[str, int], devices: Sequence[Any]) -> Any:
    """Devices by the mesh's axes: neighbours where messages are many, slices apart along the slowest axes.

    An axis may take a part of a torus' dimension (`jax.make_mesh` would refuse that on most TPUs), as tensor=8 must on
    v5p:4x4x4.

    Args:
        sizes: of all axes, slowest first; together as many as the devices.
        devices: such as jax.devices(); of several slices of TPUs, all of the same size.

    Returns:
        A numpy array of devices.
    """
    shape = tuple(sizes.values())
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    between, left = dict.fromkeys(sizes, 1), slices
    for axis, size in sizes.items():
        between[axis] = math.gcd(size, left)
        left //= between[axis]
    inside = [size // between[axis] for axis, size in sizes.items()]
    return mesh_utils.create_hybrid_device_mesh(
        inside, tuple(between.values()), devices, allow_split_physical_axes=True
    )


def mesh_sizes(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """The sizes of a mesh's axes, checked and without a -1.

    Args:
        sizes: of all axes; one may be -1.
        count: devices.

    Raises:
        ValueError: as `make_mesh`.
    """
    sizes = dict(sizes)
    free = [axis for axis, size in sizes.items() if size == -1]
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise ValueError(
                f"mesh axis {axis}={size}: a size is at least 1, or -1 for what the other axes leave"
            )
    if len(free) > 1:
        raise ValueError(f"mesh axes {' and '.join(free)} are both -1: at most one axis may take the rest")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if not free and fixed == count:
        return sizes
    if free and count % fixed == 0:
        return sizes | {free[0]: count // fixed}
    lacks = f"needs {fixed} devices, but there {'is 1' if count == 1 else f'are {count}'}: "
    if free and count > 1:
        lacks = f"does not fit: {fixed} does not divide the {count} devices; "
    hints = []
    if count > 1:
        hints = [f"the nearest mesh that works is {_nearest(sizes | dict.fromkeys(free, 1), count)}"]
    if fixed > count:
        hints += [
            f"on a CPU, XLA_FLAGS=--xla_force_host_platform_device_count={fixed} simulates {fixed} devices"
        ]
    elif not free:
        hints = [f"{hints[0]}, or pass devices= to use fewer"]
    raise ValueError(f"mesh {_describe(sizes)} {lacks}{'; '.join(hints)}")


def parse_mesh(text: str) -> dict[str, int]:
    """Reads "fsdp=4,tensor=2" into keyword arguments of `make_mesh`.

    Raises:
        ValueError: an unknown axis, or a size that is no integer.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        axis, size = (side.strip() for side in part.partition("=")[::2])
        if axis not in MESH_AXES:
            raise ValueError(f"unknown mesh axis {axis!r} in {text!r}: the axes are {', '.join(MESH_AXES)}")
        if axis in sizes:
            raise ValueError(f"mesh axis {axis!r} twice in {text!r}")
        try:
            sizes[axis] = int(size)
        except ValueError:
            raise ValueError(f"mesh axis {axis}={size!r} in {text!r}: write it as {axis}=N") from None
    return sizes


def _nearest(sizes: dict[str, int], count: int) -> str:
    """The mesh of so many devices that differs least from these sizes: in one axis, or else in few."""
    order = sorted(sizes, key=("data", "fsdp", "tensor", "context", "stage").index)  # of equals, the cheapest
    found = [sizes | {axis: count * sizes[axis] // math.prod(sizes.values())} for axis in order]
    found = [mesh for mesh in found if min(mesh.values()) > 0 and math.prod(mesh.values()) == count]
    if not found:  # each axis keeps what it can of its size, and data takes the rest
        rest, kept = count, {}
        for axis, size in sorted(sizes.items(), key=lambda item: (item[0] == "data", -item[1])):
            kept[axis] = rest if axis == "data" else max(n for n in range(1, size + 1) if rest % n == 0)
            rest //= kept[axis]
        found = [{axis: kept[axis] for axis in sizes}]
    return _describe(min(found, key=lambda mesh: sum(abs(math.log(mesh[a] / sizes[a])) for a in sizes)))


def _describe(sizes: dict[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "of one device"
