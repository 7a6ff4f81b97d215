"""Steps that are no numbers: what becomes of them, and the scale that keeps float16 gradients above its least number.

A step's loss and gradient norm are finite, or the step is bad. A bad step changes neither parameters nor optimizer
state. With float16 its scale is halved, as long as it can be: an overflow is what a scale is found by. Any other bad
step is skipped, up to a number of them in a row; past that, the state is marked halted (`train.halting`) or, where
the run does not stop, goes on being skipped.

The scale's rule is that of torch.amp.GradScaler: it doubles after so many good steps, and halves at a bad one.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

LEAST_SCALE = 1.0
"""Below it a bad step is no overflow of scaled gradients."""


@dataclasses.dataclass(frozen=True)
class StateOptions:
    """What a run's state holds beside parameters, the optimizer's state and the step.

    Attributes:
        ema: decay of a moving average of the parameters; None keeps none.
        skip_nonfinite: bad steps in a row that are skipped; 0 skips none.
        loss_scale: what the loss is multiplied by at first, where the model computes in float16; None does not scale.
        loss_scale_growth: good steps in a row after which the scale doubles.
    """

    ema: float | None = None
    skip_nonfinite: int = 0
    loss_scale: float | None = None
    loss_scale_growth: int = 2000

    @property
    def guarded(self) -> bool:
        """Whether the state counts bad steps."""
        return bool(self.skip_nonfinite) or self.loss_scale is not None


NO_OPTIONS = StateOptions()


@struct.dataclass
class Guard:
    """What a state remembers of bad steps; all zeros at the start.

    Attributes:
        skipped: int32 [], bad steps so far, overflows among them.
        in_row: int32 [], bad steps since the last good one, without overflows.
        scale: float32 [], of the loss; 0 stands for the first one.
        good: int32 [], good steps since the scale last changed.
    """

    skipped: Any
    in_row: Any
    scale: Any
    good: Any


def new_guard() -> Guard:
    """That of a run's start."""
    count = jnp.zeros([], jnp.int32)
    return Guard(skipped=count, in_row=count, scale=jnp.zeros([], jnp.float32), good=count)


def scale_of(guard: Guard | None, options: StateOptions) -> jax.Array | None:
    """What the loss is multiplied by, float32 []; None where it is not."""
    if guard is None or options.loss_scale is None:
        return None
    return jnp.where(guard.scale > 0, guard.scale, options.loss_scale)


def judged(before: Any, after: Any, finite: jax.Array, options: StateOptions, halt: bool) -> Any:
    """The state that a step leaves.

    Args:
        before: the `TrainState` that the step was given; its step is negative once it halted.
        after: the one that it came to.
        finite: bool [], whether it is good.
        options: the state's.
        halt: whether bad steps that are not skipped halt the state: it stays as it is, `step` minus that of the bad
            step, from 1.
    """
    if not halt and not options.guarded:
        return after
    running = before.step >= 0
    guard, mends = before.guard, jnp.bool_(False)
    if guard is not None:
        scale = scale_of(guard, options)
        if scale is not None:
            mends = ~finite & (scale > LEAST_SCALE)
        in_row = jnp.where(finite, 0, guard.in_row + jnp.where(mends, 0, 1))
        gives_up = ~finite & ~mends & (in_row > options.skip_nonfinite)
        guard = guard.replace(skipped=guard.skipped + jnp.where(finite, 0, 1), in_row=in_row)
        if scale is not None:
            good = jnp.where(finite, guard.good + 1, 0)
            grows = good >= options.loss_scale_growth
            scale = jnp.where(grows, 2 * scale, jnp.where(finite, scale, jnp.maximum(scale / 2, LEAST_SCALE)))
            guard = guard.replace(scale=scale, good=jnp.where(grows, 0, good))
    else:
        gives_up = ~finite
    halts = gives_up & halt

    def chosen(keep: jax.Array, new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(keep, a, b), new, old)

    learned = chosen(
        finite & running,
        (after.params, after.opt_state, after.ema),
        (before.params, before.opt_state, before.ema),
    )
    guard = chosen(running & ~halts, guard, before.guard)
    step = jnp.where(running, jnp.where(halts, -after.step, after.step), before.step)
    params, opt_state, ema = learned
    return after.replace(params=params, opt_state=opt_state, ema=ema, guard=guard, step=step)


def report(before: Any, after: Any, options: StateOptions) -> dict[str, jax.Array]:
    """Metrics: "skipped_steps" so far, and the "loss_scale" of the step.

    Args:
        before, after: the states around the step, judged.
        options: theirs.
    """
    if before.guard is None:
        return {}
    scale = scale_of(before.guard, options)
    found = {"skipped_steps": after.guard.skipped}
    return found if scale is None else found | {"loss_scale": scale}
