"""A checkpoint on its way: Hugging Face names, and for each a tensor that is read when it is written.

A format's reader says where the bytes of every tensor lie and what is to be done with them (cut, joined over
ranks, transposed), from the headers alone; no tensor is in memory before its turn. So shapes are checked
before anything is written, and converting takes the memory of one tensor and its parts.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modelzoo.tensor_files import Reader, TensorRef, contiguous_strides, read_blocks


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that is yet to be read.

    Attributes:
        name: what its file calls it, for messages.
        shape: its dimensions.
        dtype: of its elements.
        read: reads it; a sum comes in float32, to be rounded when it is written.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def transposed(self) -> "Tensor":
        """Its dimensions in the opposite order."""
        return dataclasses.replace(self, shape=self.shape[::-1], read=lambda: self.read().T)

    def reshaped(self, shape: Sequence[int]) -> "Tensor":
        """The same elements in a row-major array of another shape."""
        assert math.prod(shape) == math.prod(self.shape)
        return dataclasses.replace(self, shape=tuple(shape), read=lambda: self.read().reshape(shape))

    def first_rows(self, count: int) -> "Tensor":
        """The first `count` rows, or all where it has no more."""
        shape = (min(count, self.shape[0]), *self.shape[1:])
        return (
            self
            if shape == self.shape
            else dataclasses.replace(self, shape=shape, read=lambda: self.read()[:count])
        )


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a format's reader finds.

    Attributes:
        config: the contents of config.json, as transformers writes it.
        tensors: by Hugging Face name.
        folder: where tokenizer files may lie beside the weights.
        notes: what the user should know about the result, a line each.
        checked: whether the reader itself made sure that the tensors are what the config says.
    """

    config: dict[str, Any]
    tensors: Mapping[str, Tensor]
    folder: Path
    notes: tuple[str, ...] = ()
    checked: bool = False


def stored(name: str, ref: TensorRef) -> Tensor:
    """A tensor as its file holds it."""

    def read() -> np.ndarray:
        out = np.empty(ref.shape, ref.dtype)
        with Reader() as reader:
            reader.open(ref.file)
            for box, block in read_blocks(reader, ref, ref.strides, [(0, n) for n in ref.shape]):
                out[tuple(slice(low, high) for low, high in box)] = block
        return out

    return Tensor(name, ref.shape, ref.dtype, read)


def joined(parts: Sequence[Tensor], axis: int) -> Tensor:
    """Tensors put together along an axis, in order.

    Raises:
        ValueError: their other dimensions or their dtypes differ.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    others = {(part.shape[:axis], part.shape[axis + 1 :], part.dtype) for part in parts}
    if len(others) > 1 or not 0 <= axis < len(first.shape):
        shapes = ", ".join(f"{list(part.shape)} {part.dtype}" for part in parts)
        raise ValueError(f"the parts of {first.name} do not fit together: {shapes}")
    total = sum(part.shape[axis] for part in parts)
    shape = (*first.shape[:axis], total, *first.shape[axis + 1 :])

    def read() -> np.ndarray:
        out, start = np.empty(shape, first.dtype), 0
        for part in parts:
            stop = start + part.shape[axis]
            out[(slice(None),) * axis + (slice(start, stop),)] = part.read()
            start = stop
        return out

    return Tensor(first.name, shape, first.dtype, read)


def summed(parts: Sequence[Tensor]) -> Tensor:
    """The sum of tensors that broadcast to the first one's shape, in float32: it is rounded once, when written."""
    first = parts[0]

    def read() -> np.ndarray:
        total = parts[0].read().astype(np.float32)
        for part in parts[1:]:
            total += part.read().astype(np.float32)
        return total

    return Tensor(first.name, first.shape, first.dtype, read)


def part_of_rows(name: str, ref: TensorRef, dims: Sequence[int], axis: int, index: int) -> Tensor:
    """One entry along an axis of a tensor whose rows are an array of several axes.

    Args:
        name: of the tensor.
        ref: where it lies.
        dims: its rows, as an array: their product is its first dimension.
        axis: which of `dims` is looked at.
        index: the entry.

    Returns:
        The rows that are at `index`, the other axes of `dims` in order; only they are read.
    """
    assert math.prod(dims) == ref.shape[0]
    strides = [stride * ref.strides[0] for stride in contiguous_strides(dims)]
    offset = ref.offset + index * strides[axis] * ref.dtype.itemsize
    rest = [i for i in range(len(dims)) if i != axis]
    view = TensorRef(
        ref.file,
        offset,
        ref.dtype,
        (*(dims[i] for i in rest), *ref.shape[1:]),
        (*(strides[i] for i in rest), *ref.strides[1:]),
    )
    return stored(name, view).reshaped((ref.shape[0] // dims[axis], *ref.shape[1:]))


def find_misfit(wanted: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> str | None:
    """What keeps tensors from being those of a config, in one line; None if nothing does.

    Args:
        wanted: the shape of every tensor that the config asks for.
        tensors: what there is.
    """
    missing = [name for name in wanted if name not in tensors]
    extra = [name for name in tensors if name not in wanted]
    misshapen = [
        f"{name} is {list(tensors[name].shape)}, where the config makes it {list(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    found = {"missing": missing, "unexpected": extra, "wrong-shaped": misshapen}
    lines = [f"{len(names)} {kind}, such as {names[0]}" for kind, names in found.items() if names]
    return "; ".join(lines) or None
