"""`python -m benchmarks`: decoding and training beside transformers on the same weights, as ratios."""

import dataclasses
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Flags:
    """Times flaxtron and transformers (torch) in turn, on the same weights. Without torch, flaxtron alone."""

    what: tyro.conf.Positional[Literal["all", "decode", "train"]] = "all"
    """What to measure."""
    width: int = 768
    """D of the GPT-J."""
    layers: int = 12
    """L."""
    heads: int = 12
    """N."""
    vocab_size: int = 50400
    """V."""
    batches: tuple[int, ...] = (1, 8)
    """Batch sizes of decoding."""
    new_tokens: int = 48
    """Tokens that decoding is timed over."""
    train_batch: int = 4
    """B of the training step."""
    train_length: int = 256
    """T of the training step."""
    rounds: int = 5
    """Alternations that count; the figures are their medians."""


def run(flags: Flags) -> dict[str, list[dict[str, Any]]]:
    """Measures what the flags ask for.

    Returns:
        Rows by benchmark.
    """
    from benchmarks import decode, peers, train_step

    config = peers.gptj_config(flags.width, flags.layers, flags.heads, flags.vocab_size)
    results = {}
    if flags.what in ("all", "decode"):
        results["decode"] = decode.measure(config, flags.batches, flags.new_tokens, flags.rounds)
    if flags.what in ("all", "train"):
        results["train step"] = train_step.measure(
            config, flags.train_batch, flags.train_length, flags.rounds
        )
    return results


def main() -> None:
    """Measures and prints tables."""
    results = run(tyro.cli(Flags, prog="python -m benchmarks"))
    for name, rows in results.items():
        table = Table(title=f"{name} (ratio: flaxtron over torch, median of rounds)", title_justify="left")
        for column in rows[0]:
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(
                *(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values())
            )
        Console(width=120).print(table)


if __name__ == "__main__":
    main()
