"""Reading compiled programs: which collectives they hold, and how much each moves."""

import math
import os
import tempfile
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from parallel.collectives import transfers
from parallel.hlo import Program


@dataclass(frozen=True)
class Collective:
    """One array that one collective makes; XLA may put several of them into one operation.

    Attributes:
        kind: "all-reduce" and so on.
        shape: of the whole array on one device.
        in_loop: whether it runs more than once, in a loop.
    """

    kind: str
    shape: tuple[int, ...]
    in_loop: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def collectives(compiled: Any) -> list[Collective]:
    """Those of a compiled program that move more than a scalar."""
    found = transfers(Program(compiled.as_text()))
    return [Collective(one.kind, one.shape, one.count > 1) for one in found if math.prod(one.shape) > 1]


def compile_anew(lowered: Any) -> tuple[Any, str]:
    """Compiles with the least effort after partitioning, and past the cache on disk.

    A program that is read from the cache prints no compiler's warning; and what LLVM makes of it is not what tests of
    sharding are about, but is most of their time.

    Returns:
        (the compiled program, what the compiler wrote to standard error).
    """
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    stderr = os.dup(2)
    try:
        with tempfile.TemporaryFile() as log:
            os.dup2(log.fileno(), 2)
            compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})
            log.seek(0)
            return compiled, log.read().decode()
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()
