"""The collectives of a compiled program: what is moved between which devices, and how often.

Five things are easy to miscount, and are what this file is for:

- a loop's collectives run once a turn;
- a collective that runs in the background is a pair of operations (`-start`, `-done`), or on TPUs a chain of fusions
  that each repeat it;
- XLA merges collectives: one operation moves many arrays and bears many names;
- on TPUs a reduce-scatter is a fusion around an all-reduce;
- a program for several slices of TPUs is that of one of them, and what it sends to the others goes through the host.

Groups of devices are written in three ways: as lists, as a reshaped range `[4,2]<=[2,4]T(1,0)`, and as axes of an
unnamed mesh; here they all become tuples of device positions.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from parallel.hlo import Computation, Instruction, Program, matching_parenthesis

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
Groups = tuple[tuple[int, ...], ...]

_CALLERS = {"fusion", "call", "async-start", "custom-call", "conditional"}
_PAIRS = re.compile(r'\b(?:_xla_send_recv_)?source_target_pairs="?(\{\{.*?\}\}|\{\})')
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_TARGETS = re.compile(r"_xla_megascale_target=\"?(\{.*?\}(?:x\{\d+:\d+\}|\}))")
_HOST_KINDS = {"ONE_TO_ONE": "collective-permute"}
_PIECE = re.compile(r'"async_collective_fusion_config":\{"flag_start":"(?!-1")')


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One array that one collective moves; an operation of several arrays makes several of these.

    Attributes:
        kind: one of `KINDS`.
        dtype, shape: of the whole array on one device: what is reduced, what a gathering makes, what is scattered.
        groups: device positions that exchange with one another; of a collective-permute, (from, to) pairs.
        count: how often it runs in one call of the program.
        conditional: it stands in a branch, and runs that often at most.
        unbounded: it stands in a loop of unknown length, taken as one turn.
        op_name: where JAX says that it comes from.
        operation: the name of the operation.
        argument: which of its computation's parameters it moves, if whoever makes that knows a better name.
        crosses: it goes from slice to slice. Its groups are then of device ids, or, where `by_slice`, one group of all
            slices.
        by_slice: each device exchanges with those at the same position of every other slice.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    groups: Groups
    count: int
    conditional: bool
    unbounded: bool
    op_name: str
    operation: str
    argument: int | None = None
    crosses: bool = False
    by_slice: bool = False


def transfers(program: Program) -> list[Transfer]:
    """Every array that a collective moves between devices, in the order of the program."""
    return _Reader(program).of(program.entry)


def split_names(op_name: str) -> list[str]:
    """The names of a merged operation: "a/(b/c:d)" is "a/b/c" and "a/d"."""
    for found in re.finditer(r"(?:^|/)\(", op_name):
        start = found.end()
        if matching_parenthesis(op_name, start - 1) == len(op_name) - 1:
            break
    else:
        return [op_name]
    parts, depth, last = [], 0, start
    for i in range(start, len(op_name)):
        if depth == 0 and op_name[i] in ":)":
            parts.append(op_name[last:i])
            last = i + 1
        depth += {"(": 1, ")": -1}.get(op_name[i], 0)
    return [op_name[: start - 1] + name for part in parts for name in split_names(part)]


def common_scope(names: Sequence[str]) -> str:
    """What several names begin with, cut at a slash."""
    shared = []
    for parts in zip(*(name.split("/") for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return "/".join(shared)


def bytes_of(dtype: str, shape: Sequence[int]) -> int:
    """The size of an array; dtypes as HLO spells them."""
    bits = re.match(r"[a-z]+(\d+)", dtype)
    return -(-math.prod(shape) * (int(bits[1]) if bits else 8) // 8)


def replica_groups(text: str, num_devices: int) -> Groups:
    """Groups of devices from any of the three ways to write them.

    Args:
        text: "{{0,1},{2,3}}", "{}" (all devices), "[4,2]<=[2,4]T(1,0)", or
            "mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}"; what follows is ignored.
        num_devices: of the program.

    Raises:
        ValueError: another form.
    """
    if text.startswith("mesh["):
        found = re.match(r"mesh\[([^\]]*)\](?:, *device_ids=\((.*?)\))? *\{([^}]*)\}", text)
        if found:
            return _along_axes(*found.groups())
    elif found := re.match(r"\[([\d,]+)\](<=\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _rows(_device_ids(found[2]).reshape(_ints(found[1])))
    elif text.startswith("{{"):
        return tuple(
            tuple(_ints(group)) for group in re.findall(r"\{([\d,]*)\}", text[1:].split("}}")[0] + "}")
        )
    elif text.startswith("{}"):
        return (tuple(range(num_devices)),)
    raise ValueError(f"unknown form of replica groups: {text[:80]}")


def _along_axes(axes: str, device_ids: str | None, along: str) -> Groups:
    """Groups along axes of a mesh; 'a':(2)4 is the part of axis a that takes 4 after the first 2 of it."""
    sizes = {name: int(size) for name, size in re.findall(r"'?([^',=]+)'?=(\d+)", axes)}
    wanted = [
        (name, int(before or 1), int(size or sizes[name]))
        for name, before, size in re.findall(
            r"'?([^',:]+)'?(?::\((\d+)\)(\d+))?(?:,|$)", along.replace(" ", "")
        )
    ]
    dims, last = [], []  # every axis cut where a part of it begins or ends
    for name, size in sizes.items():
        cuts = sorted(
            {1, size} | {c for n, before, part in wanted if n == name for c in (before, before * part)}
        )
        for low, high in zip(cuts, cuts[1:], strict=False):
            if any(n == name and before <= low and high <= before * part for n, before, part in wanted):
                last.append(len(dims))
            dims.append(high // low)
    ids = np.arange(math.prod(dims)) if not device_ids else _device_ids(device_ids)
    ids = np.moveaxis(ids.reshape(dims), last, range(len(dims) - len(last), len(dims)))
    return _rows(ids.reshape(-1, math.prod(dims[i] for i in last)))


def _device_ids(text: str) -> np.ndarray:
    """ "<=[2,4]T(1,0)" or "[2,4]T(1,0)": a range, reshaped and transposed; "0,2,1,3": a list."""
    if not (found := re.match(r"(?:<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?", text)):
        return np.array(_ints(text))
    ids = np.arange(math.prod(_ints(found[1]))).reshape(_ints(found[1]))
    return ids.transpose(_ints(found[2])).ravel() if found[2] else ids.ravel()


def _rows(ids: np.ndarray) -> Groups:
    return tuple(tuple(map(int, row)) for row in ids)


def _ints(text: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", text)]


def _groups_of(at: Instruction, num_devices: int) -> Groups:
    if found := _PAIRS.search(at.attributes):
        pairs = () if found[1] == "{}" else replica_groups(found[1], num_devices)
        return tuple(pair for pair in pairs if pair[0] != pair[1])
    if at.opcode == "send":
        return ()  # to the host
    start = at.attributes.find("replica_groups=")
    text = "{}" if start < 0 else at.attributes[start + len("replica_groups=") :]
    return replica_groups(text, num_devices)


def _source(computation: Computation, operand: str) -> Instruction:
    """The instruction that names an operand, or the first that it was made from, a few steps back."""
    at = computation.instructions[operand]
    for _ in range(4):
        if at.op_name or not at.operands:
            break
        data = 1 if at.opcode == "dynamic-update-slice" else 0  # laid into a buffer of zeros
        before = computation.instructions[at.operands[data]]
        if at.opcode == "get-tuple-element" and before.opcode in ("parameter", "tuple", "while"):
            break  # one of many, and these bear no name of its own
        at = before
    return at


def _name(one: Transfer, source: Instruction, otherwise: str) -> Transfer:
    """With the name of what it moves, if it has none of its own."""
    if one.op_name:
        return one
    name = common_scope(split_names(source.op_name)) or otherwise
    is_argument = source.opcode == "parameter" and not source.op_name
    return dataclasses.replace(one, op_name=name, argument=int(source.arguments) if is_argument else None)


def _times(found: list[Transfer], times: int) -> list[Transfer]:
    return [dataclasses.replace(one, count=one.count * times) for one in found] if times else []


class _Reader:
    """Walks from the entry through whatever runs other computations; each is read once."""

    def __init__(self, program: Program):
        self._program, self._inside = program, {}

    def of(self, name: str) -> list[Transfer]:
        """Those of one run of a computation."""
        if name not in self._inside:
            computation, found = self._program.computations[name], []
            for instruction in computation.instructions.values():
                found += self._at(instruction, computation)
            self._inside[name] = found
        return self._inside[name]

    def _at(self, at: Instruction, computation: Computation) -> list[Transfer]:
        if at.opcode == "send" and (found := _BETWEEN_SLICES.search(at.attributes)):
            return [self._sent_to_slices(at, found[1], computation)]
        kind = "collective-permute" if at.opcode == "send" else at.opcode.removesuffix("-start")
        if kind in KINDS and not _PIECE.search(at.attributes):
            return self._moved(at, kind, computation)
        if at.opcode == "while":
            trips = self._program.num_turns(at, computation)
            turns = 1 if trips is None else trips
            condition, body = (self.of(at.attribute(name) or "") for name in ("condition", "body"))
            found = _times(condition, turns + 1) + _times(body, turns)
            changes = {"unbounded": True} if trips is None else {}
        elif at.opcode in _CALLERS:
            found = [one for name in at.called for one in self.of(name)]
            changes = {"conditional": True} if at.opcode == "conditional" else {}
            if any(name.startswith("all-reduce-scatter") for name in at.called):
                changes = {"kind": "reduce-scatter"}
        else:
            return []
        named = []
        for one in found:
            passed = one.argument if at.opcode in ("fusion", "call", "async-start") else None
            if passed is not None and passed < len(at.operands):
                one = _name(one, _source(computation, at.operands[passed]), at.op_name)
            else:
                one = dataclasses.replace(one, op_name=one.op_name or at.op_name, argument=None)
            named.append(dataclasses.replace(one, **changes))
        return named

    def _moved(self, at: Instruction, kind: str, computation: Computation) -> list[Transfer]:
        groups = _groups_of(at, self._program.num_devices)
        size = max(map(len, groups), default=1)
        if size < 2:
            return []  # every device would send to itself
        arrays, count = at.arrays, len(at.operands)
        if kind in ("all-gather", "collective-permute") and at.opcode.endswith("-start"):
            arrays = arrays[count : 2 * count]  # after the operands, before what only the runtime uses
        elif at.opcode != "all-to-all":
            arrays = arrays[: 1 if at.opcode == "send" else count]
        names = split_names(at.op_name)
        if len(names) != len(arrays):  # merged without merging the names: at best one of them is left
            names = [""] * len(arrays)
        moved = []
        for i, ((dtype, shape), name) in enumerate(zip(arrays, names, strict=True)):
            if kind == "reduce-scatter":
                dim = int(re.findall(r"dimensions=\{(\d+)", at.attributes)[0])
                shape = (*shape[:dim], shape[dim] * size, *shape[dim + 1 :])
            one = Transfer(kind, dtype, shape, groups, 1, False, False, name, at.name)
            source = _source(computation, at.operands[min(i, count - 1)])
            moved.append(_name(one, source, common_scope(split_names(at.op_name))))
        return moved

    def _sent_to_slices(self, at: Instruction, kind: str, computation: Computation) -> Transfer:
        """What a host carries between slices: "{1,2}x{0:3}" are slices and devices of each, "{{7,9},{8,10}}" and
        "{{7->9},{8->10}}" device ids."""
        targets = _TARGETS.search(at.attributes)
        if targets is None:
            raise ValueError(f"unknown form of a transfer between slices: {at.attributes[:200]}")
        slices, by_slice, _ = targets[1].partition("x{")
        dtype, shape = at.arrays[0]
        kind = _HOST_KINDS.get(kind, kind.lower().replace("_", "-"))
        groups = tuple(tuple(_ints(group)) for group in re.findall(r"\{([\d,\->]+)\}", slices))
        if kind == "all-gather":  # what is sent is a part of it
            shape = (shape[0] * len(groups[0]), *shape[1:])
        one = Transfer(
            *(kind, dtype, shape, groups, 1, False, False, at.op_name, at.name),
            crosses=True,
            by_slice=bool(by_slice),
        )
        return _name(one, _source(computation, at.operands[0]), "")
