"""PyTorch's pickled checkpoints, read without torch and without running anything that they hold.

A pickle is a program: it names functions and has them called. This reader knows the handful of names that a
state dict of tensors needs, stands plain records in for them, and refuses every other name before anything is
called. The tensors' data stay in the file: the result says where each one lies.

Two formats: the zip archive that torch writes since 1.6
(https://pytorch.org/docs/stable/notes/serialization.html), and the stream of pickles before it. Neither is
documented as a format; what is here follows torch/serialization.py.
"""

import io
import os
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

from modelzoo.tensor_files import TensorRef

STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
    "ComplexFloatStorage": np.dtype(np.complex64),
    "ComplexDoubleStorage": np.dtype(np.complex128),
}
MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
PROTOCOL_VERSION = 1001


class _StorageType(NamedTuple):
    """Stands in for torch.FloatStorage and its kin."""

    dtype: np.dtype


class _Storage(NamedTuple):
    """A run of elements: `offset` elements into the file's storage `key`."""

    dtype: np.dtype
    key: str
    offset: int
    numel: int


class _Tensor(NamedTuple):
    """A view of a storage; offset and strides in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


# The stand-ins have no attributes that a pickle could set (__slots__, tuples): nothing that one file holds
# outlives it.
class _RebuildTensor:
    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
        if (
            not isinstance(storage, _Storage)
            or not isinstance(shape, tuple)
            or not isinstance(strides, tuple)
        ):
            raise ValueError("a tensor is not made of a storage, a shape and strides")
        if len(shape) != len(strides) or not all(
            type(n) is int and n >= 0 for n in (offset, *shape, *strides)
        ):
            raise ValueError(f"a tensor has shape {shape}, strides {strides} and offset {offset}")
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if 0 not in shape and last >= storage.numel:
            raise ValueError(f"a tensor reaches element {last} of a storage of {storage.numel}")
        return _Tensor(storage, offset, shape, strides)


class _RebuildParameter:
    __slots__ = ()

    def __call__(self, tensor: Any, *_: Any) -> _Tensor:
        if not isinstance(tensor, _Tensor):
            raise ValueError("a parameter is not made of a tensor")
        return tensor


ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _RebuildTensor(),
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
    **{
        (module, name): _StorageType(dtype)
        for module in ("torch", "torch.cuda")
        for name, dtype in STORAGES.items()
    },
}


class _Refused(ValueError):
    """A pickle names something that is not on the list."""


class _Unpickler(pickle.Unpickler):
    """Knows the names in ALLOWED and no other."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in ALLOWED:
            module_name = {"__builtin__": "builtins"}.get(module_name, module_name)  # as Python 2 called it
            raise _Refused(
                f"its pickle asks for {module_name}.{global_name}, which tensors do not need and which may "
                "run code; nothing was run. Take a safetensors file, or one that holds tensors alone"
            )
        return ALLOWED[module_name, global_name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _, numel, *view = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType) or not isinstance(key, str):
            raise ValueError(f"a reference {kind!r} that is not to a storage")
        if type(numel) is not int or numel < 0:
            raise ValueError(f"a storage of {numel} elements")
        if view and view[0] is not None:  # the older format's views: (key, offset, size) into the storage
            _, offset, size = view[0]
            if not all(type(n) is int and n >= 0 for n in (offset, size)) or offset + size > numel:
                raise ValueError(f"a view of elements {offset} to {offset + size} of a storage of {numel}")
            return _Storage(storage_type.dtype, key, offset, size)
        return _Storage(storage_type.dtype, key, 0, numel)


def read_torch_header(file: Path) -> dict[str, TensorRef]:
    """Where the tensors of a file that `torch.save` made of a state dict lie; reads none of them.

    Args:
        file: pytorch_model.bin or its like, of either format.

    Returns:
        A reference per name.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is corrupt, it asks for something that is not on the allow-list, or it is no state
            dict.
    """
    with open(file, "rb") as stream:
        try:
            if stream.read(2) == b"PK":
                state, starts = _read_archive(stream)
            else:
                stream.seek(0)
                state, starts = _read_stream(stream)
            return _references(file, state, starts)
        except _Refused as error:
            raise ValueError(f"{file}: {error}") from None
        except OSError:
            raise
        # A pickle's opcodes can be wrong in every way that Python code can.
        except Exception as error:
            what = str(error) or type(error).__name__
            raise ValueError(f"{file}: cannot be read as a PyTorch state dict: {what}") from None


def _references(file: Path, state: Any, starts: dict[str, tuple[int, int]]) -> dict[str, TensorRef]:
    """Turns a state dict into file references; `starts` has (first byte, bytes) of every storage."""
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}, not a table of tensors")
    refs = {}
    for name, value in dict.items(state):
        if not isinstance(value, _Tensor) or not isinstance(name, str):
            raise ValueError(f"its entry {name!r} is a {type(value).__name__.lstrip('_')}, not a tensor")
        storage = value.storage
        if storage.key not in starts:
            raise ValueError(f"the data of tensor {name!r} (storage {storage.key!r}) are not in it")
        start, nbytes = starts[storage.key]
        itemsize = storage.dtype.itemsize
        if (storage.offset + storage.numel) * itemsize > nbytes:
            raise ValueError(
                f"storage {storage.key!r} of tensor {name!r} has {nbytes} bytes "
                f"where {(storage.offset + storage.numel) * itemsize} are wanted"
            )
        offset = start + (storage.offset + value.offset) * itemsize
        refs[name] = TensorRef(file, offset, storage.dtype, value.shape, value.strides)
    return refs


def _load(stream: IO[bytes]) -> Any:
    """Runs the next pickle of `stream` on the allow-list."""
    start = stream.tell()
    for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        # An extension code reaches registered objects past find_class; a memo takes memory up to its largest
        # index.
        if opcode.name.startswith("EXT") or ("PUT" in opcode.name and int(argument or 0) > number):
            raise ValueError(f"its pickle has the opcode {opcode.name} {argument}")
    stream.seek(start)
    return _Unpickler(stream).load()


def _read_archive(stream: IO[bytes]) -> tuple[Any, dict[str, tuple[int, int]]]:
    size = os.fstat(stream.fileno()).st_size
    try:
        entries = {entry.filename: entry for entry in zipfile.ZipFile(stream).infolist()}
    except zipfile.BadZipFile as error:
        raise ValueError(f"its archive is truncated or corrupt ({error})") from None
    roots = [
        name.removesuffix("data.pkl")
        for name in entries
        if name.count("/") == 1 and name.endswith("/data.pkl")
    ]
    if len(roots) != 1:
        raise ValueError("its archive has no data.pkl")

    def locate(entry: zipfile.ZipInfo) -> tuple[int, int]:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"its record {entry.filename!r} is compressed, which torch.save never does")
        stream.seek(entry.header_offset)
        header = stream.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise ValueError(f"its record {entry.filename!r} has no header")
        start = (
            entry.header_offset
            + 30
            + int.from_bytes(header[26:28], "little")
            + int.from_bytes(header[28:], "little")
        )
        if start + entry.file_size > size:
            raise ValueError(f"its record {entry.filename!r} ends past the file's {size} bytes")
        return start, entry.file_size

    def content(name: str) -> bytes:
        start, length = locate(entries[name])
        stream.seek(start)
        return stream.read(length)

    (root,) = roots
    if root + "byteorder" in entries and content(root + "byteorder") != b"little":
        raise ValueError("it was written on a big-endian machine")
    state = _load(io.BytesIO(content(root + "data.pkl")))
    data = root + "data/"
    starts = {
        name.removeprefix(data): locate(entry) for name, entry in entries.items() if name.startswith(data)
    }
    return state, starts


def _read_stream(stream: IO[bytes]) -> tuple[Any, dict[str, tuple[int, int]]]:
    size = os.fstat(stream.fileno()).st_size
    if _load(stream) != MAGIC_NUMBER or _load(stream) != PROTOCOL_VERSION:
        raise ValueError("it is neither a torch archive nor a torch pickle")
    machine = _load(stream)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ValueError("it was written on a big-endian machine")
    itemsizes: dict[str, int] = {}
    state = _load(stream)
    for value in dict.values(state) if isinstance(state, dict) else ():
        if isinstance(value, _Tensor):
            itemsizes[value.storage.key] = value.storage.dtype.itemsize
    starts = {}
    for key in _load(stream):
        if key not in itemsizes:
            raise ValueError(f"its storage {key!r} belongs to no tensor, so its length is unknown")
        numel = int.from_bytes(stream.read(8), "little")
        start, nbytes = stream.tell(), numel * itemsizes[key]
        if start + nbytes > size:
            raise ValueError(f"its storage {key!r} of {nbytes} bytes ends past the file's {size} bytes")
        starts[key] = (start, nbytes)
        stream.seek(nbytes, os.SEEK_CUR)
    return state, starts
