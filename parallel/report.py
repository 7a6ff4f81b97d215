"""What the compiler made of a program: every collective, what caused it, and where the memory goes.

    compiled = step.lower(state, batch).compile()
    rich.print(inspect_program(compiled, mesh))

The compiler's own text and figures are read (`parallel.hlo`, `parallel.collectives`), so this needs no device: a
program that was compiled ahead of time for a TPU slice is described as well.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Group as Stacked
from rich.table import Table

from parallel.collectives import Groups, Transfer, bytes_of, transfers
from parallel.hlo import Program

PARAMETERS, OPTIMIZER, OTHERS = "parameters", "optimizer state", "batch and others"

# Parts of an op_name that say how a program was built, not where in the model it is.
_STRUCTURE = re.compile(
    r"while|body|cond|closed_call|core_call|checkpoint|rematted_computation|shard_map|scan|pjit|branch_\d+_fun|"
    r"custom_[jv]+p_call(_jaxpr)?"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array that one collective moves; XLA may put several of them into one operation.

    Attributes:
        kind: one of `parallel.collectives.KINDS`.
        axes: the mesh axes it runs over, in the mesh's order.
        group: how many devices exchange with one another.
        dtype, shape: of the whole array on one device: what is reduced, what a gathering makes, what is scattered.
        bytes: of that array.
        count: how often it runs in one call of the program.
        bound: "" if it runs just so often; "<=" in a branch, which may not be taken; ">=" in a loop of unknown
            length, taken as one turn; "~" in both.
        module: the named scopes it comes from, such as "forward/GPTJForCausalLM/trunk/GPTJBlock/mlp/fc_out"; or the
            argument that is moved before anything is done with it.
        phase: "forward", "recompute" or "backward" of a differentiated program, else "".
        operation: its name in the compiled program.
        crosses: it goes from slice to slice of TPUs.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    count: int
    bound: str
    module: str
    phase: str
    operation: str
    crosses: bool = False

    @property
    def size(self) -> int:
        """Elements of the array."""
        return math.prod(self.shape)

    @property
    def bytes_sent(self) -> int:
        """What one device sends in all runs together, if the group forms a ring."""
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.bytes * self.count
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.bytes * (self.group - 1) // self.group * self.count


@dataclasses.dataclass(frozen=True)
class CollectiveGroup:
    """The collectives of one kind that one module causes over the same axes.

    Attributes:
        kind, axes, module, phase: what they share.
        arrays: how many arrays.
        count: runs in one call of the program, all arrays together.
        bound: as in `Collective`.
        bytes: of the arrays, each as often as it is moved.
        bytes_sent: sum of theirs.
        crosses: they go from slice to slice.
    """

    kind: str
    axes: tuple[str, ...]
    phase: str
    module: str
    arrays: int
    count: int
    bound: str
    bytes: int
    bytes_sent: int
    crosses: bool


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device, by the compiler's account.

    Attributes:
        arguments: by class: parameters, optimizer state, batch and others.
        padding: what the arguments take beyond that, for their layout.
        outputs: results.
        aliased: the part of the outputs that lies where donated arguments were.
        temporaries: activations, gradients, gathered parameters and whatever else lives only while it runs.
        code: the program itself.
    """

    arguments: dict[str, int]
    padding: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """Everything that is held at once; aliased outputs counted as the arguments that they were."""
        held = sum(self.arguments.values()) + self.padding + self.outputs - self.aliased
        return held + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class ProgramReport:
    """What a compiled program does; `rich.print` shows it as tables.

    Attributes:
        mesh: sizes of the mesh's axes.
        collectives: in the order of the program.
        memory: None where the backend does not tell.
    """

    mesh: dict[str, int]
    collectives: tuple[Collective, ...]
    memory: Memory | None

    def grouped(self) -> list[CollectiveGroup]:
        """The collectives by kind, axes, phase and module; those that send most come first."""
        groups: dict[Any, list[Collective]] = {}
        for one in self.collectives:
            groups.setdefault((one.kind, one.axes, one.phase, one.module, one.crosses), []).append(one)
        found = [
            CollectiveGroup(
                *shared,
                crosses=crosses,
                arrays=len(ones),
                count=sum(one.count for one in ones),
                bound=_bound({one.bound for one in ones}),
                bytes=sum(one.bytes * one.count for one in ones),
                bytes_sent=sum(one.bytes_sent for one in ones),
            )
            for (*shared, crosses), ones in groups.items()
        ]
        return sorted(found, key=lambda group: -group.bytes_sent)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return dataclasses.asdict(self)

    def __rich__(self) -> Stacked:
        return Stacked(*filter(None, (self._collectives_table(), self._memory_table())))

    def _collectives_table(self) -> Table:
        sizes = " x ".join(f"{axis}={size}" for axis, size in self.mesh.items() if size > 1)
        table = Table(title=f"collectives of one call on {sizes or 'one device'}", title_justify="left")
        for name in ("kind", "over", "pass", "caused by"):
            table.add_column(name, overflow="fold")
        for name in ("arrays", "runs", "bytes per device", "sent"):
            table.add_column(name, justify="right")
        groups = self.grouped()
        for g in groups:
            figures = (
                str(g.arrays),
                f"{g.bound}{g.count}",
                format_bytes(g.bytes),
                format_bytes(g.bytes_sent),
            )
            over = " x ".join(g.axes) + ", between slices" * g.crosses
            table.add_row(g.kind, over, g.phase, g.module, *figures)
        totals = (sum(g.arrays for g in groups), sum(g.count for g in groups))
        sums = (sum(g.bytes for g in groups), sum(g.bytes_sent for g in groups))
        table.add_section()
        table.add_row("total", "", "", "", *map(str, totals), *map(format_bytes, sums))
        return table

    def _memory_table(self) -> Table | None:
        if (memory := self.memory) is None:
            return None
        table = Table(title="memory of one device", title_justify="left")
        table.add_column("class")
        table.add_column("bytes", justify="right")
        rows = memory.arguments | {"padding of these": memory.padding}
        rows |= {"outputs of their own": memory.outputs - memory.aliased, "temporaries": memory.temporaries}
        for name, size in (rows | {"program": memory.code}).items():
            table.add_row(name, format_bytes(size))
        table.add_section()
        table.add_row("total", format_bytes(memory.total))
        return table


def class_of_argument(path: str) -> str:
    """The class of an argument of a train step or the like, by its path, such as "0/params/trunk/embed/embedding"."""
    names = path.split("/")
    if "opt_state" in names:
        return OPTIMIZER
    return PARAMETERS if "params" in names else OTHERS


def inspect_program(
    compiled: Any, mesh: Mesh, classify: Callable[[str], str] = class_of_argument
) -> ProgramReport:
    """Describes a compiled program.

    Args:
        compiled: what `jax.jit(f).lower(...).compile()` returns, such as that of `train.make_train_step(...).lower`.
        mesh: the mesh that it was compiled for.
        classify: from an argument's path ("ARGUMENT/KEY/KEY...") to the class it is counted under in `Memory`.

    Returns:
        Its collectives and its memory.

    Raises:
        ValueError: the program was compiled for another number of devices.
    """
    program = Program(compiled.as_text())
    slices = _slices(mesh)
    if program.num_devices not in (mesh.size, slices.shape[1]):
        raise ValueError(
            f"mesh {dict(mesh.shape)} has {mesh.size} devices, but the program was compiled for {program.num_devices}"
        )
    if program.num_devices == mesh.size:
        slices = slices.reshape(1, -1)
    placed = (_placed(one, slices, mesh) for one in transfers(program))
    found = tuple(_describe(one, dict(mesh.shape)) for one in placed)
    return ProgramReport(dict(mesh.shape), found, _memory(compiled, classify))


def _slices(mesh: Mesh) -> np.ndarray:
    """Positions in the mesh, counted in its order: those of one slice of TPUs in each row."""
    numbers = np.array([getattr(device, "slice_index", 0) for device in mesh.devices.flat])
    return np.stack([np.flatnonzero(numbers == number) for number in np.unique(numbers)])


def _placed(one: Transfer, slices: np.ndarray, mesh: Mesh) -> Transfer:
    """A transfer whose groups are of positions in the mesh; of a program for one of several slices, those of all."""
    if one.by_slice:
        groups = tuple(tuple(map(int, column)) for column in slices.T)
    elif one.crosses:
        at = {device.id: i for i, device in enumerate(mesh.devices.flat)}
        groups = tuple(tuple(at[number] for number in group) for group in one.groups)
    else:
        groups = tuple(tuple(int(row[i]) for i in group) for row in slices for group in one.groups)
    return dataclasses.replace(one, groups=groups)


def kept_by_loops(program: Program) -> int:
    """Bytes that loops write for later ones on a TPU: in a training step, what the layers keep for their way back.

    Args:
        program: the compiled one; of other compilers 0.
    """
    entry = program.computations[program.entry].instructions.values()
    buffers = (at for at in entry if 'custom_call_target="AllocateBuffer"' in at.attributes)
    return sum(bytes_of(dtype, shape) for at in buffers for dtype, shape in at.arrays)


def axes_of(groups: Groups, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ.

    Args:
        groups: positions in the mesh, counted in its order.
        mesh: sizes of its axes.
    """
    shape = tuple(mesh.values())
    moves = [
        np.unravel_index(group[0], shape) != np.array(np.unravel_index(member, shape))
        for group in groups
        for member in group[1:]
    ]
    return tuple(axis for axis, moved in zip(mesh, np.any(moves, axis=0), strict=True) if moved)


def scope_of(op_name: str) -> tuple[str, str]:
    """What JAX's name of an operation says: (named scopes joined by slashes, phase as in `Collective`).

    An argument's name, such as "state.params['bias']", stays as it is.
    """
    if "/" not in op_name:
        return op_name, ""
    phase = ""
    if "transpose(" in op_name:
        phase = "recompute" if "rematted_computation" in op_name else "backward"
    elif "jvp(" in op_name:
        phase = "forward"
    scopes: list[str] = []
    parts = _parts(op_name)
    for part in parts[:-1]:  # the last is the primitive
        name = part.partition(".")[0]  # of linen's MODULE.METHOD
        if name and not _STRUCTURE.fullmatch(name) and scopes[-1:] != [name]:
            scopes.append(name)
    return "/".join(scopes), phase


def format_bytes(size: float) -> str:
    """1536 is "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _parts(op_name: str) -> list[str]:
    """Split at slashes, the wrappers of JAX's transformations taken off: jit(f)/jvp(a/b)/c is "", a, b, c."""
    parts, depth, last = [], 0, 0
    for i, letter in enumerate(op_name + "/"):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == "/" and depth <= 0:
            part, last = op_name[last:i], i + 1
            if wrapped := re.fullmatch(r"(\w+)\((.*)\)", part):
                parts += [""] if wrapped[1] in ("jit", "pjit") else _parts(wrapped[2])
            else:
                parts.append(part)
    return parts


def _describe(one: Transfer, mesh: Mapping[str, int]) -> Collective:
    module, phase = scope_of(one.op_name)
    return Collective(
        kind=one.kind,
        axes=axes_of(one.groups, mesh),
        group=max(map(len, one.groups)),
        dtype=one.dtype,
        shape=one.shape,
        bytes=bytes_of(one.dtype, one.shape),
        count=one.count,
        bound=_bound({"<=" * one.conditional, ">=" * one.unbounded}),
        module=module,
        phase=phase,
        operation=one.operation,
        crosses=one.crosses,
    )


def _bound(bounds: set[str]) -> str:
    """The bound of what has all of these."""
    bounds = bounds - {""}
    return "~" if len(bounds) > 1 else "".join(bounds)


def _memory(compiled: Any, classify: Callable[[str], str]) -> Memory | None:
    if (stats := compiled.memory_analysis()) is None:
        return None
    sizes: dict[str, int] = {PARAMETERS: 0, OPTIMIZER: 0, OTHERS: 0}
    (args, kwargs), shardings = compiled.args_info, compiled.input_shardings
    # An argument that the program has no use for has no sharding: None, as a tree's missing parts are.
    shardings = jax.tree.structure((args, kwargs)).flatten_up_to(tuple(shardings))
    named = [(path, leaf) for tree in (args, kwargs) for path, leaf in jax.tree.leaves_with_path(tree)]
    for (path, leaf), sharding in zip(named, shardings, strict=True):
        if sharding is not None:  # else the program has no use for it, and does not take it
            name = classify(jax.tree_util.keystr(path, simple=True, separator="/"))
            sizes[name] = sizes.get(name, 0) + _bytes_on_device(leaf.shape, leaf.dtype, sharding)
    return Memory(
        arguments=sizes,
        padding=stats.argument_size_in_bytes - sum(sizes.values()),
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )


def _bytes_on_device(shape: tuple[int, ...], dtype: Any, sharding: Any) -> int:
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(shape, dtype))
        return data.size * data.dtype.itemsize
    return math.prod(sharding.shard_shape(shape)) * dtype.itemsize
