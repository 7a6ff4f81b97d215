"""When a run saves, what, and how it comes back."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import modelzoo
from parallel import checkpoint
from train.state import TrainState

OPT_STATE, RUN = "opt_state", "run"


class Saver:
    """Saves a run's state into WORKDIR/checkpoints/STEP/, in the background, and restores it.

    A context manager: leaving it waits until the last save is on disk.

    Args:
        workdir: folder of the run.
        every: steps between two checkpoints.
        keep: how many of the newest stay; None keeps all.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, workdir: str | Path, *, every: int, keep: int | None = 3):
        self.folder = Path(workdir) / checkpoint.FOLDER
        self._every = every
        self._checkpoints = checkpoint.Checkpoints(self.folder, keep)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint, or None."""
        return self._checkpoints.latest_step()

    def maybe_save(
        self,
        step: int,
        state: TrainState,
        extra: Any,
        *,
        texts: Mapping[str, str],
        model: modelzoo.Model,
        force: bool = False,
    ) -> bool:
        """Saves if it is time to.

        Args:
            step: steps taken; the checkpoint's name.
            state: may be donated as soon as this returns.
            extra: anything JSON can hold, such as the position in the data.
            texts: file name -> contents, beside the arrays; the model's config.json is added.
            model: whose state it is.
            force: save though it is not time.

        Returns:
            Whether it saved.
        """
        if step % self._every and not force:
            return False
        if step == self.latest_step():
            return False
        config = {"architectures": [type(model).__name__], **model.config.to_hf()}
        trees = {
            checkpoint.PARAMS: state.params,
            OPT_STATE: state.opt_state,
            RUN: {"step": state.step, "rng": jax.random.key_data(state.rng)},
        }
        texts = {"config.json": json.dumps(config, indent=2) + "\n", **texts}
        self._checkpoints.save(step, model, trees, extra, texts)
        return True

    def restore(self, model: modelzoo.Model, state: TrainState, step: int | None = None) -> tuple[TrainState, Any]:
        """Reads a checkpoint back.

        Args:
            model: whose state it is.
            state: what to get, abstract (`train.abstract_state`) or not: shapes, dtypes and shardings.
            step: which checkpoint; None is the newest.

        Returns:
            (state, extra).

        Raises:
            OSError: there is no such checkpoint, or it cannot be read.
            ValueError: it is of another architecture, size or optimizer.
        """
        step = self.latest_step() if step is None else step
        if step is None:
            raise OSError(f"{self.folder}: no checkpoint to restore")
        folder = self.folder / str(step)
        if not folder.is_dir():
            raise OSError(f"{folder}: no such checkpoint")

        def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

        target = jax.tree.map(abstract, state)
        # A key is stored as its numbers.
        numbers = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct((), target.rng.dtype))
        numbers = jax.ShapeDtypeStruct(numbers.shape, numbers.dtype, sharding=target.rng.sharding)
        run = checkpoint.restore(folder, RUN, {"step": target.step, "rng": numbers}, model)
        restored = TrainState(
            params=checkpoint.restore(folder, checkpoint.PARAMS, target.params, model),
            opt_state=checkpoint.restore(folder, OPT_STATE, target.opt_state, model),
            step=jnp.asarray(run["step"]),
            rng=jax.random.wrap_key_data(run["rng"]),
        )
        return restored, checkpoint.read_extra(folder)

    def wait(self) -> None:
        """Returns when every save is on disk."""
        self._checkpoints.wait()

    def close(self) -> None:
        """Waits for the last save and lets go."""
        self._checkpoints.close()
