"""Tensors in files: where their bytes lie, how a part of one is read, and the safetensors format.

Nothing is mapped into memory: mapped pages count towards a process's memory, and a file that shrinks under a
mapping kills the process. A `TensorRef` says where a tensor lies, and `read_blocks` reads the part of it that
is wanted in pieces of a few megabytes.

Format: https://github.com/huggingface/safetensors#format
"""

import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

BLOCK_BYTES = 4 << 20
"""How much is read at a time: a transposition of such a block stays in a processor's cache."""
GAP_BYTES = 16 << 10
"""Bytes between two wanted runs that are cheaper to read along than to skip with a second read."""
MAX_HEADER_BYTES = 100_000_000
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Box = Sequence[tuple[int, int]]
"""A half-open range per axis."""


@dataclasses.dataclass(frozen=True)
class TensorRef:
    """Where a tensor lies.

    Attributes:
        file: the file.
        offset: byte of its first element.
        dtype: of its elements.
        shape: its dimensions.
        strides: elements between neighbours, per dimension.
    """

    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    def split_strides(self, groups: Sequence[Sequence[str]], sizes: Mapping[str, int]) -> list[int]:
        """Strides once every dimension is split into the axes of its group."""
        strides = []
        for group, stride in zip(groups, self.strides, strict=True):
            for i in range(len(group)):
                strides.append(stride * math.prod(sizes[axis] for axis in group[i + 1 :]))
        return strides


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of an array in row-major order."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


class Reader:
    """Open files, read by position from any thread; a context manager that closes them."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *exception: Any) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def open(self, file: Path) -> None:
        """Opens `file`, once; to be called before threads read it."""
        if file not in self._descriptors:
            self._descriptors[file] = os.open(file, os.O_RDONLY)

    def read(self, file: Path, offset: int, count: int, dtype: np.dtype) -> np.ndarray:
        """Reads `count` elements from byte `offset`.

        Raises:
            OSError: the file ends before.
        """
        data = np.empty(count, dtype)
        view, done = data.view(np.uint8).data, 0
        while done < len(view):
            read = os.preadv(self._descriptors[file], [view[done:]], offset + done)
            if not read:
                raise OSError(
                    f"{file}: ends at byte {offset + done}, {len(view) - done} bytes short of a tensor's end"
                )
            done += read
        return data


def read_blocks(
    reader: Reader, ref: TensorRef, strides: Sequence[int], box: Box
) -> Iterator[tuple[Box, np.ndarray]]:
    """Reads a box of a tensor, a few megabytes at a time.

    Args:
        reader: with `ref.file` open.
        ref: the tensor.
        strides: of each axis, in elements; the axes may be finer than the tensor's dimensions.
        box: the part wanted, a range per axis.

    Yields:
        (part of the box, its elements with one dimension per axis); together they cover the box once.

    Raises:
        OSError: the file cannot be read, or ends early.
    """
    if any(low >= high for low, high in box):
        return
    extents = [high - low for low, high in box]
    item = ref.dtype.itemsize
    span, dense = _span(strides, extents), _is_dense(strides, extents, item)
    if (span if dense else math.prod(extents)) * item <= BLOCK_BYTES or math.prod(extents) == 1:
        yield box, _read_box(reader, ref, strides, box)
        return
    outer = _outermost(strides, extents)
    per_index = (strides[outer] if dense else math.prod(extents) // extents[outer]) * item
    step = max(1, BLOCK_BYTES // max(1, per_index))
    low, high = box[outer]
    for start in range(low, high, step):
        part = [*box[:outer], (start, min(start + step, high)), *box[outer + 1 :]]
        yield from read_blocks(reader, ref, strides, part)


def _span(strides: Sequence[int], extents: Sequence[int]) -> int:
    """Elements from the first to the last of a box."""
    return 1 + sum((extent - 1) * stride for extent, stride in zip(extents, strides, strict=True))


def _outermost(strides: Sequence[int], extents: Sequence[int]) -> int:
    return max((i for i, extent in enumerate(extents) if extent > 1), key=lambda i: strides[i])


def _is_dense(strides: Sequence[int], extents: Sequence[int], item: int) -> bool:
    """Whether one read of everything between is cheaper than a read for every run."""
    run = 1
    for stride, extent in sorted(zip(strides, extents, strict=True)):
        if extent > 1 and stride != run:
            break
        run *= extent
    wanted = math.prod(extents)
    return (_span(strides, extents) - wanted) * item <= (wanted // run) * GAP_BYTES


def _read_box(reader: Reader, ref: TensorRef, strides: Sequence[int], box: Box) -> np.ndarray:
    extents = [high - low for low, high in box]
    item = ref.dtype.itemsize
    if _is_dense(strides, extents, item):
        first = sum(low * stride for (low, _), stride in zip(box, strides, strict=True))
        data = reader.read(ref.file, ref.offset + first * item, _span(strides, extents), ref.dtype)
        return np.lib.stride_tricks.as_strided(
            data, extents, [stride * item for stride in strides], writeable=False
        )
    outer = _outermost(strides, extents)
    out = np.empty(extents, ref.dtype)
    for i in range(extents[outer]):
        start = box[outer][0] + i
        inner = [*box[:outer], (start, start + 1), *box[outer + 1 :]]
        out[(slice(None),) * outer + (slice(i, i + 1),)] = _read_box(reader, ref, strides, inner)
    return out


def read_safetensors_header(file: Path, whole: bool = True) -> dict[str, TensorRef]:
    """The tensors of a safetensors file; reads its header alone and checks it against the file's size.

    Args:
        file: the file.
        whole: False does not ask for more of it than the header.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is truncated or corrupt.
    """

    def corrupt(what: str) -> ValueError:
        return ValueError(f"{file}: not a sound safetensors file: {what}; fetch or write it again")

    size = os.path.getsize(file)
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise corrupt(f"its header of {length} bytes ends past the file's {size} bytes")
        if length > MAX_HEADER_BYTES:
            raise corrupt(f"its header claims {length} bytes, more than the format's {MAX_HEADER_BYTES}")
        raw = stream.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise corrupt(f"its header does not parse ({error})") from None
    if not isinstance(header, dict):
        raise corrupt("its header is not a JSON object")
    refs, ranges = {}, []
    end_of_data = size - 8 - length if whole else sys.maxsize
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            raise corrupt(f"the entry of tensor {name!r} lacks dtype, shape or data_offsets") from None
        if dtype not in DTYPES:
            raise corrupt(f"tensor {name!r} is of unknown dtype {dtype!r}")
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
            raise corrupt(f"tensor {name!r} has a size or an offset that is no natural number")
        if begin > end or end > end_of_data:
            raise corrupt(
                f"tensor {name!r} lies at bytes {begin} to {end} of {end_of_data}: the file is truncated"
            )
        if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
            raise corrupt(f"tensor {name!r} of shape {list(shape)} and dtype {dtype} has {end - begin} bytes")
        refs[name] = TensorRef(file, 8 + length + begin, DTYPES[dtype], shape, contiguous_strides(shape))
        ranges.append((begin, end, name))
    expected = 0
    for begin, end, name in sorted(ranges):
        if begin != expected:
            raise corrupt(
                f"tensor {name!r} begins at byte {begin}, where the one before it ends at {expected}"
            )
        expected = end
    if whole and expected != end_of_data:
        raise corrupt(f"its tensors end at byte {expected} of {end_of_data}")
    return refs


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def safetensors_header(tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> bytes:
    """What comes before the data of a file of `tensors` (dtype and shape by name), in order, without gaps."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # the data begins on a multiple of 8
    return len(raw).to_bytes(8, "little") + raw
