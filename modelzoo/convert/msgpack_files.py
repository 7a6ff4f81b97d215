"""Flax's msgpack files: where their arrays lie, without reading them.

An array is an extension of type 1 that holds (shape, dtype name, bytes); one of more than 2^30 bytes is a dict
of flat pieces. Formats: https://github.com/msgpack/msgpack/blob/master/spec.md and flax/serialization.py.
"""

import dataclasses
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from modelzoo.convert.checkpoint import Tensor, joined, stored
from modelzoo.tensor_files import DTYPE_NAMES, TensorRef, contiguous_strides

DTYPES = {dtype.name: dtype for dtype in DTYPE_NAMES}
CHUNKED = "__msgpack_chunked_array__"
MAX_DEPTH = 64
# First byte -> (what follows, bytes of its length); lengths and numbers are big-endian.
SIZED = {
    0xC4: ("bin", 1), 0xC5: ("bin", 2), 0xC6: ("bin", 4),
    0xC7: ("ext", 1), 0xC8: ("ext", 2), 0xC9: ("ext", 4),
    0xD9: ("str", 1), 0xDA: ("str", 2), 0xDB: ("str", 4),
    0xDC: ("array", 2), 0xDD: ("array", 4), 0xDE: ("map", 2), 0xDF: ("map", 4),
}  # fmt: skip
NUMBERS = {
    0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q",
    0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q",
}  # fmt: skip
CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


@dataclasses.dataclass(frozen=True)
class _Bytes:
    """Bytes that stay in the file."""

    start: int
    count: int


def read_flax_header(file: Path) -> dict[str, Tensor]:
    """The arrays of a file that `flax.serialization.to_bytes` made, by path: "transformer/wte/embedding".

    Raises:
        OSError: the file cannot be read.
        ValueError: it is truncated or corrupt, or it holds no tree of arrays.
    """
    with open(file, "rb") as stream:
        parser = _Parser(file, stream)
        try:
            tree = parser.value(0)
            if parser.stream.tell() != parser.size:
                raise ValueError(f"it goes on after its end at byte {parser.stream.tell()}")
            if not isinstance(tree, dict):
                raise ValueError(f"it holds a {type(tree).__name__}, not a tree of arrays")
            return _flatten(tree)
        except ValueError as error:
            raise ValueError(f"{file}: not a sound flax msgpack file: {error}") from None


class _Parser:
    def __init__(self, file: Path, stream: IO[bytes]) -> None:
        self.file, self.stream, self.size = file, stream, os.fstat(stream.fileno()).st_size

    def _take(self, count: int) -> bytes:
        data = self.stream.read(count)
        if len(data) < count:
            raise ValueError(f"it ends at byte {self.size}, within a value")
        return data

    def value(self, depth: int) -> Any:
        """The next value; bytes and arrays are not read."""
        if depth > MAX_DEPTH:
            raise ValueError("it nests too deep")
        first = self._take(1)[0]
        if first in CONSTANTS:
            return CONSTANTS[first]
        if first in NUMBERS:
            return struct.unpack(NUMBERS[first], self._take(struct.calcsize(NUMBERS[first])))[0]
        if first < 0x80:
            return first
        if first >= 0xE0:
            return first - 0x100
        if first in SIZED:
            kind, width = SIZED[first]
            count = int.from_bytes(self._take(width), "big")
        elif first < 0xC0:
            kind = "map" if first < 0x90 else "array" if first < 0xA0 else "str"
            count = first & (0x1F if kind == "str" else 0x0F)
        elif 0xD4 <= first <= 0xD8:
            kind, count = "ext", 1 << (first - 0xD4)
        else:
            raise ValueError(f"byte {self.stream.tell() - 1} begins no value")
        if count > self.size:
            raise ValueError(f"it ends at byte {self.size}, within a value of {count} parts")
        return getattr(self, f"_{kind}")(count, depth)

    def _map(self, count: int, depth: int) -> dict[str, Any]:
        entries = {}
        for _ in range(count):
            key = self.value(depth + 1)
            if not isinstance(key, str) or key in entries:
                raise ValueError(f"the key {key!r} is no name, or occurs twice")
            entries[key] = self.value(depth + 1)
        return entries

    def _array(self, count: int, depth: int) -> list[Any]:
        return [self.value(depth + 1) for _ in range(count)]

    def _str(self, count: int, depth: int) -> str:
        return self._take(count).decode("utf-8")

    def _bin(self, count: int, depth: int) -> _Bytes:
        start = self.stream.tell()
        if start + count > self.size:
            raise ValueError(f"it ends at byte {self.size}, where an array ends at byte {start + count}")
        self.stream.seek(count, os.SEEK_CUR)
        return _Bytes(start, count)

    def _ext(self, count: int, depth: int) -> Any:
        (kind,) = self._take(1)
        end = self.stream.tell() + count
        if kind != 1:  # a complex number, or a numpy number: no parameter is one
            self._bin(count, depth)
            return None
        content = self.value(depth + 1)
        if self.stream.tell() != end:
            raise ValueError(f"the array that ends at byte {end} has another length inside")
        if not isinstance(content, list) or len(content) != 3 or not isinstance(content[2], _Bytes):
            raise ValueError(f"the array that ends at byte {end} is not a shape, a dtype and bytes")
        shape, name, data = content
        if name not in DTYPES or not _is_shape(shape):
            raise ValueError(f"an array is of dtype {name!r} and shape {shape!r}")
        dtype = DTYPES[name]
        if math.prod(shape) * dtype.itemsize != data.count:
            raise ValueError(f"an array of shape {shape} and dtype {name} has {data.count} bytes")
        return TensorRef(self.file, data.start, dtype, tuple(shape), contiguous_strides(shape))


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(type(dim) is int and dim >= 0 for dim in shape)


def _flatten(tree: Mapping[str, Any], before: str = "") -> dict[str, Tensor]:
    arrays: dict[str, Tensor] = {}
    for key, value in tree.items():
        name = before + key
        if isinstance(value, dict) and CHUNKED in value:
            arrays[name] = _whole(name, value)
        elif isinstance(value, dict):
            arrays |= _flatten(value, name + "/")
        elif isinstance(value, TensorRef):
            arrays[name] = stored(name, value)
        else:
            raise ValueError(f"its entry {name!r} is a {type(value).__name__}, not an array")
    return arrays


def _whole(name: str, chunked: Mapping[str, Any]) -> Tensor:
    """An array that was too large for one msgpack value, from its flat pieces."""
    pieces, shape = chunked.get("chunks"), chunked.get("shape")
    if not isinstance(pieces, dict) or not isinstance(shape, dict):
        raise ValueError(f"the pieces of {name!r} are not there")
    try:
        refs = [pieces[str(i)] for i in range(len(pieces))]
        dims = [shape[str(i)] for i in range(len(shape))]
    except KeyError as error:
        raise ValueError(f"the piece {error} of {name!r} is not there") from None
    flat = [stored(name, ref) for ref in refs if isinstance(ref, TensorRef) and len(ref.shape) == 1]
    if not _is_shape(dims) or len(flat) < len(refs) or sum(np.prod(t.shape) for t in flat) != math.prod(dims):
        raise ValueError(f"the pieces of {name!r} do not make an array of shape {dims}")
    return joined(flat, 0).reshaped(dims)
