import json
import math

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from modelzoo import tensor_files
from modelzoo.tensor_files import Reader, TensorRef, contiguous_strides, read_blocks, read_safetensors_header


def read(ref, strides, box):
    """A box through `read_blocks`, and how many blocks it came in; every element must come once."""
    out = np.zeros([high - low for low, high in box], ref.dtype)
    times, blocks = np.zeros(out.shape, int), 0
    with Reader() as reader:
        reader.open(ref.file)
        for part, block in read_blocks(reader, ref, strides, box):
            at = tuple(
                slice(low - first, high - first) for (low, high), (first, _) in zip(part, box, strict=True)
            )
            out[at] = block
            times[at] += 1
            blocks += 1
    assert (times == 1).all()
    return out, blocks


@pytest.fixture
def array_file(tmp_path):
    array = np.arange(24 * 40 * 10, dtype=np.float32).reshape(24, 40, 10)
    (tmp_path / "a").write_bytes(b"pad" + array.tobytes())
    return TensorRef(tmp_path / "a", 3, array.dtype, array.shape, contiguous_strides(array.shape)), array


BOXES = {
    "all": [(0, 24), (0, 40), (0, 10)],
    "rows": [(5, 9), (0, 40), (0, 10)],
    "middle": [(0, 24), (7, 20), (0, 10)],
    "inner": [(0, 24), (0, 40), (4, 6)],
    "corner": [(20, 24), (38, 40), (9, 10)],
    "one": [(3, 4), (4, 5), (5, 6)],
}


@pytest.mark.parametrize("block_bytes", [8, 400, 5000, 1 << 20])
@pytest.mark.parametrize("gap_bytes", [0, 100, 1 << 20])
@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_read_blocks_covers_a_box_once(monkeypatch, array_file, block_bytes, gap_bytes, box):
    monkeypatch.setattr(tensor_files, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(tensor_files, "GAP_BYTES", gap_bytes)
    ref, array = array_file
    out, _ = read(ref, ref.strides, box)
    np.testing.assert_array_equal(out, array[tuple(slice(*bounds) for bounds in box)])


def test_read_blocks_of_split_permuted_and_repeated_axes(array_file):
    ref, array = array_file
    strides = ref.split_strides([("a", "b"), ("c", "d", "e"), ("f",)], dict(a=4, b=6, c=2, d=5, e=4, f=10))
    out, _ = read(ref, strides, [(1, 3), (0, 6), (0, 2), (2, 4), (1, 4), (0, 10)])
    expected = array.reshape(4, 6, 2, 5, 4, 10)[1:3, :, :, 2:4, 1:4]
    np.testing.assert_array_equal(out, expected)
    transposed = TensorRef(ref.file, 3, ref.dtype, (10, 24), (1, 400))
    out, _ = read(transposed, transposed.strides, [(2, 10), (0, 24)])
    np.testing.assert_array_equal(out, array[:, 0, 2:].T)
    repeated = TensorRef(ref.file, 3, ref.dtype, (5, 10), (0, 1))
    out, _ = read(repeated, repeated.strides, [(0, 5), (0, 10)])
    np.testing.assert_array_equal(out, np.broadcast_to(array[0, 0], (5, 10)))


def test_read_blocks_reads_little_beyond_the_box(monkeypatch, array_file):
    """Neither the gaps between rows that are far apart, nor a block larger than BLOCK_BYTES."""
    monkeypatch.setattr(tensor_files, "BLOCK_BYTES", 1600)
    monkeypatch.setattr(tensor_files, "GAP_BYTES", 64)
    ref, _ = array_file
    counts = []
    original = Reader.read

    def counting(self, file, offset, count, dtype):
        counts.append(count * dtype.itemsize)
        return original(self, file, offset, count, dtype)

    monkeypatch.setattr(Reader, "read", counting)
    read(ref, ref.strides, [(0, 24), (3, 7), (0, 10)])
    assert sum(counts) == 24 * 4 * 10 * 4
    counts.clear()
    read(ref, ref.strides, [(0, 24), (0, 40), (1, 10)])  # gaps of 4 bytes are read along
    assert sum(counts) < 24 * 40 * 10 * 4
    assert max(counts) <= 1600


def test_a_file_that_shrank(array_file):
    ref, _ = array_file
    ref.file.write_bytes(ref.file.read_bytes()[:1000])
    with pytest.raises(OSError, match="ends at byte 1000"):
        read(ref, ref.strides, BOXES["all"])


def test_header_of_a_file_that_safetensors_wrote(tmp_path):
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.ones((4,), np.float16),
        "c": np.arange(3, dtype=np.int64),
        "empty": np.zeros((0, 5), np.uint8),
        "scalar": np.array(3.5, np.float64),
        "flag": np.array([True, False]),
    }
    safetensors.numpy.save_file(arrays, tmp_path / "a.safetensors", {"format": "np"})
    refs = read_safetensors_header(tmp_path / "a.safetensors")
    assert set(refs) == set(arrays)
    for name, array in arrays.items():
        out, _ = read(refs[name], refs[name].strides, [(0, n) for n in array.shape])
        np.testing.assert_array_equal(out, array)
        assert out.dtype == array.dtype


def test_safetensors_reads_what_is_written_here(tmp_path):
    arrays = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.float16)}
    header = tensor_files.safetensors_header(
        {name: (array.dtype, array.shape) for name, array in arrays.items()}
    )
    assert len(header) % 8 == 0
    (tmp_path / "a").write_bytes(header + b"".join(array.tobytes() for array in arrays.values()))
    loaded = safetensors.numpy.load_file(tmp_path / "a")
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)
    with safetensors.safe_open(tmp_path / "a", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_every_dtype_is_one_that_safetensors_names(tmp_path):
    for name, dtype in tensor_files.DTYPES.items():
        header = tensor_files.safetensors_header({"x": (dtype, (8,))})
        (tmp_path / "a").write_bytes(header + bytes(8 * dtype.itemsize))
        with safetensors.safe_open(tmp_path / "a", "np") as file:
            assert file.get_slice("x").get_dtype() == name
        assert read_safetensors_header(tmp_path / "a")["x"].dtype == dtype
    assert tensor_files.DTYPES["BF16"] == ml_dtypes.bfloat16


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


CORRUPT = {
    "past the end": ({"x": entry(0, 8), "y": entry(8, 16)}, 12, "truncated"),
    "size": ({"x": entry(0, 8, (3,))}, 8, r"shape \[3\] and dtype F32 has 8 bytes"),
    "overlap": ({"x": entry(0, 8), "y": entry(4, 12)}, 12, "'y' begins at byte 4"),
    "gap": ({"x": entry(0, 8), "y": entry(12, 20)}, 20, "'y' begins at byte 12"),
    "trailing": ({"x": entry(0, 8)}, 20, "end at byte 8 of 20"),
    "dtype": ({"x": entry(0, 8, dtype="F33")}, 8, "unknown dtype 'F33'"),
    "no offsets": ({"x": {"dtype": "F32", "shape": [2]}}, 8, "lacks dtype"),
    "entry": ({"x": 3}, 8, "lacks dtype"),
    "negative": ({"x": entry(-8, 0)}, 8, "no natural number"),
    "float": ({"x": entry(0, 8.0)}, 8, "no natural number"),
    "backwards": ({"x": entry(8, 0)}, 8, "bytes 8 to 0"),
    "huge": ({"x": entry(0, 4 * 10**18, (10**18,))}, 8, "truncated"),
    "list": ([], 0, "not a JSON object"),
}


@pytest.mark.parametrize(("header", "data", "what"), CORRUPT.values(), ids=CORRUPT)
def test_corrupt_headers(tmp_path, header, data, what):
    raw = json.dumps(header).encode()
    (tmp_path / "bad.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(data))
    with pytest.raises(ValueError, match=what) as error:
        read_safetensors_header(tmp_path / "bad.safetensors")
    assert "bad.safetensors" in str(error.value).splitlines()[0]


RAW = {
    "empty": (b"", "ends past"),
    "short": (b"\x02\0\0", "ends past"),
    "length": ((10**9).to_bytes(8, "little") + b"{}", "ends past"),
    "endless": (b"\xff" * 8 + b"{}", "ends past"),
    "json": (b"\x02\0\0\0\0\0\0\0{]", "does not parse"),
    "not utf-8": (b"\x02\0\0\0\0\0\0\0\xff\xfe", "does not parse"),
    "twice": (b'\x13\0\0\0\0\0\0\0{"a": {}, "a": {}} ', "occurs twice"),
    "deep": ((200_000).to_bytes(8, "little") + b"[" * 200_000, "does not parse"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "ends past"),
}


@pytest.mark.parametrize(("content", "what"), RAW.values(), ids=RAW)
def test_files_that_are_none(tmp_path, content, what):
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=what):
        read_safetensors_header(tmp_path / "bad.safetensors")


def test_contiguous_strides():
    for shape in [(), (3,), (2, 3, 4), (2, 0, 4)]:
        array = np.zeros(shape, np.int8)
        if math.prod(shape):
            assert contiguous_strides(shape) == array.strides
