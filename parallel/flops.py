"""How many FLOPs a compiled program takes, by its text: products and convolutions, as often as their loops turn.

XLA's own figure (`compiled.cost_analysis()["flops"]`) counts a loop's body once, so a scan over 70 layers would count
as one layer.
"""

import math
import re

from parallel.hlo import Computation, Instruction, Program

_CALLERS = {"fusion", "call", "async-start", "conditional"}


def count_flops(program: Program) -> float:
    """FLOPs of one call on one device: 2 for every multiplication and addition of products and convolutions.

    Of a branch the dearest side counts; a loop of unknown length counts as one turn.

    Args:
        program: of a CPU, a GPU or a TPU.
    """
    return _Reader(program).of(program.entry)


class _Reader:
    def __init__(self, program: Program):
        self._program, self._inside = program, {}

    def of(self, name: str) -> float:
        """FLOPs of one run of a computation."""
        if name not in self._inside:
            computation = self._program.computations[name]
            self._inside[name] = sum(self._at(at, computation) for at in computation.instructions.values())
        return self._inside[name]

    def _at(self, at: Instruction, computation: Computation) -> float:
        if at.opcode == "dot":
            return _dot(at, computation)
        if at.opcode == "convolution":
            return _convolution(at, computation)
        if at.opcode == "while":
            turns = self._program.num_turns(at, computation)
            return (1 if turns is None else turns) * self.of(at.attribute("body") or "")
        if at.opcode in _CALLERS:
            inside = [self.of(name) for name in at.called if name in self._program.computations]
            return max(inside, default=0.0) if at.opcode == "conditional" else sum(inside)
        return 0.0


def _shape(name: str, computation: Computation) -> tuple[int, ...]:
    return computation.instructions[name].arrays[0][1]


def _dot(at: Instruction, computation: Computation) -> float:
    left = _shape(at.operands[0], computation)
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", at.attributes)
    contracted = math.prod(left[int(i)] for i in re.findall(r"\d+", found[1])) if found else 1
    return 2.0 * math.prod(at.arrays[0][1]) * contracted


def _convolution(at: Instruction, computation: Computation) -> float:
    """TPUs write every product as one; batch dimensions become windows that mostly meet nothing."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", at.attributes)
    assert labels, f"a convolution without labels: {at.name}"
    shapes = (*(_shape(name, computation) for name in at.operands[:2]), at.arrays[0][1])
    base, kernel, result = (
        dict(zip(text, shape, strict=True)) for text, shape in zip(labels.groups(), shapes, strict=True)
    )
    window = dict(
        re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", at.attributes) or ("", ""))[1])
    )
    spatial = sorted(letter for letter in result if letter.isdigit())
    met = 1
    for i, letter in enumerate(spatial):
        met *= _positions(i, base[letter], kernel[letter], result[letter], window)
    return 2.0 * result["b"] * result["f"] * kernel["i"] * met


def _positions(i: int, base: int, kernel: int, result: int, window: dict[str, str]) -> int:
    """How often, along one dimension, an element of the kernel meets one of the base."""

    def part(name: str, default: str) -> str:
        return window[name].split("x")[i] if name in window else default

    stride, dilated, spread = (int(part(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    low = int(part("pad", "0_0").split("_")[0])
    if kernel == 1 and stride == 1 and low == 0 and dilated == 1:
        return result
    count, last = 0, (base - 1) * dilated
    for k in range(kernel):
        for out in range(result):
            at = out * stride - low + k * spread
            count += 0 <= at <= last and at % dilated == 0
    return count
