"""`python -m benchmarks.precision`: one run in every precision, and how far its losses are from those of float32.

All start from the same weights and learn from the same batches. On a CPU, where nothing but float32 is quick, this says
what a precision costs in loss, not what it gains in time.
"""

import dataclasses
import os
from typing import Any, Literal

import numpy as np
import tyro

from benchmarks.texts import Plan, held_out_loss

Precision = Literal["float32", "bfloat16", "float16", "int8", "fp8"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags(Plan):
    """The command line."""

    precisions: tuple[Precision, ...] = ("float32", "bfloat16", "float16", "int8", "fp8")
    """Which to train in; the first is what the others are compared with. int8 and fp8 need the package qwix."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What int8 and fp8 compute all else in."""


def losses_in(precision: Precision, flags: Flags, batches: Any, held_out: Any) -> tuple[float, float, int]:
    """Trains in one precision.

    Args:
        precision: which.
        flags: the plan.
        batches, held_out: to train and to measure on.

    Returns:
        The mean training loss of the last tenth of the steps, the held-out loss, and how many steps were skipped. What
        is held out is measured in the run's own dtype, its products whole.
    """
    import jax
    import jax.numpy as jnp

    import modelzoo
    import train
    from train import optim
    from train.guard import StateOptions

    bits = precision in ("int8", "fp8")
    dtype = flags.dtype if bits else precision
    config = modelzoo.GPTJConfig(**flags.shape.config())
    model = modelzoo.GPTJForCausalLM(config, dtype=jnp.dtype(dtype))
    optimizer = optim.adamw(learning_rate=flags.schedule())
    options = StateOptions(loss_scale=65536.0 if dtype == "float16" else None)
    state = train.init_state(model, optimizer, rng=jax.random.key(flags.seed), options=options)
    step = train.make_train_step(model, optimizer, options=options, quantize=precision if bits else None)
    losses, skipped = [], 0
    for batch in batches:
        state, metrics = step(state, batch)
        losses.append(metrics["loss"])
        skipped = metrics.get("skipped_steps", 0)
    measure = train.make_eval_step(model)

    def evaluate(batch: Any) -> tuple[float, int]:
        found = measure(state.params, batch)
        return float(found["loss_sum"]), int(found["tokens"])

    last = [float(loss) for loss in losses[-max(1, flags.steps // 10) :]]
    return float(np.mean(last)), held_out_loss(evaluate, held_out), int(skipped)


def run(flags: Flags) -> dict[str, float]:
    """Trains in each, prints a line each.

    Args:
        flags: what, and for how long.

    Returns:
        The held-out losses.
    """
    tokens = flags.tokens()
    batches, held_out = flags.batches(tokens), flags.held_out_batches(tokens)
    print(f"{flags.steps} steps of {flags.batch} x {flags.length} tokens", flush=True)
    found: dict[str, float] = {}
    for precision in flags.precisions:
        last, loss, skipped = losses_in(precision, flags, batches, held_out)
        found[precision] = loss
        first = found[flags.precisions[0]]
        more = f", {skipped} steps skipped" if precision == "float16" else ""
        print(
            f"{precision:8}  training loss {last:.4f}  held-out loss {loss:.4f} ({loss - first:+.4f}, "
            f"{(loss / first - 1):+.2%}){more}",
            flush=True,
        )
    return found


def main(args: list[str] | None = None) -> None:
    """Reads the flags."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    run(tyro.cli(Flags, prog="python -m benchmarks.precision", description=__doc__, args=args))


if __name__ == "__main__":
    main()
