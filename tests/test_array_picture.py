"""parallel/array_picture.py: the parts that are drawn are the shards, and carry their devices' numbers."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure

import parallel


def drawn(array, **options):
    """{(left, top, width, height): the text in it} of an array's picture."""
    axes = Figure().subplots()
    parallel.draw_array(axes, array, **options)
    found = {}
    for patch, text in zip(axes.patches, axes.texts, strict=True):
        box = patch.get_extents().transformed(axes.transData.inverted())
        left, right = sorted((box.x0, box.x1))
        top, bottom = sorted((box.y0, box.y1))
        found[tuple(round(float(x), 6) for x in (left, top, right - left, bottom - top))] = text.get_text()
    return found, axes


@pytest.mark.parametrize("spec", [P("fsdp", "tensor"), P("tensor"), P(None, ("fsdp", "tensor")), P()])
def test_parts_are_the_shards_of_the_array(spec):
    mesh = parallel.make_mesh(data=2, fsdp=2, tensor=2)
    array = jax.device_put(jnp.zeros((8, 16)), NamedSharding(mesh, spec))
    numbers = {device: i for i, device in enumerate(mesh.devices.flat)}
    expected: dict = {}
    for shard in array.addressable_shards:
        (top, bottom, _), (left, right, _) = (
            part.indices(dim) for part, dim in zip(shard.index, array.shape, strict=True)
        )
        expected.setdefault((left, top, right - left, bottom - top), []).append(numbers[shard.device])
    found, _ = drawn(array)
    assert {place: sorted(map(int, text.split())) for place, text in found.items()} == {
        place: sorted(owners) for place, owners in expected.items()
    }


def test_the_dimensions_that_are_cut_are_drawn_and_named():
    mesh = parallel.make_mesh(stage=2, fsdp=2, tensor=2)
    kernel = jax.ShapeDtypeStruct(
        (4, 6, 2, 3), jnp.float32, sharding=NamedSharding(mesh, P("stage", "fsdp", "tensor"))
    )
    found, axes = drawn(kernel, names=("layers", "embed", "heads", "head_dim"))
    assert found == {(0, 0, 1, 3): "0", (1, 0, 1, 3): "1", (0, 3, 1, 3): "2", (1, 3, 1, 3): "3"}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("heads over tensor", "embed over fsdp")
    found, axes = drawn(kernel, dims=(0, 3))
    assert found == {(0, 0, 3, 2): "0", (0, 2, 3, 2): "4"}


def test_a_mesh_axis_of_one_device_cuts_nothing():
    """The dimensions that are drawn are those that are cut, not those that might be on another mesh."""
    mesh = parallel.make_mesh(stage=2, fsdp=4)
    kernel = jax.ShapeDtypeStruct(
        (4, 8, 2, 3), jnp.float32, sharding=NamedSharding(mesh, P("stage", "fsdp", ("tensor",), "context"))
    )
    found, axes = drawn(kernel, names=("layers", "embed", "heads", "head_dim"))
    assert len(found) == 8
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("embed over fsdp", "layers over stage")


def test_vectors_and_whole_arrays():
    mesh = parallel.make_mesh(data=2, fsdp=4)
    vector = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    found, axes = drawn(vector)
    assert found == {(0, 0, 4, 1): "0 1 2 3", (4, 0, 4, 1): "4 5 6 7"}
    assert not axes.get_yticks().size
    matrix = jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=NamedSharding(mesh, P()))
    assert list(drawn(matrix)[0].values()) == ["0 1 2 3\n4 5 6 7"]


@pytest.mark.parametrize(
    ("shape", "options", "error"),
    [
        ((4, 8), dict(names=("a",)), r"names = \('a',\): the array \(4, 8\) has 2 dimensions"),
        ((4, 8), dict(dims=(0, 2)), r"dims = \(0, 2\): two of the 2 dimensions"),
        ((), {}, "an array without dimensions"),
    ],
)
def test_bad_input_is_named(shape, options, error):
    sharding = NamedSharding(parallel.make_mesh(data=8), P())
    with pytest.raises(ValueError, match=error):
        drawn(jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding), **options)


def test_an_array_on_no_mesh_is_named():
    with pytest.raises(ValueError, match=r"the array \(4, 8\) lies on no mesh"):
        drawn(jnp.zeros((4, 8)))
