"""Writes files as `torch.save` does, without torch: for the tests of the reader, wicked ones included."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

STORAGE_NAMES = {
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
    np.dtype(np.int32): "IntStorage",
    np.dtype(np.int16): "ShortStorage",
    np.dtype(np.int8): "CharStorage",
    np.dtype(np.uint8): "ByteStorage",
    np.dtype(np.bool_): "BoolStorage",
}


class Global:
    """A name that the pickle asks for; never imported here."""

    def __init__(self, module: str, name: str) -> None:
        self.line = f"c{module}\n{name}\n".encode()

    def __call__(self) -> None:
        raise AssertionError("only its name is ever used")


class Call:
    """Pickles into a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.parts = (function, arguments)

    def __reduce__(self) -> Any:
        return self.parts


class Storage:
    """Pickles into a reference to a storage."""

    def __init__(self, *pid: Any) -> None:
        self.pid = ("storage", *pid)


PythonPickler: Any = pickle._Pickler  # pyright: ignore[reportAttributeAccessIssue]


class _Pickler(PythonPickler):
    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, Global):
            self.write(obj.line)
        else:
            super().save(obj, save_persistent_id)

    def persistent_id(self, obj: Any) -> Any:
        return obj.pid if isinstance(obj, Storage) else None


def pickled(obj: Any, stream: Any) -> None:
    """Pickles `obj`, in which Global, Call and Storage stand for what torch's own objects become."""
    _Pickler(stream, 2).dump(obj)


def tensor(storage: Storage, offset: int, shape: Any, strides: Any) -> Call:
    """What a torch.Tensor pickles into."""
    rebuild = Global("torch._utils", "_rebuild_tensor_v2")
    return Call(rebuild, storage, offset, shape, strides, False, Call(Global("collections", "OrderedDict")))


def parameter(of: Call) -> Call:
    """What a torch.nn.Parameter pickles into."""
    hooks = Call(Global("collections", "OrderedDict"))
    return Call(Global("torch._utils", "_rebuild_parameter"), of, True, hooks)


def _state(arrays: dict[str, np.ndarray], legacy: bool) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(the object to pickle, the storages); arrays that are views of one array share its storage."""
    storages: dict[int, tuple[str, np.ndarray]] = {}
    state = {}
    for name, array in arrays.items():
        owner = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        key, _ = storages.setdefault(id(owner), (str(len(storages)), owner))
        offset = (array.ctypes.data - owner.ctypes.data) // array.itemsize
        storage_type = Global("torch", STORAGE_NAMES[array.dtype])
        view = (None,) if legacy else ()
        storage = Storage(storage_type, key, "cpu", owner.size, *view)
        strides = tuple(stride // array.itemsize for stride in array.strides)
        state[name] = tensor(storage, offset, array.shape, strides)
    return state, dict(storages.values())


def write_archive(path: Path, state: Any, storages: dict[str, np.ndarray], **records: bytes) -> None:
    """A zip archive as torch has written since 1.6, of an object and its storages."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("archive/data.pkl", "w") as stream:
            pickled(state, stream)
        archive.writestr("archive/byteorder", records.get("byteorder", b"little"))
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data.tobytes())
        archive.writestr("archive/version", b"3\n")


def _with_storages(tree: Any, storages: dict[str, np.ndarray], legacy: bool) -> Any:
    """A nested dict with its arrays replaced by what tensors pickle into; `storages` is filled."""
    if isinstance(tree, dict):
        return {key: _with_storages(value, storages, legacy) for key, value in tree.items()}
    if not isinstance(tree, np.ndarray):
        return tree
    key = str(len(storages))
    storages[key] = np.ascontiguousarray(tree)
    view = (None,) if legacy else ()
    storage = Storage(Global("torch", STORAGE_NAMES[tree.dtype]), key, "cpu", tree.size, *view)
    strides = tuple(int(np.prod(tree.shape[i + 1 :])) for i in range(tree.ndim))
    return tensor(storage, 0, tree.shape, strides)


def save_tree(path: Path, tree: Any, legacy: bool = False) -> None:
    """torch.save(tree, path) of nested dicts of tensors and of what pickles by itself."""
    storages: dict[str, np.ndarray] = {}
    state = _with_storages(tree, storages, legacy)
    (write_stream if legacy else write_archive)(path, state, storages)


def save_archive(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """torch.save(state_dict, path)."""
    write_archive(path, *_state(arrays, legacy=False))


def save_stream(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """torch.save(state_dict, path, _use_new_zipfile_serialization=False)."""
    write_stream(path, *_state(arrays, legacy=True))


def write_stream(path: Path, state: Any, storages: dict[str, np.ndarray]) -> None:
    """A stream of pickles as torch wrote before 1.6, of an object and its storages."""
    with open(path, "wb") as stream:
        pickle.dump(0x1950A86A20F9469CFC6C, stream, protocol=2)
        pickle.dump(1001, stream, protocol=2)
        pickle.dump(
            {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}, stream, protocol=2
        )
        pickled(state, stream)
        pickle.dump(sorted(storages), stream, protocol=2)
        for key in sorted(storages):
            stream.write(storages[key].size.to_bytes(8, "little"))
            stream.write(storages[key].tobytes())
