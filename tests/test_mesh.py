"""Meshes: their axes, the devices on them, and what does not fit."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

import parallel
from parallel.mesh import MESH_AXES, make_mesh, parse_mesh


def sizes(mesh):
    return {axis: size for axis, size in mesh.shape.items() if size > 1}


def test_all_axes_are_always_there():
    mesh = make_mesh(data=8)
    assert mesh.axis_names == MESH_AXES == ("stage", "data", "fsdp", "context", "tensor")
    assert mesh.axis_types == (AxisType.Auto,) * 5
    assert sizes(mesh) == {"data": 8}


@pytest.mark.parametrize("axis", MESH_AXES)
def test_each_argument_is_its_axis(axis):
    for size in (8, -1):
        kwargs: dict[str, Any] = {axis: size}
        assert sizes(make_mesh(**kwargs)) == {axis: 8}


def test_the_rest_goes_to_the_axis_of_minus_one():
    assert sizes(make_mesh(data=-1, tensor=4)) == {"data": 2, "tensor": 4}
    assert sizes(make_mesh(fsdp=8, data=-1)) == {"fsdp": 8}


def test_neighbours_share_the_tensor_axis():
    """Devices are numbered along the links that are fastest between neighbours."""
    devices = make_mesh(data=2, fsdp=2, tensor=2).devices
    ids = np.vectorize(lambda device: device.id)(devices).reshape(2, 2, 2)
    assert ids.tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU as meshes see it."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int = 0
    core_on_chip: int = 0
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    client: None = None


def torus(*dims, slices=1):
    places = list(np.ndindex(*dims))
    return [Chip(i + s * len(places), at, s) for s in range(slices) for i, at in enumerate(places)]


def test_an_axis_may_take_a_part_of_a_torus_dimension():
    devices = parallel.mesh.arranged(dict(zip(MESH_AXES, (1, 1, 8, 1, 8), strict=True)), torus(4, 4, 4))
    assert devices.shape == (1, 1, 8, 1, 8)
    assert len({device.coords for device in devices.flat}) == 64
    for group in devices.reshape(8, 8):  # eight neighbours: of two dimensions, no more
        assert sorted(len({device.coords[i] for device in group}) for i in range(3)) == [1, 2, 4]


def test_slices_lie_apart_along_the_slowest_axes():
    sizes = dict(zip(MESH_AXES, (1, 4, 4, 1, 2), strict=True))
    devices = parallel.mesh.arranged(sizes, torus(4, 2, 2, slices=2)).reshape(4, 8)
    slices = np.vectorize(lambda device: device.slice_index)(devices)
    assert slices.tolist() == [[0] * 8] * 2 + [[1] * 8] * 2


def test_a_subset_of_the_devices():
    devices = jax.devices()[4:6]
    mesh = make_mesh(tensor=2, devices=devices)
    assert mesh.devices.flatten().tolist() == devices
    assert make_mesh(devices=devices[:1]).size == 1
    assert sizes(make_mesh(data=-1, devices=jax.devices()[:3])) == {"data": 3}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            dict(data=3),
            "mesh data=3 needs 3 devices, but there are 8: the nearest .* is data=8, or pass devices=",
        ),
        (dict(), "mesh of one device needs 1 devices, but there are 8"),
        (
            dict(data=4, tensor=4),
            "mesh data=4,tensor=4 needs 16 devices, but there are 8: the nearest mesh that works is "
            "data=2,tensor=4; on a CPU, XLA_FLAGS=--xla_force_host_platform_device_count=16 simulates 16 devices$",
        ),
        (
            dict(data=3, tensor=-1),
            "mesh data=3,tensor=-1 does not fit: 3 does not divide the 8 devices; .* is data=8$",
        ),
        (
            dict(data=16, tensor=-1),
            "mesh data=16,tensor=-1 does not fit: 16 does not divide the 8 devices; .*=16 simulates 16 devices$",
        ),
        (
            dict(stage=2, tensor=-1, devices=jax.devices()[:1]),
            "^mesh stage=2,tensor=-1 needs 2 devices, but there is 1: on a CPU, XLA_FLAGS=.*=2 simulates 2 devices$",
        ),
        (
            dict(tensor=2, devices=jax.devices()[:1]),
            "^mesh tensor=2 needs 2 devices, but there is 1: on a CPU, XLA_FLAGS=.*=2 simulates 2 devices$",
        ),
        (dict(data=-1, tensor=-1), "mesh axes data and tensor are both -1: at most one"),
        (dict(fsdp=0), "mesh axis fsdp=0: a size is at least 1, or -1"),
        (dict(fsdp=-2), "mesh axis fsdp=-2: a size is at least 1, or -1"),
    ],
)
def test_a_mesh_that_does_not_fit(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**kwargs)


def test_no_devices():
    with pytest.raises(ValueError, match="devices= is empty"):
        make_mesh(data=2, devices=[])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("fsdp=4,tensor=2", {"fsdp": 4, "tensor": 2}),
        (" fsdp = 4 , tensor=-1,", {"fsdp": 4, "tensor": -1}),
    ],
)
def test_parse_mesh(text, expected):
    assert parse_mesh(text) == expected
    assert parallel.parse_mesh is parse_mesh


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model=4",
            "unknown mesh axis 'model' in 'model=4': the axes are stage, data, fsdp, context, tensor",
        ),
        ("4", "unknown mesh axis '4'"),
        ("data=two", "mesh axis data='two' in 'data=two': write it as data=N"),
        ("data", "mesh axis data='' in 'data': write it as data=N"),
        ("data=2.5", "mesh axis data='2.5'"),
        ("data=2,data=4", "mesh axis 'data' twice in 'data=2,data=4'"),
    ],
)
def test_a_text_that_is_no_mesh(text, message):
    with pytest.raises(ValueError, match=message):
        parse_mesh(text)
