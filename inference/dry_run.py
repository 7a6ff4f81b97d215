"""What loading a checkpoint takes, told from its config and its files' headers alone: bytes per host and per device.

print(inference.plan_load("bigscience/bloom", {"tensor": 8}, quantize="int8"))
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType

import modelzoo
import parallel
from inference.loading import find_checkpoint, open_checkpoint
from modelzoo import hf, placing, quantizing
from modelzoo import weights as tables
from modelzoo.hf_headers import Headers

Box = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class HostPlan:
    """One machine's part.

    Attributes:
        devices: how many it has.
        reads: bytes of the files; in a training run's checkpoint, of the arrays that its devices hold.
        holds: bytes of parameters on its devices, together.
        passing: host memory that the largest array needs on its way to the devices.
    """

    devices: int
    reads: int
    holds: int
    passing: int


@dataclasses.dataclass(frozen=True)
class LoadPlan:
    """What a load will do; `str` of it is a text for a person.

    Attributes:
        folder: the checkpoint's.
        model: its model.
        headers: which files were looked into; None for a training run's checkpoint.
        quantize: "int8" or None.
        hosts: in order.
        device_bytes: what the parameters take on each device, in the mesh's order.
        cache_bytes: one token of one sequence in the key/value cache, on all devices together; None if there is none.
        mesh: sizes of the mesh's axes.
        simulated: the mesh is of devices that are not here.
    """

    folder: Any
    model: modelzoo.Model
    headers: Headers | None
    quantize: str | None
    hosts: tuple[HostPlan, ...]
    device_bytes: tuple[int, ...]
    cache_bytes: int | None
    mesh: dict[str, int]
    simulated: bool

    def __str__(self) -> str:
        number = f"{modelzoo.num_params(self.model):,} parameters"
        kept = np.dtype(self.model.param_dtype).name + (", kernels in int8" if self.quantize else "")
        sizes = ",".join(f"{axis}={size}" for axis, size in self.mesh.items() if size > 1) or "none"
        lines = [
            f"checkpoint: {self.folder}",
            f"model: {type(self.model).__name__}, {number}, kept in {kept}",
            f"files: {self._files()}",
            f"mesh: {sizes}; {_count(len(self.device_bytes), 'device')} on {_count(len(self.hosts), 'host')}"
            + (", planned for" if self.simulated else ""),
        ]
        groups = itertools.groupby(enumerate(self.hosts), key=lambda item: item[1])
        for host, members in groups:
            numbers = [number for number, _ in members]
            devices = f"{_count(host.devices, 'device')} {'holds' if host.devices == 1 else 'hold'}"
            lines.append(
                f"{_span('host', numbers)}: reads {_bytes(host.reads)}; its {devices} {_bytes(host.holds)}; host "
                f"memory beyond that at most {_bytes(host.passing)}, one array on its way"
            )
        for held, members in itertools.groupby(enumerate(self.device_bytes), key=lambda item: item[1]):
            lines.append(f"{_span('device', [number for number, _ in members])}: {_bytes(held)}")
        if self.cache_bytes is not None:
            lines.append(f"key/value cache: {_bytes(self.cache_bytes)} a token, on all devices together")
        return "\n".join([*lines, "nothing has been read"])

    def _files(self) -> str:
        if self.headers is None:
            return "a training run's checkpoint; what is read of it is counted as float32"
        assumed = self.headers.assumed
        as_configured = "" if assumed is None else f"shapes and {assumed.name} are config.json's"
        if not self.headers.num_read + self.headers.num_absent:
            return f"no weights are here; {as_configured}"
        text = f"the headers of {_count(self.headers.num_read, 'file')} were read"
        if assumed is not None:
            text += f"; of {_count(self.headers.num_absent, 'file')} that are not here {as_configured}"
        return text


def plan_load(
    path: str | os.PathLike[str],
    sizes: Mapping[str, int] = {},
    dtype: Any = np.float32,
    quantize: str | None = None,
    hosts: int | None = None,
) -> LoadPlan:
    """Plans what `Checkpoint.read_prepared` does. Reads a config and headers, compiles nothing, holds nothing.

    Args:
        path: as of `open_checkpoint`; a Hugging Face folder may lack some or all files of its weights.
        sizes: of the mesh's axes, as of `parallel.make_mesh`. A mesh of another number of devices than are here is
            planned for all the same.
        dtype: of parameters.
        quantize: "int8" or None.
        hosts: number of machines, each with as many of the mesh's devices in a row; None: as they are, or one.

    Raises:
        OSError, ValueError: no such checkpoint, a damaged header, or a mesh that the model or the hosts do not divide.
    """
    quantizing.check_kind(quantize)
    rules, host_of, simulated = _mesh(sizes, hosts)
    folder, is_run = find_checkpoint(path, with_weights=False)
    headers = None if is_run else Headers()
    if is_run:
        model: Any = open_checkpoint(folder, dtype).model
        sources, dtypes = {}, {}
    else:
        opened = hf.open_folder(folder, None, dtype, dtype, headers)
        model, sources, dtypes = opened.model, opened.sources, opened.dtypes
    shapes = tables.flatten(modelzoo.abstract_params(model))
    names = tables.flatten(modelzoo.logical_axes(model))
    shared = {} if quantize is None else quantizing.shared_dims(model)
    # Where it decodes on a CPU, a tied head has a copy of its table.
    copied = quantizing.tied_table(model) if jax.default_backend() == "cpu" and not simulated else None

    reads, holds, passing = ([0] * (max(host_of) + 1) for _ in range(3))
    device_bytes = [0] * len(host_of)
    for path_, spec in shapes.items():
        stacked = names[path_][0] == quantizing.LAYERS
        axes, shape = names[path_][stacked:], spec.shape[stacked:]
        count = spec.shape[0] if stacked else 1
        copies = 2 if path_ == copied else 1
        boxes = _boxes(rules, "/".join(path_), axes, shape, len(host_of))
        kept = np.dtype(dtypes.get(path_, dtype))
        for device, box in enumerate(boxes):
            device_bytes[device] += count * copies * _held(box, kept, shared.get(path_))
        for host in range(len(reads)):
            distinct = dict.fromkeys(box for box, at in zip(boxes, host_of, strict=True) if at == host)
            regions = [placing.Region(box, ()) for box in distinct]
            group = [_alone(source) for source in sources.get(path_, ())]
            width = max((source.ref.dtype.itemsize for source in group), default=kept.itemsize)
            width = width if path_ in shared else kept.itemsize
            largest = sum(math.prod(high - low for low, high in box) for box in distinct)
            passing[host] = max(passing[host], largest * width)
            if is_run:
                reads[host] += count * largest * np.dtype(np.float32).itemsize
            reads[host] += sum(placing.bytes_to_read(regions, source) for source in group)
    for device, host in enumerate(host_of):
        holds[host] += device_bytes[device]
    plans = (
        HostPlan(host_of.count(host), *row)
        for host, row in enumerate(zip(reads, holds, passing, strict=True))
    )
    mesh = dict(rules.mesh.shape) if rules is not None else {}
    return LoadPlan(
        *(folder, model, headers, quantize, tuple(plans), tuple(device_bytes)),
        *(_cache_bytes(model), mesh, simulated),
    )


def _mesh(sizes: Mapping[str, int], hosts: int | None) -> tuple[parallel.Rules | None, list[int], bool]:
    """The rules of a mesh, the host of each of its devices, and whether those are not here."""
    if hosts is not None and hosts < 1:
        raise ValueError(f"hosts = {hosts}: at least 1 machine holds the model")
    if not sizes:
        if hosts not in (None, 1):
            raise ValueError(f"hosts = {hosts} without a mesh: say how the model is spread, such as tensor=8")
        return None, [0], False
    full = {axis: sizes.get(axis, 1) for axis in parallel.MESH_AXES}
    count = math.prod(full.values())
    if min(full.values()) < 1 or (hosts is None and count == jax.device_count()):
        mesh: Any = parallel.make_mesh(**cast(Any, sizes))
        processes = [device.process_index for device in mesh.devices.flat]
        if hosts is None:
            return parallel.make_rules(mesh), processes, False
        full = dict(mesh.shape)
        count = mesh.size
    hosts = hosts or 1
    if count % hosts:
        raise ValueError(f"hosts = {hosts} does not divide the mesh's {count} devices")
    mesh = AbstractMesh(tuple(full.values()), tuple(full), axis_types=(AxisType.Auto,) * len(full))
    return parallel.make_rules(mesh), [i * hosts // count for i in range(count)], count != jax.device_count()


def _boxes(
    rules: parallel.Rules | None, name: str, axes: tuple[str | None, ...], shape: tuple[int, ...], count: int
) -> list[Box]:
    """The part of a parameter that each of the mesh's devices holds, in its order."""
    if rules is None:
        return [tuple((0, dim) for dim in shape)] * count
    shape = rules.padded_shape(axes, shape)
    try:
        rules.spec(axes, shape)
    except ValueError as error:
        raise ValueError(f"parameter {name} {shape}: {error}") from None
    rules.check_replication(name, axes, shape)
    mesh = dict(rules.mesh.shape)
    boxes = []
    for position in itertools.product(*map(range, mesh.values())):
        place, box = dict(zip(mesh, position, strict=True)), []
        for axis, dim in zip(axes, shape, strict=True):
            shard, step = 0, dim // rules.num_shards(axis)
            for mesh_axis in rules.mesh_axes(axis):
                shard = shard * mesh[mesh_axis] + place[mesh_axis]
            box.append((shard * step, (shard + 1) * step))
        boxes.append(tuple(box))
    return boxes


def _held(box: Box, dtype: np.dtype, shared: Iterable[int] | None) -> int:
    """Bytes of a part of a parameter on a device; `shared` are the dimensions that share a scale, in int8."""
    dims = [high - low for low, high in box]
    if shared is None:
        return math.prod(dims) * dtype.itemsize
    return math.prod(dims) + 4 * math.prod(dim for i, dim in enumerate(dims) if i not in shared)


def _alone(source: placing.Source) -> placing.Source:
    """A source of an array that is not stacked."""
    return dataclasses.replace(source, tensor=dataclasses.replace(source.tensor, layer=None))


def _cache_bytes(model: Any) -> int | None:
    """Of one token of one row."""
    if model.task not in ("causal_lm", "seq2seq_lm", "unshifted_lm"):
        return None
    cache = jax.eval_shape(lambda: model.init_cache(1, 2)).layers
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)) // 2


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _span(what: str, numbers: list[int]) -> str:
    return f"{what} {numbers[0]}" if len(numbers) == 1 else f"each of {what}s {numbers[0]} to {numbers[-1]}"


def _bytes(number: int) -> str:
    return f"{number:,} bytes ({number / 2**30:.2f} GiB)" if number >= 2**27 else f"{number:,} bytes"
