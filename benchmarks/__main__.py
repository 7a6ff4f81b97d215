"""`python -m benchmarks [all | decode | train]`: this library against transformers (torch), as ratios.

A random checkpoint is written once, and both sides read it. Without torch only the fractions of what the machine
can do are printed.
"""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from benchmarks import decode, train_step
from benchmarks.checkpoint import Checkpoint
from benchmarks.machine import Machine
from benchmarks.sides import Shape, Worker, has_torch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The command line."""

    what: tyro.conf.Positional[Literal["all", "decode", "train"]] = "all"
    """What to measure."""
    shape: Shape = dataclasses.field(default_factory=Shape)
    """The model."""
    batches: tuple[int, ...] = (1, 8)
    """decode: batch sizes."""
    prompt_length: int = 16
    """decode: tokens of a prompt."""
    new_tokens: int = 32
    """decode: tokens to measure over."""
    train_batch: int = 4
    """train: sequences in a step."""
    train_length: int = 256
    """train: tokens of a sequence."""
    rounds: int = 5
    """How often each side runs; medians are taken."""
    torch: bool = True
    """Measure torch too, where it is installed."""


def run(flags: Flags, side: Any = Worker) -> None:
    """Measures and prints.

    Args:
        flags: what, and how large.
        side: `Worker`, or `Local` to stay in this process.
    """
    shape, rng = flags.shape, np.random.default_rng(1)
    torch = flags.torch and has_torch()
    if flags.torch and not torch:
        print("torch and transformers are not installed: no ratios (pip install -e '.[parity]')")
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as always:
        folder = Path(name)
        with side(Checkpoint, shape, folder):
            pass
        limits = always.enter_context(side(Machine, shape, flags.train_batch * flags.train_length))

        def both(kind: Any, opened: contextlib.ExitStack, *args: Any) -> dict[str, Any]:
            sides = {"flaxtron": opened.enter_context(side(kind.Flaxtron, folder, *args))}
            if torch:
                sides["torch"] = opened.enter_context(side(kind.Torch, folder, *args))
            return sides

        for batch in flags.batches if flags.what != "train" else ():
            with contextlib.ExitStack() as opened:
                prompt = rng.integers(1, shape.vocab_size, (batch, flags.prompt_length), np.int64)
                sides = both(decode, opened, prompt, flags.new_tokens)
                show(decode.compare(sides, limits, shape, batch, flags.new_tokens, flags.rounds))
        if flags.what != "decode":
            with contextlib.ExitStack() as opened:
                size = (flags.train_batch, flags.train_length)
                sides = both(train_step, opened, rng.integers(1, shape.vocab_size, size, np.int32))
                show(train_step.compare(sides, limits, shape, *size, flags.rounds))


def show(lines: Sequence[str]) -> None:
    print("\n".join(lines), flush=True)


def main() -> None:
    """Reads the flags."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    run(tyro.cli(Flags, prog="python -m benchmarks", description=__doc__))


if __name__ == "__main__":
    main()
