"""Learning-rate schedules by gin name: step -> rate, as optax takes them.

They count from step 0 and give their first positive value there: no step is spent at a rate of zero.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

__all__ = ["constant", "inverse_sqrt", "warmup_cosine", "warmup_linear", "warmup_stable_decay"]


def check_ranges(name: str, *rows: tuple[str, Any, bool]) -> None:
    """Refuses settings out of range.

    Args:
        name: what they are settings of, as gin knows it.
        rows: (setting, its value, whether it is in range).

    Raises:
        ValueError: one is not; names it.
    """
    for field, value, holds in rows:
        if not holds:
            raise ValueError(f"{name}.{field} = {value!r} is out of range")


def _ramp(step: Any, warmup_steps: int, num_steps: int) -> tuple[jax.Array, jax.Array]:
    """The share of the warm-up that step has reached, and of what follows it; both in [0, 1]."""
    step = jnp.asarray(step).astype(jnp.float32)
    rise = jnp.minimum(1.0, (step + 1) / max(warmup_steps, 1))
    fall = jnp.clip((step + 1 - warmup_steps) / max(num_steps - warmup_steps, 1), 0.0, 1.0)
    return rise, fall


def _check_schedule(
    name: str, peak: float, warmup_steps: int, end_fraction: float, num_steps: int, *more: Any
) -> None:
    check_ranges(
        name,
        ("peak", peak, peak >= 0),
        ("warmup_steps", warmup_steps, warmup_steps >= 0),
        ("end_fraction", end_fraction, 0 <= end_fraction <= 1),
        ("num_steps", num_steps, num_steps >= 1),
        *more,
    )


def constant(*, value: float) -> optax.Schedule:
    """The same learning rate at every step.

    Args:
        value: the learning rate.

    Raises:
        ValueError: it is negative.
    """
    check_ranges("constant", ("value", value, value >= 0))
    return lambda step: jnp.float32(value)


def warmup_cosine(
    *, peak: float, num_steps: int, warmup_steps: int = 0, end_fraction: float = 0.1
) -> optax.Schedule:
    """A linear rise to `peak`, then half a cosine down to `end_fraction * peak` at the last step.

    Args:
        peak: the highest learning rate, reached at the last warm-up step.
        num_steps: steps of the run.
        warmup_steps: steps of the rise; 0 starts at the peak.
        end_fraction: share of the peak at the end, kept by later steps.

    Raises:
        ValueError: a number out of range.
    """
    _check_schedule("warmup_cosine", peak, warmup_steps, end_fraction, num_steps)

    def schedule(step: Any) -> jax.Array:
        rise, fall = _ramp(step, warmup_steps, num_steps)
        return peak * rise * (end_fraction + (1 - end_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * fall)))

    return schedule


def warmup_linear(
    *, peak: float, num_steps: int, warmup_steps: int = 0, end_fraction: float = 0.0
) -> optax.Schedule:
    """A linear rise to `peak`, then a straight line down to `end_fraction * peak` at the last step.

    Args:
        peak: the highest learning rate, reached at the last warm-up step.
        num_steps: steps of the run.
        warmup_steps: steps of the rise; 0 starts at the peak.
        end_fraction: share of the peak at the end, kept by later steps.

    Raises:
        ValueError: a number out of range.
    """
    _check_schedule("warmup_linear", peak, warmup_steps, end_fraction, num_steps)

    def schedule(step: Any) -> jax.Array:
        rise, fall = _ramp(step, warmup_steps, num_steps)
        return peak * rise * (1 - (1 - end_fraction) * fall)

    return schedule


def warmup_stable_decay(
    *,
    peak: float,
    num_steps: int,
    warmup_steps: int = 0,
    decay_fraction: float = 0.2,
    end_fraction: float = 0.0,
    shape: Literal["linear", "cosine", "1-sqrt"] = "linear",
) -> optax.Schedule:
    """A linear rise to `peak`, a plateau, and a fall to `end_fraction * peak` over the last steps.

    WSD of Hu et al., 2024 (arXiv:2404.06395). A checkpoint of the plateau goes on with a larger `num_steps` as if
    the run had been that long from the start.

    Args:
        peak: the highest learning rate, reached at the last warm-up step.
        num_steps: steps of the run.
        warmup_steps: steps of the rise; 0 starts at the peak.
        decay_fraction: share of the run's steps that the fall takes.
        end_fraction: share of the peak at the end, kept by later steps.
        shape: of the fall: 'linear', 'cosine', or '1-sqrt' (Hägele et al., 2024, arXiv:2405.18392).

    Raises:
        ValueError: a number out of range, or no room for rise and fall.
    """
    _check_schedule(
        "warmup_stable_decay",
        peak,
        warmup_steps,
        end_fraction,
        num_steps,
        ("decay_fraction", decay_fraction, 0 <= decay_fraction <= 1),
        ("shape", shape, shape in ("linear", "cosine", "1-sqrt")),
    )
    start = num_steps - round(decay_fraction * num_steps)
    if start < warmup_steps:
        raise ValueError(
            f"warmup_stable_decay.warmup_steps = {warmup_steps}: the fall begins at step {start} already "
            f"(decay_fraction = {decay_fraction} of {num_steps} steps): lower one of the two"
        )

    def schedule(step: Any) -> jax.Array:
        rise, _ = _ramp(step, warmup_steps, num_steps)
        fall = _ramp(step, start, num_steps)[1] if start < num_steps else jnp.float32(0)
        if shape == "cosine":
            left = 0.5 * (1 + jnp.cos(jnp.pi * fall))
        else:
            left = 1 - (jnp.sqrt(fall) if shape == "1-sqrt" else fall)
        return peak * rise * (end_fraction + (1 - end_fraction) * left)

    return schedule


def inverse_sqrt(*, peak: float, warmup_steps: int) -> optax.Schedule:
    """A linear rise to `peak`, then down with one over the root of the step (Vaswani et al., 2017; T5).

    It does not depend on how long the run is.

    Args:
        peak: the highest learning rate, reached at the last warm-up step.
        warmup_steps: steps of the rise, and the unit in which the root counts steps.

    Raises:
        ValueError: a number out of range.
    """
    check_ranges("inverse_sqrt", ("peak", peak, peak >= 0), ("warmup_steps", warmup_steps, warmup_steps >= 1))

    def schedule(step: Any) -> jax.Array:
        taken = jnp.asarray(step).astype(jnp.float32) + 1
        return peak * jnp.minimum(taken / warmup_steps, jnp.sqrt(warmup_steps / taken))

    return schedule
