import concurrent.futures

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from modelzoo import placing
from modelzoo.tensor_files import Reader, TensorRef, contiguous_strides
from modelzoo.weights import Weight, WeightTable, bind

LAYERS, D, N, H, V = 4, 16, 8, 4, 21
TABLE = WeightTable(
    "net.",
    (
        Weight("net.words", "words", "v d -> v d"),
        Weight("net.{}.out", "layers.out", "d (n h) -> n h d"),
        Weight("net.{}.qkv", ("layers.query", "layers.key", "layers.value"), "(n c h) d -> c d n h"),
    ),
)
SHAPES = {
    ("words",): (V, D),
    ("layers", "out"): (LAYERS, N, H, D),
    ("layers", "query"): (LAYERS, D, N, H),
    ("layers", "key"): (LAYERS, D, N, H),
    ("layers", "value"): (LAYERS, D, N, H),
}


def mesh():
    return Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 2), ("a", "b", "c"))


@pytest.fixture
def stored(tmp_path):
    """All tensors in one file: their references, and the parameters they should become, by path."""
    specs = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in SHAPES.items()}
    rng, content, sources, arrays = np.random.default_rng(0), b"", {}, {}
    for tensor in bind(TABLE, specs):
        array = rng.standard_normal(tensor.shape).astype(np.float32)
        arrays[tensor.name] = array
        ref = TensorRef(
            tmp_path / "a", len(content), array.dtype, array.shape, contiguous_strides(array.shape)
        )
        content += array.tobytes()
        for part, path in enumerate(tensor.paths):
            sources.setdefault(path, []).append(placing.Source(tensor, ref, part))
    (tmp_path / "a").write_bytes(content)
    qkv = np.stack([arrays[f"{i}.qkv"].reshape(N, 3, H, D) for i in range(LAYERS)])
    expected = {
        ("words",): arrays["words"],
        ("layers", "out"): np.stack([arrays[f"{i}.out"].T.reshape(N, H, D) for i in range(LAYERS)]),
        ("layers", "query"): qkv[:, :, 0].transpose(0, 3, 1, 2),
        ("layers", "key"): qkv[:, :, 1].transpose(0, 3, 1, 2),
        ("layers", "value"): qkv[:, :, 2].transpose(0, 3, 1, 2),
    }
    return sources, expected, arrays


def read(sources, path, sharding, shape=None, dtype=np.float32):
    done = []
    with Reader() as reader, concurrent.futures.ThreadPoolExecutor(2) as workers:
        for source in sources[path]:
            reader.open(source.ref.file)
        array = placing.read_array(
            shape or SHAPES[path], np.dtype(dtype), sharding, sources[path], reader, workers, done.append
        )
    return array, sum(done)


SPECS = {
    ("words",): [(), ("a",), (None, ("a", "b", "c")), ("b", "c")],
    ("layers", "out"): [
        (),
        ("a", "b", None, "c"),
        (None, ("a", "b", "c")),
        (("b", "c"),),
        (None, None, "a", "b"),
    ],
    ("layers", "query"): [(None, "b", "c"), (None, None, ("a", "b", "c"))],
    ("layers", "key"): [("a", "b", "c", None), ()],
    ("layers", "value"): [(None, None, None, "a"), (("a", "b"), "c")],
}


@pytest.mark.parametrize(("path", "spec"), [(path, spec) for path, specs in SPECS.items() for spec in specs])
def test_each_device_gets_its_slice(stored, path, spec):
    sources, expected, _ = stored
    shape, padded = SHAPES[path], expected[path]
    if path == ("words",):
        shape = (24, D)
        padded = np.pad(expected[path], [(0, 3), (0, 0)])
    sharding = NamedSharding(mesh(), PartitionSpec(*spec))
    array, nbytes = read(sources, path, sharding, shape)
    assert array.sharding == sharding
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, padded[shard.index])
    # All eight devices are here, so that together they need every byte, and each byte is read once.
    assert nbytes == expected[path].nbytes


def test_one_device(stored):
    sources, expected, _ = stored
    for path in SHAPES:
        array, _ = read(sources, path, SingleDeviceSharding(jax.devices()[3]))
        np.testing.assert_array_equal(array, expected[path])
        assert array.devices() == {jax.devices()[3]}


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_converts_on_the_way(stored, dtype):
    sources, expected, _ = stored
    for path in SHAPES:
        array, _ = read(sources, path, NamedSharding(mesh(), PartitionSpec()), dtype=dtype)
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, expected[path].astype(dtype))


@pytest.mark.parametrize("piece_bytes", [1, 3 * D * N * H * 4, 1 << 30])
def test_accelerators_are_sent_pieces(monkeypatch, stored, piece_bytes):
    """Shards that lie on other memory than the host's are put together there, a few layers at a time."""
    sources, expected, _ = stored
    monkeypatch.setattr(placing, "_is_host", lambda device: False)
    monkeypatch.setattr(placing, "PIECE_BYTES", piece_bytes)
    for path, specs in SPECS.items():
        for spec in specs[-1:]:
            shape = (24, D) if path == ("words",) else SHAPES[path]
            array, _ = read(sources, path, NamedSharding(mesh(), PartitionSpec(*spec)), shape)
            np.testing.assert_array_equal(np.asarray(array)[: expected[path].shape[0]], expected[path])
    with jax.set_mesh(mesh()):
        array, _ = read(sources, ("layers", "out"), SingleDeviceSharding(jax.devices()[0]))
    np.testing.assert_array_equal(array, expected["layers", "out"])


def test_host_memory_is_taken_over_not_copied(stored, monkeypatch):
    buffers = []
    aligned = placing._aligned
    monkeypatch.setattr(placing, "_aligned", lambda *args: buffers.append(aligned(*args)) or buffers[-1])
    array, _ = read(stored[0], ("layers", "out"), NamedSharding(mesh(), PartitionSpec(None, "a")))
    assert len(buffers) == 2
    pointers = {shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards}
    assert pointers == {buffer.ctypes.data for buffer in buffers}


def test_shared_buffers_survive_a_donation(stored):
    """Replicas share one buffer: a program that may write into its argument must not reach the others."""
    array, _ = read(stored[0], ("layers", "out"), NamedSharding(mesh(), PartitionSpec()))
    first, second = (shard.data for shard in array.addressable_shards[:2])
    before = np.array(second)
    jax.jit(lambda x: x + 1, donate_argnums=0)(first).block_until_ready()
    np.testing.assert_array_equal(second, before)


def test_an_error_in_a_thread_is_raised(stored):
    sources, _, _ = stored
    file = sources[("words",)][0].ref.file
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(OSError, match="ends at byte 3000"):
        read(sources, ("layers", "out"), SingleDeviceSharding(jax.devices()[0]))


@pytest.mark.parametrize("spec", [(), (None, "a", "b"), ("a", None, None, "c")])
@pytest.mark.parametrize("kind", ["stacked", "rows", "numpy"])
def test_gather_is_the_inverse(stored, spec, kind):
    sources, expected, arrays = stored
    sharding = NamedSharding(mesh(), PartitionSpec(*spec))
    for path, group in sources.items():
        for source in group:
            tensor = source.tensor
            held = [expected[p] for p in tensor.paths]
            if kind != "numpy" and path != ("words",):
                held = [jax.device_put(array, sharding) for array in held]
            if path == ("words",):  # with the rows that a mesh adds
                held = [
                    jax.device_put(
                        np.pad(held[0], [(0, 3), (0, 0)]), NamedSharding(mesh(), PartitionSpec("b"))
                    )
                ]
            if kind == "rows" and tensor.layer is not None:
                parameters = [(array[tensor.layer], None) for array in held]
            else:
                parameters = [(array, tensor.layer) for array in held]
            out = placing.gather_tensor(tensor, parameters, np.dtype(np.float32))
            np.testing.assert_array_equal(out, arrays[tensor.name])
            assert out.flags.c_contiguous
