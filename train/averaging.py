"""A moving average of the parameters, which evaluation and inference take for the model (Polyak and Juditsky, 1992).

It holds what trains alone: all else is where it was. The first steps count for more, so that a short run is not
averaged with its random start: the decay of step t is the lower one of what is set and (1 + t) / (10 + t).
"""

from typing import Any

import jax
import jax.numpy as jnp

from train.trained import Trained


def new_average(trained: Trained, params: Any) -> Any:
    """The average before the first step: the parameters that train, float32 and copied; None for what does not."""
    return jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), trained.of(params))


def after_step(average: Any, params: Any, step: jax.Array, decay: float) -> Any:
    """The average with a step's parameters.

    Args:
        average: before it.
        params: after it; those that do not train are not looked at.
        step: int32 [], steps taken before it.
        decay: the most that it keeps of the average.
    """
    taken = step.astype(jnp.float32)
    keep = jnp.minimum(decay, (1 + taken) / (10 + taken))

    def one(mean: Any, p: jax.Array) -> Any:
        return None if mean is None else mean + (1 - keep) * (p.astype(jnp.float32) - mean)

    return jax.tree.map(one, average, params, is_leaf=lambda x: x is None)


def averaged(params: Any, average: Any) -> Any:
    """The parameters with the average of those that train, in their own dtypes; themselves if there is none."""
    if average is None:
        return params

    def one(mean: Any, p: jax.Array) -> jax.Array:
        return p if mean is None else mean.astype(p.dtype)

    return jax.tree.map(one, average, params, is_leaf=lambda x: x is None)
