"""Reading the text of a compiled program (HLO, as `compiled.as_text()` prints it): computations, instructions, loops.

XLA has no public interface to the program that it made; its text is what there is, on every backend. How many turns a
loop takes stands in the text on some backends only: elsewhere the loop's counter is followed, from its first value
until the condition fails.
"""

import dataclasses
import functools
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

_CALLED = re.compile(
    r"\b(?:calls|to_apply|branch_computations|true_computation|false_computation|called_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,<=]*)\]")
_OP_NAME = re.compile(r'\bop_name="((?:[^"\\]|\\.)*)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_MOST_TURNS = 10_000  # followed one by one before a loop counts as unknown


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name, opcode: of the instruction.
        shape: its result's type, as written.
        arguments: what stands between its parentheses, as written.
        attributes: what follows them.
    """

    name: str
    opcode: str
    shape: str
    arguments: str
    attributes: str

    @functools.cached_property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)

    @functools.cached_property
    def called(self) -> list[str]:
        return [name for found in _CALLED.findall(self.attributes) for name in re.findall(r"[\w.\-]+", found)]

    @property
    def op_name(self) -> str:
        """Where JAX says that it comes from, or ""."""
        return re.sub(r"\\(.)", r"\1", found[1]) if (found := _OP_NAME.search(self.attributes)) else ""

    @property
    def arrays(self) -> list[tuple[str, tuple[int, ...]]]:
        """(dtype, shape) of each array of the result."""
        found = _ARRAY.findall(self.shape)
        return [
            (dtype, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d))
            for dtype, dims in found
            if dtype not in ("token", "opaque")
        ]

    def attribute(self, name: str) -> str | None:
        """An attribute whose value is a single word."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """A function of the program: its instructions by name, and the one that it returns."""

    instructions: dict[str, Instruction]
    root: Instruction


class Program:
    """A compiled program, parsed.

    Args:
        text: from `compiled.as_text()`.

    Raises:
        ValueError: the text holds no program.
    """

    def __init__(self, text: str):
        self.computations, self.entry = _parse(text)
        partitions, replicas = (
            int(found[1]) if (found := re.search(rf"\b{name}=(\d+)", text[: text.find("\n")])) else 1
            for name in ("num_partitions", "replica_count")
        )
        self.num_devices = partitions * replicas

    def num_turns(self, loop: Instruction, around: Computation) -> int | None:
        """How many turns a loop takes, or None: that does not follow from the text.

        Args:
            loop: a "while".
            around: where it stands.
        """
        if known := _TRIPS.search(loop.attributes):
            return int(known[1])
        state = _Frame(self.computations, around).value(loop.operands[0])
        condition, body = (self.computations[loop.attribute(name) or ""] for name in ("condition", "body"))
        if not isinstance(state, tuple) or body.root.opcode != "tuple":
            return None
        for turn in range(_MOST_TURNS):
            goes_on = _Frame(self.computations, condition, (state,)).result()
            if not goes_on:
                return None if goes_on is None else turn
            frame = _Frame(self.computations, body, (state,))
            # Only what is a known number can become one.
            state = tuple(
                None if value is None else frame.value(operand)
                for value, operand in zip(state, body.root.operands, strict=True)
            )
        return None


def matching_parenthesis(text: str, start: int) -> int:
    """Where the parenthesis at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    return len(text)


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    computations: dict[str, Computation] = {}
    instructions: dict[str, Instruction] = {}
    entry, name, root = "", "", None
    for line in text.splitlines():
        if line[:1].strip() and line.endswith("{") and (head := re.match(r"(ENTRY )?%?([\w.\-]+)", line)):
            name, instructions, root = head[2], {}, None
            entry = name if head[1] else entry
        elif line.startswith("}") and name:
            if root is not None:
                computations[name] = Computation(instructions, root)
            name = ""
        elif name and (head := re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)):
            at = _instruction(head[2], line[head.end() :])
            instructions[at.name] = at
            root = at if head[1] else root
    if entry not in computations:
        raise ValueError("no program in this text: pass what compiled.as_text() returns")
    return computations, entry


def _instruction(name: str, text: str) -> Instruction:
    """From "SHAPE OPCODE(ARGUMENTS), ATTRIBUTES"."""
    end = matching_parenthesis(text, 0) + 1 if text.startswith("(") else text.index(" ")
    opened = text.index("(", end)
    closed = matching_parenthesis(text, opened)
    arguments = re.sub(r"/\*.*?\*/", "", text[opened + 1 : closed])
    return Instruction(name, text[end:opened].strip(), text[:end], arguments, text[closed + 1 :])


_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "minimum": min,
    "maximum": max,
    "and": operator.and_,
    "or": operator.or_,
    "not": operator.not_,
    "select": lambda which, a, b: a if which else b,
}
_SAME = {"copy", "bitcast", "convert", "reshape", "opt-barrier"}


class _Frame:
    """One run of a computation: the integers in it that follow from its parameters and constants.

    Args:
        computations: of the program.
        computation: the one that runs.
        given: the values of its parameters: integers, tuples of values, None where unknown.
    """

    def __init__(
        self, computations: dict[str, Computation], computation: Computation, given: Sequence[Any] = ()
    ):
        self._computations, self._computation, self._given = computations, computation, given
        self._values: dict[str, Any] = {}

    def result(self) -> Any:
        return self.value(self._computation.root.name)

    def value(self, name: str) -> Any:
        """That of an instruction, or None: unknown."""
        if name not in self._values:
            self._values[name] = self._compute(self._computation.instructions[name])
        return self._values[name]

    def _compute(self, at: Instruction) -> Any:
        if at.opcode == "parameter":
            index = int(at.arguments)
            return self._given[index] if index < len(self._given) else None
        if at.opcode == "constant":
            words = {"true": True, "false": False}
            return int(at.arguments) if re.fullmatch(r"-?\d+", at.arguments) else words.get(at.arguments)
        if at.opcode in _SAME:
            return self.value(at.operands[0])
        if at.opcode == "tuple":
            return tuple(map(self.value, at.operands))
        if at.opcode == "get-tuple-element":
            whole = self.value(at.operands[0])
            return whole[int(at.attribute("index") or 0)] if isinstance(whole, tuple) else None
        if at.opcode in ("fusion", "call") and len(at.called) == 1:
            given = tuple(map(self.value, at.operands))
            return _Frame(self._computations, self._computations[at.called[0]], given).result()
        compute = _ARITHMETIC.get(at.opcode)
        if at.opcode == "compare":
            compute = getattr(operator, (at.attribute("direction") or "").lower(), None)
        values = list(map(self.value, at.operands)) if compute else [None]
        return None if compute is None or None in values else compute(*values)
