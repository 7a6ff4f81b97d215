"""The names in PyTorch's pickles, and what stands in for each: nothing is imported, nothing of theirs runs.

A pickle makes its objects by naming functions and classes and having them called. `TENSORS` is what a state
dict of tensors names. `RECORDS` and `PACKAGES` are what lies around the tensors in a training run's file
(options, random states, enums, an optimizer): each becomes a `Record`, which remembers what it was called with
and does nothing. Every other name is for the caller to refuse.
"""

import re
from collections import OrderedDict
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

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


class StorageType(NamedTuple):
    """Stands in for torch.FloatStorage and its kin."""

    dtype: np.dtype


class Storage(NamedTuple):
    """A run of elements: `offset` elements into the file's storage `key`."""

    dtype: np.dtype
    key: str
    offset: int
    numel: int


class Tensor(NamedTuple):
    """A view of a storage; offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


# The stand-ins have no attributes that a pickle could set (__slots__, tuples): nothing that one file holds
# outlives it.
class _RebuildTensor:
    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
        if isinstance(shape, Record) and shape.name == "torch.Size" and len(shape.args) == 1:
            (shape,) = shape.args
        if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
            raise ValueError("a tensor is not made of a storage, a shape and strides")
        if len(shape) != len(strides) or not all(
            type(n) is int and n >= 0 for n in (offset, *shape, *strides)
        ):
            raise ValueError(f"a tensor has shape {shape}, strides {strides} and offset {offset}")
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if 0 not in shape and last >= storage.numel:
            raise ValueError(f"a tensor reaches element {last} of a storage of {storage.numel}")
        return Tensor(storage, offset, shape, strides)


class _RebuildParameter:
    __slots__ = ()

    def __call__(self, tensor: Any, *_: Any) -> Tensor:
        if not isinstance(tensor, Tensor):
            raise ValueError("a parameter is not made of a tensor")
        return tensor


class _RebuildFromType:
    """A tensor with attributes: (how it is rebuilt, its class, the arguments, the attributes)."""

    __slots__ = ()

    def __call__(self, rebuild: Any, kind: Any, arguments: Any, *_: Any) -> Tensor:
        if not isinstance(rebuild, _RebuildTensor | _RebuildParameter) or not isinstance(arguments, tuple):
            raise ValueError("a tensor with attributes is not made of a tensor")
        return rebuild(*arguments)


class Record:
    """An object of which its name, its arguments and its attributes are kept, and which does nothing.

    Attributes:
        name: what the pickle calls its class or function.
        args: what it was called with.
        fields: the attributes that it was given.
    """

    __slots__ = ("args", "fields")
    name = ""

    def __new__(cls, *args: Any, **_: Any) -> "Record":
        self = object.__new__(cls)
        self.args, self.fields = args, {}
        return self

    def __setstate__(self, state: Any) -> None:
        # Attributes are a dict, or (a dict, those that have slots).
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.fields.update({name: value for name, value in part.items() if isinstance(name, str)})

    # What the class may have been a subclass of: a list, a set or a dict. Its elements are not kept.
    def extend(self, items: Any) -> None:
        """Takes the elements of a list."""

    def add(self, item: Any) -> None:
        """Takes an element of a set."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Takes an entry of a dict."""


class _Reconstruct:
    """What older protocols make an instance with: (class, base class, the base's state)."""

    __slots__ = ()

    def __call__(self, kind: Any, *_: Any) -> Any:
        if not (isinstance(kind, type) and issubclass(kind, Record)):
            raise ValueError("an object is made of something that is no class")
        return kind()


class _Encode:
    """Bytes, as Python 3 writes them into pickles that Python 2 can read."""

    __slots__ = ()

    def __call__(self, text: Any, encoding: Any = "latin1") -> bytes:
        if not isinstance(text, str) or encoding != "latin1":
            raise ValueError(f"bytes are spelled in {encoding!r}, not in latin1")
        return text.encode("latin1")


class _Scalar:
    """A numpy number becomes one of Python's; what is no plain number, a record."""

    __slots__ = ()

    def __call__(self, dtype: Any, data: Any = b"") -> Any:
        code = dtype.args[0] if isinstance(dtype, Record) and dtype.args else None
        if isinstance(code, str) and isinstance(data, bytes) and re.fullmatch("[iuf][248]|b1|[iu]1", code):
            if len(data) != np.dtype(code).itemsize:
                raise ValueError(f"a number of type {code} has {len(data)} bytes")
            return np.frombuffer(data, code)[0].item()
        return None


TENSORS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _RebuildTensor(),
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
    **{
        (module, name): StorageType(dtype)
        for module in ("torch", "torch.cuda")
        for name, dtype in STORAGES.items()
    },
}
"""What a state dict of tensors is made of."""
_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
CALLS: dict[tuple[str, str], Any] = {
    **TENSORS,
    ("torch._utils", "_rebuild_parameter_with_state"): _RebuildParameter(),
    ("torch._tensor", "_rebuild_from_type"): _RebuildFromType(),
    ("torch._tensor", "_rebuild_from_type_v2"): _RebuildFromType(),
    ("copyreg", "_reconstructor"): _Reconstruct(),
    ("_codecs", "encode"): _Encode(),
    **{(module, "scalar"): _Scalar() for module in _NUMPY},
}
"""What a training run's file has called, beside records."""
_NAMED = {
    "argparse": "Namespace",
    "types": "SimpleNamespace",
    "builtins": "set frozenset bytearray complex slice range object dict list tuple int float str bool bytes",
    "collections": "defaultdict deque Counter",
    "copyreg": "__newobj__",
    "datetime": "datetime date timedelta",
    "functools": "partial",
    "io": "BytesIO",
    "_io": "BytesIO",
    "pathlib": "Path PosixPath PurePath PurePosixPath WindowsPath",
    "random": "Random",
    "signal": "Signals",
    "numpy": "dtype ndarray float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool_",
    "numpy.core.multiarray": "_reconstruct",
    "numpy._core.multiarray": "_reconstruct",
    "numpy.random._pickle": "__randomstate_ctor __generator_ctor __bit_generator_ctor",
    "numpy.random._mt19937": "MT19937",
    "torch": "Size device Tensor Generator float16 float32 float64 bfloat16 half float double int8 int16 int32 "
    "int64 uint8 bool strided",
    "torch.nn.parameter": "Parameter",
}
RECORDS = {(module, name) for module, names in _NAMED.items() for name in names.split()}
"""What becomes a `Record` by its own name."""
PACKAGES = ("megatron", "apex", "deepspeed", "transformer_engine", "torch.nn.functional", "torch._C._nn")
"""Everything in these becomes a `Record`: a run's enums, loss scalers, activations."""


def record_class(module: str, name: str) -> type[Record] | None:
    """A class that stands in for this name, new at every call; None where none may."""
    in_package = any(module == package or module.startswith(package + ".") for package in PACKAGES)
    if not in_package and (module, name) not in RECORDS:
        return None
    return type("Record", (Record,), {"__slots__": (), "name": f"{module}.{name}"})
