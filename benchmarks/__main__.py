"""`python -m benchmarks [all | decode | first | beams | train]`: this library against transformers (torch), as ratios.

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

from benchmarks import beams, decode, train_step
from benchmarks.checkpoint import Checkpoint
from benchmarks.machine import Machine
from benchmarks.sides import Shape, Worker, has_torch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The command line."""

    what: tyro.conf.Positional[Literal["all", "decode", "first", "beams", "train"]] = "all"
    """What to measure."""
    shape: Shape = dataclasses.field(default_factory=Shape)
    """The model."""
    batches: tuple[int, ...] = (1, 8, 32)
    """decode: batch sizes."""
    first_length: int = 512
    """first: tokens of the prompt whose first continuation is waited for."""
    beams: int = 4
    """beams: hypotheses of a beam search, by an MVP of the same width, heads and vocabulary."""
    flax: bool = False
    """decode: measure the Flax class of transformers 4 too, up to batch 8; it compiles for each length."""
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
            sides = {"flaxtron": opened.enter_context(side(kind.Flaxtron, *args))}
            if torch:
                sides["torch"] = opened.enter_context(side(kind.Torch, *args))
            return sides

        def prompts(rows: int, length: int) -> np.ndarray:
            return rng.integers(1, shape.vocab_size, (rows, length), np.int64)

        for batch in flags.batches if flags.what in ("all", "decode") else ():
            with contextlib.ExitStack() as opened:
                prompt = prompts(batch, flags.prompt_length)
                sides = both(decode, opened, folder, prompt, flags.new_tokens)
                if flags.flax and batch <= 8:
                    flax = side(decode.OldFlax, folder, prompt, flags.new_tokens)
                    sides["Flax of transformers 4"] = opened.enter_context(flax)
                show(decode.compare(sides, limits, shape, batch, flags.new_tokens, flags.rounds))
        if flags.what in ("all", "first"):
            with contextlib.ExitStack() as opened:
                sides = both(decode, opened, folder, prompts(1, flags.first_length), 0)
                show(decode.compare_first(sides, flags.first_length, flags.rounds))
        if flags.what in ("all", "beams"):
            with contextlib.ExitStack() as opened:
                mvp = folder / "mvp"
                with side(beams.Checkpoint, shape, mvp):
                    pass
                sides = both(beams, opened, mvp, prompts(1, 128), flags.beams, flags.new_tokens)
                show(beams.compare(sides, flags.beams, flags.new_tokens, flags.rounds))
        if flags.what in ("all", "train"):
            with contextlib.ExitStack() as opened:
                size = (flags.train_batch, flags.train_length)
                sides = both(train_step, opened, folder, rng.integers(1, shape.vocab_size, size, np.int32))
                show(train_step.compare(sides, limits, shape, *size, flags.rounds))


def show(lines: Sequence[str]) -> None:
    print("\n".join(lines), flush=True)


def main() -> None:
    """Reads the flags."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    run(tyro.cli(Flags, prog="python -m benchmarks", description=__doc__))


if __name__ == "__main__":
    main()
