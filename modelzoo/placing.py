"""Carries tensors between files and devices: every device's slice, one tensor at a time, no second copy.

Parameters are stacked over layers and sharded; files hold one tensor per layer. So an array is put together
per device shard: a buffer of the shard's shape, filled from the slice of each layer's tensor that belongs
there. On a CPU the buffer becomes the device's memory as it is; elsewhere it is sent in pieces of a few
layers and freed, so that the host holds a piece and not the array. Threads read a tensor each, or, of an array that
has fewer tensors than there are threads, a part of one each.
"""

import dataclasses
import math
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, wait
from functools import lru_cache
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from modelzoo.tensor_files import Box, Reader, TensorRef, read_blocks
from modelzoo.weights import StoredTensor

Device = Any
"""A jax.Device, which is no type that a checker knows."""
ALIGNMENT = 64
"""Bytes on which a numpy buffer must begin for JAX's CPU backend to take it over without copying."""
TILE_BYTES = 256 << 10
"""Two such tiles fit in a processor's second cache."""
PIECE_BYTES = 256 << 20
"""Host memory for what is on its way to accelerators."""
PART_BYTES = 16 << 20
"""A tensor is not cut into smaller parts for several threads."""
MAPPED_BYTES = 1 << 20
"""Buffers from this size on get memory of their own."""
WORKERS = min(8, os.cpu_count() or 1)
"""Threads that read."""


@dataclasses.dataclass(frozen=True)
class Source:
    """One tensor of a file that goes into an array.

    Attributes:
        tensor: what it is.
        ref: where it lies.
        part: its place along the tensor's fused axis (0 where nothing is fused).
    """

    tensor: StoredTensor
    ref: TensorRef
    part: int


@dataclasses.dataclass(frozen=True)
class Region:
    """A shard of an array, held by one or several devices.

    Attributes:
        box: its place in the array.
        devices: that hold it.
    """

    box: tuple[tuple[int, int], ...]
    devices: tuple[Device, ...]


def local_regions(sharding: Sharding, shape: Sequence[int]) -> list[Region]:
    """The different shards of an array that this process's devices hold."""
    devices: dict[tuple[tuple[int, int], ...], list[Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(tuple(shape)).items():
        assert index is not None
        box = tuple(s.indices(dim)[:2] for s, dim in zip(index, shape, strict=True))
        devices.setdefault(box, []).append(device)
    return [Region(box, tuple(held)) for box, held in devices.items()]


def read_array(
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: Sharding,
    sources: Sequence[Source],
    reader: Reader,
    workers: Executor,
    progress: Callable[[int], Any],
) -> jax.Array:
    """Reads one parameter onto its devices.

    Args:
        shape: of the array, with the vocabulary padded as the mesh wants it; what no tensor covers is zero.
        dtype: of the array; tensors are converted on the way.
        sharding: where it lies.
        sources: the tensors it consists of: one per layer, or one.
        reader: with the tensors' files open.
        workers: threads that read and convert, a tensor or a part of one each.
        progress: called from those threads with numbers of bytes read.

    Returns:
        The array; in a program of several processes each reads the slices of its own devices.

    Raises:
        OSError: a file cannot be read, or ends early.
    """
    regions = local_regions(sharding, shape)
    stacked = sources[0].tensor.layer is not None
    on_cpu = all(_is_host(region.devices[0]) for region in regions)
    shards: dict[Device, jax.Array] = {}
    for piece in _pieces(regions, dtype, stacked and not on_cpu):
        buffers = [_aligned(region.box, dtype) for region in piece]
        jobs = [
            workers.submit(_fill, buffers, piece, source, part, reader, progress)
            for source in sources
            for part in _parts(piece, source, max(1, WORKERS // len(sources)))
        ]
        try:
            for job in jobs:
                job.result()
        finally:  # also on Ctrl-C or an error: no thread writes into a buffer that is gone
            for job in jobs:
                job.cancel()
            wait(jobs)
        for buffer, region, whole in zip(buffers, piece, regions, strict=True):
            for device in region.devices:
                start = region.box[0][0] - whole.box[0][0] if region.box else 0
                shards[device] = _put(buffer, device, shards.get(device), whole, start)
        if not on_cpu:
            jax.block_until_ready(list(shards.values()))
    return jax.make_array_from_single_device_arrays(shape, sharding, list(shards.values()), dtype=dtype)


def _is_host(device: Device) -> bool:
    """Whether a device's memory is the host's own."""
    return device.platform == "cpu"


def _pieces(regions: list[Region], dtype: np.dtype, by_layer: bool) -> Iterator[list[Region]]:
    """The regions, cut along their leading axis so that each round of them fits in PIECE_BYTES."""
    if not by_layer:
        yield regions
        return
    depth = max(region.box[0][1] - region.box[0][0] for region in regions)
    row = sum(_size(region.box[1:]) for region in regions) * dtype.itemsize
    step = max(1, PIECE_BYTES // max(1, row))
    for offset in range(0, depth, step):
        cut = []
        for region in regions:
            low, high = region.box[0]
            first = min(low + offset, high)
            cut.append(Region(((first, min(first + step, high)), *region.box[1:]), region.devices))
        yield cut


def _size(box: Box) -> int:
    return math.prod(high - low for low, high in box)


def _aligned(box: Box, dtype: np.dtype) -> np.ndarray:
    """A zeroed buffer that JAX can take over; its pages cost nothing until they are written.

    A large one is mapped: malloc would keep what is freed, in gaps that the next tensor does not fit into.
    """
    nbytes = _size(box) * dtype.itemsize
    if nbytes >= MAPPED_BYTES:
        raw, start = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8), 0
    else:
        raw = np.zeros(nbytes + ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape([high - low for low, high in box])


def wanted_box(
    regions: Sequence[Region], source: Source
) -> tuple[list[tuple[int, list[tuple[int, int]]]], Box]:
    """What regions need of a tensor.

    Args:
        regions: of the array that the tensor goes into.
        source: the tensor.

    Returns:
        ((number of a region, its box in the parameter that the tensor holds) for all that need any of it,
        the box that has all of those in the tensor, a range per axis of the file; empty if none does).
    """
    tensor = source.tensor
    needed: list[tuple[int, list[tuple[int, int]]]] = []
    for number, region in enumerate(regions):
        box = list(region.box)
        if tensor.layer is not None:
            low, high = box.pop(0)
            if not low <= tensor.layer < high:
                continue
        # Rows past the true size are padding: no file has them.
        box = [
            (low, min(high, tensor.sizes[axis])) for axis, (low, high) in zip(tensor.axes, box, strict=True)
        ]
        if all(low < high for low, high in box):
            needed.append((number, box))
    if not needed:
        return [], [(0, 0) for _ in tensor.file_axes]
    hull = {tensor.fused: (source.part, source.part + 1)}
    for i, axis in enumerate(tensor.axes):
        hull[axis] = (min(box[i][0] for _, box in needed), max(box[i][1] for _, box in needed))
    return needed, [hull[axis] for axis in tensor.file_axes]


def bytes_to_read(regions: Sequence[Region], source: Source) -> int:
    """Bytes of a tensor that are read for regions of the array it goes into."""
    return _size(wanted_box(regions, source)[1]) * source.ref.dtype.itemsize


def _parts(regions: Sequence[Region], source: Source, most: int) -> list[Box]:
    """The box that regions need of a tensor, cut into at most so many boxes."""
    box = list(wanted_box(regions, source)[1])
    nbytes = _size(box) * source.ref.dtype.itemsize
    if not nbytes:
        return []
    axis = next((i for i, (low, high) in enumerate(box) if high - low > 1), 0)
    low, high = box[axis]
    count = max(1, min(most, nbytes // PART_BYTES, high - low))
    cuts = [low + (high - low) * i // count for i in range(count + 1)]
    return [[*box[:axis], ends, *box[axis + 1 :]] for ends in pairwise(cuts)]


def _fill(
    buffers: list[np.ndarray],
    regions: list[Region],
    source: Source,
    part: Box,
    reader: Reader,
    progress: Callable[[int], Any],
) -> None:
    """Reads a part of one tensor, once, into the buffers of the regions that need it."""
    tensor = source.tensor
    views = []
    for number, box in wanted_box(regions, source)[0]:
        buffer, first = buffers[number], regions[number].box[0][0] if regions[number].box else 0
        views.append((buffer if tensor.layer is None else buffer[tensor.layer - first], box))
    strides = source.ref.split_strides(tensor.groups, tensor.sizes)
    for stored_box, stored in read_blocks(reader, source.ref, strides, part):
        have = dict(zip(tensor.file_axes, stored_box, strict=True))
        block, block_box = _as_parameter(stored, tensor), [have[axis] for axis in tensor.axes]
        for view, box in views:
            _copy_overlap(view, box, block, block_box)
        progress(stored.size * stored.itemsize)


def _as_parameter(stored: np.ndarray, tensor: StoredTensor) -> np.ndarray:
    """A view of (a part of) a stored tensor, split into its axes, with the parameter's dimensions.

    Of a fused tensor it is a view of the first along the fused axis.
    """
    axes = (tensor.fused, *tensor.axes) if tensor.fused else tensor.axes
    stored = stored.transpose([tensor.file_axes.index(axis) for axis in axes])
    return stored[0] if tensor.fused else stored


def _copy_overlap(to: np.ndarray, to_box: Box, of: np.ndarray, of_box: Box) -> None:
    """Copies what two boxes of one array have in common; each starts at its box's lower corner."""
    to_slices, of_slices = [], []
    for (to_low, to_high), (of_low, of_high) in zip(to_box, of_box, strict=True):
        low, high = max(to_low, of_low), min(to_high, of_high)
        if low >= high:
            return
        to_slices.append(slice(low - to_low, high - to_low))
        of_slices.append(slice(low - of_low, high - of_low))
    _copy(to[tuple(to_slices)], of[tuple(of_slices)])


def _copy(to: np.ndarray, of: np.ndarray) -> None:
    """Copies and converts, tile by tile: ten times as fast as at once where a large array is transposed."""
    if to.nbytes > TILE_BYTES:
        axis = int(np.argmax(to.shape))
        middle = to.shape[axis] // 2
        for half in (slice(None, middle), slice(middle, None)):
            index = (slice(None),) * axis + (half,)
            _copy(to[index], of[index])
        return
    if to.dtype == of.dtype and to.dtype.itemsize == 2:  # numpy copies its own types faster than bfloat16
        to, of = to.view(np.uint16), of.view(np.uint16)
    np.copyto(to, of, casting="unsafe")


def _put(buffer: np.ndarray, device: Device, shard: jax.Array | None, whole: Region, start: int) -> jax.Array:
    """Sends a piece of a shard to its device, where `shard` holds the pieces before it."""
    shape = tuple(high - low for low, high in whole.box)
    if buffer.shape == shape:
        return jax.device_put(buffer, device)
    empty, write = _on_device(shape, buffer.dtype, device)
    with jax.set_mesh(mesh_of(device)):
        held: jax.Array = empty() if shard is None else shard
        return write(held, jax.device_put(buffer, device), np.int32(start)) if buffer.size else held


def mesh_of(device: Device) -> Mesh:
    """A mesh of one device and no axes: under it a program runs there, whatever mesh the caller has set."""
    return Mesh(np.array(device), ())


@lru_cache(maxsize=64)
def _on_device(shape: tuple[int, ...], dtype: np.dtype, device: Device) -> tuple[Callable[..., Any], ...]:
    sharding = SingleDeviceSharding(device)
    empty = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)
    write = jax.jit(
        lambda whole, piece, i: jax.lax.dynamic_update_slice_in_dim(whole, piece, i, 0), donate_argnums=0
    )
    return empty, write


def gather_tensor(
    tensor: StoredTensor, parameters: Sequence[tuple[Any, int | None]], dtype: np.dtype
) -> np.ndarray:
    """Puts one tensor of a file together from the parameters, on the host.

    Args:
        tensor: which one.
        parameters: of each of its paths, in order, the array (numpy or jax, sharded or not, perhaps with
            padding) and the row of it that is wanted, or None for all of it.
        dtype: of the result.

    Returns:
        An array of `tensor.shape`, contiguous.
    """
    out = np.zeros([tensor.sizes[axis] for axis in tensor.file_axes], dtype)
    true_box = [(0, tensor.sizes[axis]) for axis in tensor.axes]
    for part, (array, row) in enumerate(parameters):
        this = tuple(
            slice(part, part + 1) if axis == tensor.fused else slice(None) for axis in tensor.file_axes
        )
        view = _as_parameter(out[this], tensor)
        for box, data in _host_shards(array, row):
            _copy_overlap(view, true_box, data, box)
    return out.reshape(tensor.shape)


def _host_shards(array: Any, row: int | None) -> Iterator[tuple[Box, np.ndarray]]:
    """The different shards of an array, or of one row of it, as numpy arrays with their places."""
    if not isinstance(array, jax.Array):
        array = np.asarray(array)
        array = array if row is None else array[row]
        yield [(0, dim) for dim in array.shape], array
        return
    for shard in array.addressable_shards:
        if shard.replica_id:
            continue
        box = [s.indices(dim)[:2] for s, dim in zip(shard.index, array.shape, strict=True)]
        data = shard.data
        if row is None:
            yield box, _host(data)
        elif box[0][0] <= row < box[0][1]:
            yield box[1:], _host(data, row - box[0][0])


def _host(data: jax.Array, row: int | None = None) -> np.ndarray:
    if _is_host(next(iter(data.devices()))):
        whole = np.asarray(data)  # a view of the device's memory
        return whole if row is None else whole[row]
    # Only the row travels. numpy asks a copy on the host for it, as an array keeps what it was asked for.
    data = data if row is None else jax.lax.index_in_dim(data, row, 0, keepdims=False)
    return np.asarray(jax.device_put(data, jax.local_devices(backend="cpu")[0]))
