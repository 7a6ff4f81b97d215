"""A run whose loss is no number stops with the state that it had before, and with the batch that did it.

The step itself keeps the state (`make_train_step(halt_on_nonfinite=True)`), so nothing has to be looked at until the
loop waits for the device anyway.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from parallel import checkpoint
from train.certificate import HashedBatches
from train.saving import Saver
from train.state import TrainState


class Halting:
    """Watches for a halted state.

    Args:
        workdir: the run's folder, for the batch.
        batches: what the run learns from.
        every: steps between two looks at most.
    """

    def __init__(self, workdir: str | os.PathLike[str], batches: HashedBatches, every: int):
        self._workdir, self._batches, self._every = checkpoint.as_path(workdir), batches, every
        self._since: dict[int, tuple[Mapping[str, Any], Mapping[str, Any]]] = {}
        self._last: Mapping[str, Any] | None = None

    def check(
        self,
        step: int,
        state: TrainState,
        batch: Mapping[str, Any],
        extra: Mapping[str, Any],
        saver: Saver,
        now: bool = False,
    ) -> None:
        """Notes a step, and every so often looks at the state.

        Args:
            step: steps taken.
            state: after them.
            batch: of the last one.
            extra: what `saver.maybe_save` would be given.
            saver: saves the state before the bad step.
            now: look, whatever the number of steps.

        Raises:
            ValueError: a step was not finite; says which, and where its batch and the state before it are.
        """
        self._since[step] = (batch, extra)
        if not (now or step % self._every == 0):
            return
        reached = int(state.step)  # waits for the step
        if reached >= 0:
            self._last, self._since = extra, {}
            return
        bad = -reached
        batch, _ = self._since[bad]
        name = f"nonfinite-{bad}" + (f"-{jax.process_index()}" if jax.process_count() > 1 else "") + ".npz"
        with (self._workdir / name).open("wb") as file:
            arrays: Any = {key: np.asarray(value) for key, value in batch.items()}
            np.savez(file, **arrays)
        kept = f"the state of step {bad - 1} is saved" if bad > 1 else "nothing was learned before it"
        before = self._since[bad - 1][1] if bad - 1 in self._since else self._last
        if before is not None:
            self._batches.take_back(bad - 1)
            counted = jax.numpy.full_like(state.step, bad - 1)
            whole = dataclasses.replace(state, step=counted)
            saver.maybe_save(bad - 1, whole, before, force=True)
            saver.close()
        raise ValueError(
            f"step {bad}: its loss or gradient is not a finite number: {kept}, the batch of step {bad} is in "
            f"{self._workdir / name}; lower the learning rate, or let it go on by "
            '--gin_param="train.stop_on_nonfinite=False"'
        )
