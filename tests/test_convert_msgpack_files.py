"""Flax's msgpack files, read without loading them: against flax's own writer."""

import ml_dtypes
import numpy as np
import pytest
from flax import serialization

from modelzoo.convert.msgpack_files import read_flax_header

TREE = {
    "a": {"kernel": np.arange(12, dtype=np.float32).reshape(3, 4), "bias": np.zeros(0, np.float16)},
    "b": {str(i): {"w": np.full((2, 1), i, np.int32)} for i in range(20)},
    "wide": np.arange(70_000, dtype=np.int64),
    "brain": np.arange(5).astype(ml_dtypes.bfloat16),
    "scalar": np.array(3.0, np.float64),
    "n" * 40: np.ones((1, 1, 1, 1), np.bool_),
}


def flat(tree, before=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{before}{key}/")
        else:
            yield before + key, value


@pytest.fixture
def file(tmp_path):
    (tmp_path / "m.msgpack").write_bytes(serialization.to_bytes(TREE))
    return tmp_path / "m.msgpack"


def assert_reads(file):
    arrays = read_flax_header(file)
    assert arrays.keys() == dict(flat(TREE)).keys()
    for name, want in flat(TREE):
        have = arrays[name].read()
        assert (have.dtype, have.shape) == (want.dtype, want.shape)
        np.testing.assert_array_equal(have, want, err_msg=name)


def test_reads_what_flax_writes(file):
    assert_reads(file)


def test_reads_arrays_that_flax_cut(file, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 16)
    file.write_bytes(serialization.to_bytes(TREE))
    assert file.read_bytes().count(b"__msgpack_chunked_array__") == 2
    assert_reads(file)


def test_truncated_anywhere(file):
    whole = file.read_bytes()
    for length in [*range(0, 900, 13), len(whole) - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"m\.msgpack: not a sound flax msgpack file"):
            read_flax_header(file)
    file.write_bytes(whole + b"\xc0")
    with pytest.raises(ValueError, match="goes on after its end"):
        read_flax_header(file)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"\x93\x01\x02\x03", "holds a list"),
        (b"\x81\xa1a\x05", "entry 'a' is a int"),
        (b"\x81\x05\xc0", "key 5 is no name"),
        (b"\x82\xa1a\xc0\xa1a\xc0", "key 'a' is no name, or occurs twice"),
        (b"\xc1", "byte 0 begins no value"),
        (b"\xdd\xff\xff\xff\xff", "within a value of 4294967295 parts"),
        (b"\x91" * 500, "nests too deep"),
        (b"\x81\xa1a\xc7\x03\x01\x91\x01\xc0", "another length inside"),
        (b"\x81\xa1a\xc7\x02\x01\x91\x01", "not a shape, a dtype and bytes"),
        (b"\x81\xa1a\xc7\x0b\x01\x93\x91\x02\xa5int64\xc4\x00", "has 0 bytes"),
        (b"\x81\xa1a\xc7\x0b\x01\x93\x91\x00\xa5inty4\xc4\x00", "dtype 'inty4'"),
        (b"<!doctype html>", "holds a int|goes on after"),
    ],
)
def test_names_what_is_unsound(tmp_path, content, what):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=what):
        read_flax_header(tmp_path / "a")


def test_pieces_that_are_missing(file, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 16)
    array = np.arange(12, dtype=np.float32)
    whole = serialization.to_bytes({"w": array})
    file.write_bytes(whole.replace(b"\xa12\xc7", b"\xa13\xc7"))
    with pytest.raises(ValueError, match="the piece '2' of 'w' is not there"):
        read_flax_header(file)
    file.write_bytes(whole.replace(b"\xa10\x0c", b"\xa10\x0d"))
    with pytest.raises(ValueError, match=r"do not make an array of shape \[13\]"):
        read_flax_header(file)
