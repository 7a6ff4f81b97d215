"""What the machine itself can do, measured by JAX in the same run as what is compared with it."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of one call, its arrays ready."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def alternate(contestants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Runs every contestant once a round, in turn, so that a machine whose speed drifts treats them alike.

    Args:
        contestants: name -> a function that returns its own figure.
        rounds: how many counted rounds; one more, first, is thrown away.
    """
    figures: dict[str, list[float]] = {name: [] for name in contestants}
    for round in range(rounds + 1):
        for name, run in contestants.items():
            figure = run()
            if round:
                figures[name].append(figure)
    return figures


def ratio(figures: Mapping[str, list[float]], of: str, to: str) -> float:
    """The median over rounds of one figure divided by another of the same round."""
    return float(np.median([a / b for a, b in zip(figures[of], figures[to], strict=True)]))


def read_bandwidth(num_bytes: int = 1 << 29) -> Callable[[], float]:
    """Makes a measurement of bytes per second read from memory: the best of three sums of a large array."""
    array = jnp.ones(num_bytes // 4, jnp.float32)
    total = jax.jit(jnp.sum)
    return lambda: num_bytes / min(seconds(lambda: total(array)) for _ in range(3))


def matmul_peak(rows: int, width: int, hidden: int) -> Callable[[], float]:
    """Makes a measurement of FLOP/s of JAX's own float32 products, in the shapes of a training step.

    A product [rows, width] x [width, hidden] and the two of its backward pass, the best of three times eight of each.
    """
    x, w, dy = (jnp.ones(shape, jnp.float32) for shape in ((rows, width), (width, hidden), (rows, hidden)))
    products = (
        jax.jit(lambda x, w, dy: x @ w),
        jax.jit(lambda x, w, dy: dy @ w.T),
        jax.jit(lambda x, w, dy: x.T @ dy),
    )
    flops = 2.0 * rows * width * hidden * len(products) * 8

    def run() -> Any:
        return [product(x, w, dy) for _ in range(8) for product in products]

    return lambda: flops / min(seconds(run) for _ in range(3))
