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
from pathlib import Path
from typing import IO, Any

from modelzoo import torch_names
from modelzoo.tensor_files import TensorRef

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
PROTOCOL_VERSION = 1001


class _Refused(ValueError):
    """A pickle names something that is not on the list."""


class _Unpickler(pickle.Unpickler):
    """Knows the names of a state dict and, where `records` are welcome, those of a training run's file."""

    def __init__(self, stream: IO[bytes], records: bool) -> None:
        super().__init__(stream)
        self._names: dict[tuple[str, str], Any] = dict(torch_names.CALLS if records else torch_names.TENSORS)
        self._records = records
        self.itemsizes: dict[str, int] = {}

    def find_class(self, module_name: str, global_name: str) -> Any:
        # As Python 2 called them.
        module_name = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module_name, module_name)
        name = (module_name, global_name)
        if name not in self._names:
            record = torch_names.record_class(*name) if self._records else None
            if record is None:
                raise _Refused(
                    f"its pickle asks for {module_name}.{global_name}, which tensors do not need and which "
                    "may run code; nothing was run. Take a safetensors file, or one that holds tensors alone"
                )
            self._names[name] = record
        return self._names[name]

    def persistent_load(self, pid: Any) -> torch_names.Storage:
        kind, storage_type, key, _, numel, *view = pid
        is_storage = kind == "storage" and isinstance(storage_type, torch_names.StorageType)
        if not is_storage or not isinstance(key, str):
            raise ValueError(f"a reference {kind!r} that is not to a storage")
        if type(numel) is not int or numel < 0:
            raise ValueError(f"a storage of {numel} elements")
        self.itemsizes[key] = storage_type.dtype.itemsize
        if view and view[0] is not None:  # the older format's views: (key, offset, size) into the storage
            _, offset, size = view[0]
            if not all(type(n) is int and n >= 0 for n in (offset, size)) or offset + size > numel:
                raise ValueError(f"a view of elements {offset} to {offset + size} of a storage of {numel}")
            return torch_names.Storage(storage_type.dtype, key, offset, size)
        return torch_names.Storage(storage_type.dtype, key, 0, numel)


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
    tree = _read(file, records=False)
    if not isinstance(tree, dict):
        raise ValueError(f"{file}: cannot be read as a PyTorch state dict: it holds a {_kind(tree)}")
    for name, value in tree.items():
        if not isinstance(value, TensorRef) or not isinstance(name, str):
            what = f"its entry {name!r} is a {_kind(value)}, not a tensor"
            raise ValueError(f"{file}: cannot be read as a PyTorch state dict: {what}")
    return tree


def read_torch_tree(file: Path) -> dict[Any, Any]:
    """What a training run's file holds: nested dicts, with a `TensorRef` for every tensor; reads no tensor.

    Options, random states, enums and the like become `torch_names.Record`s, which do nothing; a name that is
    not known to be inert is refused before anything is called, as in `read_torch_header`.

    Args:
        file: such as Megatron's model_optim_rng.pt, of either format.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is corrupt, it asks for a name that may run code, or it holds no dict.
    """
    tree = _read(file, records=True)
    if not isinstance(tree, dict):
        raise ValueError(f"{file}: holds a {_kind(tree)}, not the table that a training run saves")
    return tree


def _kind(value: Any) -> str:
    return "torch.Tensor" if isinstance(value, TensorRef) else type(value).__name__


def _read(file: Path, records: bool) -> Any:
    with open(file, "rb") as stream:
        try:
            if stream.read(2) == b"PK":
                tree, starts = _read_archive(stream, records)
            else:
                stream.seek(0)
                tree, starts = _read_stream(stream, records)
            return _place(file, tree, starts, "")
        except _Refused as error:
            raise ValueError(f"{file}: {error}") from None
        except OSError:
            raise
        # A pickle's opcodes can be wrong in every way that Python code can.
        except Exception as error:
            what = str(error) or type(error).__name__
            raise ValueError(f"{file}: cannot be read as a PyTorch checkpoint: {what}") from None


def _place(file: Path, tree: Any, starts: dict[str, tuple[int, int]], name: str) -> Any:
    """Turns the tensors in nested dicts into references; `starts` has (first byte, bytes) of every storage."""
    if isinstance(tree, dict):
        return {key: _place(file, value, starts, str(key)) for key, value in dict.items(tree)}
    if not isinstance(tree, torch_names.Tensor):
        return tree
    storage = tree.storage
    if storage.key not in starts:
        raise ValueError(f"the data of tensor {name!r} (storage {storage.key!r}) are not in it")
    start, nbytes = starts[storage.key]
    itemsize = storage.dtype.itemsize
    if (storage.offset + storage.numel) * itemsize > nbytes:
        raise ValueError(
            f"storage {storage.key!r} of tensor {name!r} has {nbytes} bytes "
            f"where {(storage.offset + storage.numel) * itemsize} are wanted"
        )
    offset = start + (storage.offset + tree.offset) * itemsize
    return TensorRef(file, offset, storage.dtype, tree.shape, tree.strides)


def _load(stream: IO[bytes], records: bool = False) -> tuple[Any, dict[str, int]]:
    """Runs the next pickle of `stream` on the allow-list: (its object, bytes per element of each storage)."""
    start = stream.tell()
    for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        # An extension code reaches registered objects past find_class; a memo takes memory up to its largest
        # index.
        if opcode.name.startswith("EXT") or ("PUT" in opcode.name and int(argument or 0) > number):
            raise ValueError(f"its pickle has the opcode {opcode.name} {argument}")
    stream.seek(start)
    unpickler = _Unpickler(stream, records)
    return unpickler.load(), unpickler.itemsizes


def _read_archive(stream: IO[bytes], records: bool) -> tuple[Any, dict[str, tuple[int, int]]]:
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
    tree, _ = _load(io.BytesIO(content(root + "data.pkl")), records)
    data = root + "data/"
    starts = {
        name.removeprefix(data): locate(entry) for name, entry in entries.items() if name.startswith(data)
    }
    return tree, starts


def _read_stream(stream: IO[bytes], records: bool) -> tuple[Any, dict[str, tuple[int, int]]]:
    size = os.fstat(stream.fileno()).st_size
    if _load(stream)[0] != MAGIC_NUMBER or _load(stream)[0] != PROTOCOL_VERSION:
        raise ValueError("it is neither a torch archive nor a torch pickle")
    machine, _ = _load(stream)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ValueError("it was written on a big-endian machine")
    tree, itemsizes = _load(stream, records)
    starts = {}
    for key in _load(stream)[0]:
        if key not in itemsizes:
            raise ValueError(f"its storage {key!r} belongs to no tensor, so its length is unknown")
        numel = int.from_bytes(stream.read(8), "little")
        start, nbytes = stream.tell(), numel * itemsizes[key]
        if start + nbytes > size:
            raise ValueError(f"its storage {key!r} of {nbytes} bytes ends past the file's {size} bytes")
        starts[key] = (start, nbytes)
        stream.seek(nbytes, os.SEEK_CUR)
    return tree, starts
