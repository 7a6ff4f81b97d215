"""Training: data, one compiled step, losses, optimizers, checkpoints, metrics.

    state = train.init_state(model, optimizer, mesh=mesh)
    step = train.make_train_step(model, optimizer, mesh=mesh)
    state, metrics = step(state, batch)

`python -m train` is the entry.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.losses import loss
    from train.metrics import RunLog
    from train.saving import Saver
    from train.state import TrainState, abstract_state, init_state
    from train.step import make_eval_step, make_train_step

__all__ = [
    "RunLog",
    "Saver",
    "TrainState",
    "abstract_state",
    "init_state",
    "loss",
    "make_eval_step",
    "make_train_step",
]

_HOMES = {
    "RunLog": "metrics",
    "Saver": "saving",
    "TrainState": "state",
    "abstract_state": "state",
    "init_state": "state",
    "loss": "losses",
    "make_eval_step": "step",
    "make_train_step": "step",
}


def __getattr__(name: str) -> Any:
    # Loaded when first used: `python -m train --help` should not wait for jax and its libraries.
    if name not in _HOMES:
        raise AttributeError(f"module 'train' has no attribute {name!r}")
    return getattr(importlib.import_module(f"train.{_HOMES[name]}"), name)
