"""`python -m benchmarks.engine`: continuous batching against batches formed by arrival, the same greedy tokens.

Requests of mixed lengths stand in a queue. One side gives them to `inference.Engine`; the other to
`inference.generate` in groups of as many as the engine has rows, in the order of arrival, each group running until the
longest of its requests is done.
"""

import dataclasses
import os
from typing import Any

import numpy as np
import tyro

from benchmarks.sides import Shape, Worker, alternate, median, ratio


@dataclasses.dataclass(frozen=True)
class Load:
    """The requests.

    Attributes:
        num_requests: how many.
        num_rows: that generate at once.
        prompt: shortest and longest prompt, in tokens; drawn log-uniformly, as is the next.
        new: fewest and most new tokens.
        seed: of the draw.
    """

    num_requests: int = 64
    num_rows: int = 8
    prompt: tuple[int, int] = (8, 64)
    new: tuple[int, int] = (8, 256)
    seed: int = 0

    def requests(self, vocab_size: int) -> list[tuple[list[int], int]]:
        """(prompt, number of new tokens) of each."""
        random = np.random.default_rng(self.seed)

        def lengths(low: int, high: int) -> np.ndarray:
            return np.exp(random.uniform(np.log(low), np.log(high + 1), self.num_requests)).astype(int)

        sizes = zip(lengths(*self.prompt), lengths(*self.new), strict=True)
        return [(random.integers(1, vocab_size, size).tolist(), int(new)) for size, new in sizes]


class Sides:
    """Both ways in one process, which take turns on one set of weights; each method returns the new tokens."""

    def __init__(self, shape: Shape, load: Load):
        import jax

        import inference
        import modelzoo
        import parallel
        from inference.engine import Engine

        self._model = modelzoo.GPTJForCausalLM(modelzoo.GPTJConfig(**shape.config()))
        self._params = inference.prepare(self._model, parallel.init_params(self._model, jax.random.key(0)))
        self._requests, self._load = load.requests(shape.vocab_size), load
        length = min(shape.n_positions, -(-(load.prompt[1] + load.new[1]) // 64) * 64)
        self._engine = Engine(self._model, self._params, load.num_rows, max_length=length, prefix_cache=False)
        self.compiled = self._engine.warm_up()

    def continuously(self) -> list[list[int]]:
        """The engine."""
        from inference.requests import SamplingParams

        taken = [self._engine.submit(p, SamplingParams(max_new_tokens=n)) for p, n in self._requests]
        for _ in self._engine.run():
            pass
        return [request.output for request in taken]

    def in_groups(self) -> list[list[int]]:
        """`generate` on groups by arrival."""
        import inference

        found = []
        for first in range(0, len(self._requests), self._load.num_rows):
            group = self._requests[first : first + self._load.num_rows]
            width = max(len(prompt) for prompt, _ in group)
            ids = np.array([[0] * (width - len(prompt)) + prompt for prompt, _ in group])
            mask = np.array([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in group])
            config = inference.GenerationConfig(max_new_tokens=max(new for _, new in group), pad_token_id=0)
            out = inference.generate(self._model, self._params, ids, mask, config)
            found += [
                row[width : width + new].tolist() for row, (_, new) in zip(out.sequences, group, strict=True)
            ]
        return found

    def one_at_a_time(self, count: int) -> list[list[int]]:
        """`generate` on the first requests, each alone."""
        import inference

        found = []
        for prompt, new in self._requests[:count]:
            config = inference.GenerationConfig(max_new_tokens=new)
            out = inference.generate(self._model, self._params, [prompt], config=config)
            found.append(np.asarray(out.sequences)[0, len(prompt) :].tolist())
        return found


def compare(side: Any, load: Load, vocab_size: int, rounds: int, alone: int) -> list[str]:
    """Measures.

    Args:
        side: a worker of `Sides`.
        load: what it was given.
        vocab_size: of the model.
        rounds: how often each way runs.
        alone: requests whose tokens are compared with those of a call of their own.

    Returns:
        Lines to print.

    Raises:
        RuntimeError: the ways chose different tokens.
    """
    ours, groups = side.call("continuously")[0], side.call("in_groups")[0]
    single = side.call("one_at_a_time", alone)[0]
    if ours != groups or ours[:alone] != single:
        different = [i for i, tokens in enumerate(ours) if tokens != (single[i] if i < alone else groups[i])]
        raise RuntimeError(f"requests {different} got different tokens: the ratio would mean nothing")
    ways = ("continuously", "in_groups")
    times = alternate({way: lambda way=way: side.call(way)[1] for way in ways}, rounds)
    total = sum(new for _, new in load.requests(vocab_size))
    gain = ratio(times["in_groups"], times["continuously"])
    rates = {way: total / median(times[way]).wall for way in ways}
    return [
        f"{load.num_requests} requests, {total} new tokens, {load.num_rows} rows: tokens equal to `generate`'s"
        f" in groups, and one at a time ({alone} requests)",
        f"  continuous {rates['continuously']:.1f} tok/s, groups by arrival {rates['in_groups']:.1f} tok/s:"
        f" {gain.wall:.2f} x (by processor time {gain.cpu:.2f})",
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The command line."""

    shape: Shape = dataclasses.field(default_factory=Shape)
    """The model."""
    load: Load = dataclasses.field(default_factory=Load)
    """The requests."""
    rounds: int = 3
    """How often each way runs; medians are taken."""
    alone: int = 16
    """Requests whose tokens are compared with those of a call of their own."""


def run(flags: Flags, side: Any = Worker) -> None:
    """Measures and prints."""
    with side(Sides, flags.shape, flags.load) as both:
        alone = min(flags.alone, flags.load.num_requests)
        print("\n".join(compare(both, flags.load, flags.shape.vocab_size, flags.rounds, alone)), flush=True)


def main() -> None:
    """Reads the flags."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    run(tyro.cli(Flags, prog="python -m benchmarks.engine", description=__doc__))


if __name__ == "__main__":
    main()
