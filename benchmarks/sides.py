"""The two sides of a comparison: one process each, taking turns, so that neither's threads or memory disturb the other.

A machine that is not ours alone slows both sides alike only while they alternate; so every round runs both, and
a ratio is the median of the rounds' ratios. The processor time that a run took is kept beside its wall time: it
hardly changes when others use the machine.
"""

import dataclasses
import importlib.util
import math
import multiprocessing
import resource
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Self


@dataclasses.dataclass(frozen=True)
class Shape:
    """The benchmark model, a GPT-J; the defaults are 162M parameters."""

    vocab_size: int = 50400
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    rotary_dim: int = 64
    n_positions: int = 1024

    def config(self) -> dict[str, Any]:
        """Keyword arguments of either library's GPTJConfig; no dropout, so that both compute the same."""
        return dataclasses.asdict(self) | dict(
            n_inner=4 * self.n_embd,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )

    @property
    def kernel_size(self) -> int:
        """Weights that every token is multiplied with: all but the embedding table, norms and biases."""
        return self.n_layer * 12 * self.n_embd**2 + self.n_embd * self.vocab_size


@dataclasses.dataclass(frozen=True)
class Seconds:
    """What a run took: wall time, and processor time of all its threads."""

    wall: float
    cpu: float

    def __sub__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.wall - other.wall, self.cpu - other.cpu)


class Local:
    """A side in this process: `make(*args)`, whose methods `call` names."""

    def __init__(self, make: Callable[..., Any], *args: Any):
        self._side = make(*args)

    def call(self, method: str, *args: Any) -> tuple[Any, Seconds]:
        """What the method returns, and what it took."""
        return _timed(getattr(self._side, method), args)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        del self._side


class Worker:
    """A side in a process of its own; used like `Local`."""

    def __init__(self, make: Callable[..., Any], *args: Any):
        context = multiprocessing.get_context("spawn")
        self._pipe, remote = context.Pipe()
        self._process = context.Process(target=_serve, args=(remote, make, args), daemon=True)
        self._process.start()
        remote.close()
        self._receive()

    def call(self, method: str, *args: Any) -> tuple[Any, Seconds]:
        """What the method returns, and what it took there."""
        self._pipe.send((method, args))
        return self._receive()

    def _receive(self) -> Any:
        try:
            failed, result = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise OSError(f"a side of the benchmark died, exit code {self._process.exitcode}") from None
        if failed:
            raise RuntimeError(f"a side of the benchmark failed:\n{result}")
        return result

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()  # the process ends when its pipe does
        self._process.join()


def _serve(pipe: Any, make: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        side = make(*args)
        pipe.send((False, None))
        while True:
            method, args = pipe.recv()
            pipe.send((False, _timed(getattr(side, method), args)))
    except (EOFError, KeyboardInterrupt):
        return
    except Exception:
        pipe.send((True, traceback.format_exc()))


def _timed(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, Seconds]:
    def cpu() -> float:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime

    wall_start, cpu_start = time.perf_counter(), cpu()
    result = function(*args)
    return result, Seconds(time.perf_counter() - wall_start, cpu() - cpu_start)


def has_torch() -> bool:
    """Whether torch and transformers are installed (the extra `parity`)."""
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def alternate(turns: Mapping[str, Callable[[], Seconds]], rounds: int) -> dict[str, list[Seconds]]:
    """Every turn once a round, in an order that swaps from round to round.

    Args:
        turns: by name, what runs and tells its time.
        rounds: how often.

    Returns:
        The times by name, one for each round.
    """
    times: dict[str, list[Seconds]] = {name: [] for name in turns}
    for i in range(rounds):
        for name in list(turns)[:: 1 if i % 2 == 0 else -1]:
            times[name].append(turns[name]())
    return times


def median(times: list[Seconds]) -> Seconds:
    """The median of each kind of time."""
    return Seconds(statistics.median(t.wall for t in times), statistics.median(t.cpu for t in times))


def ratio(slow: list[Seconds], fast: list[Seconds]) -> Seconds:
    """How many times longer `slow` took than `fast`: the median over rounds."""
    walls = [a.wall / b.wall for a, b in zip(slow, fast, strict=True)]
    cpus = [a.cpu / b.cpu if b.cpu else math.nan for a, b in zip(slow, fast, strict=True)]
    return Seconds(statistics.median(walls), statistics.median(cpus))


def against_torch(times: Mapping[str, list[Seconds]], num_tokens: int) -> list[str]:
    """The line on torch, of what each side took for so many tokens; none where it was not measured."""
    if "torch" not in times:
        return []
    gain = ratio(times["torch"], times["flaxtron"])
    return [
        f"  torch {num_tokens / median(times['torch']).wall:.1f} tok/s; flaxtron / torch = {gain.wall:.2f}"
        f" (by processor time {gain.cpu:.2f})"
    ]
