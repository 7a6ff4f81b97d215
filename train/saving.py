"""When a run is saved and what is kept of it; how arrays get to disk is `parallel.checkpoint`'s.

    WORKDIR/checkpoints/STEP/
        params/                  the parameters in the canonical layout: layers stacked, vocabularies unpadded
        state/                   optimizer state laid out likewise, the step and the PRNG key
        run/run.json             step, and what the caller gave as `extra`, such as the position in the data
        config.json  ...         the model's config and the caller's texts, readable without Orbax

A step's folder appears under its name only when it is complete.
"""

import contextlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import future

import modelzoo
from parallel import checkpoint
from train.state import TrainState, param_of

_RUN = "run.json"


class _TextsHandler(ocp.AsyncCheckpointHandler):
    """Writes what a run needs to go on into the item's own folder, and the texts beside the arrays."""

    async def async_save(self, directory: Any, args: "_TextsSave") -> list[Any]:
        async def write() -> None:
            if jax.process_index() == 0:
                (directory / _RUN).write_text(args.run)
                for name, text in args.texts.items():
                    (directory.parent / name).write_text(text)

        # The folders are made in the background too: this waits for them.
        return [future.CommitFutureAwaitingContractedSignals(write(), name="texts")]

    def save(self, directory: Any, args: "_TextsSave") -> None:
        raise NotImplementedError("texts are saved along with arrays, asynchronously")

    def restore(self, directory: Any, args: Any = None) -> str:
        return (directory / _RUN).read_text()


@ocp.args.register_with_handler(_TextsHandler, for_save=True, for_restore=True)
class _TextsSave(ocp.args.CheckpointArgs):
    def __init__(self, run: str, texts: Mapping[str, str]):
        self.run, self.texts = run, texts


class Saver:
    """Saves a run while it goes on, keeps its newest checkpoints, and finds where to go on from.

    Args:
        workdir: the run's folder; created.
        model: the model that is trained. Its config is saved as config.json.
        every: steps between two checkpoints.
        keep: how many of the newest stay; None keeps all.
        texts: files to lay beside the arrays of every checkpoint: name -> contents.

    Raises:
        OSError: the folder cannot be written.
        ValueError: `every` or `keep` is below 1.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        model: modelzoo.Model,
        every: int,
        keep: int | None = 3,
        texts: Mapping[str, str] | None = None,
    ):
        for name, value in (("every", every), ("keep", keep)):
            if value is not None and value < 1:
                raise ValueError(f"Saver: {name}={value}: it is at least 1")
        self._folder = checkpoint.as_path(workdir) / checkpoint.CHECKPOINTS
        self._model, self._every = model, every
        config = model.config.to_hf() | {"architectures": [type(model).__name__]}
        self._texts = {"config.json": json.dumps(config, indent=2) + "\n"} | dict(texts or {})
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            probe = self._folder / f".writable-{jax.process_index()}"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise OSError(
                f"cannot write checkpoints to {str(self._folder)!r}: {error.strerror or error}"
            ) from None
        self._set_unfinished_aside()
        checkpoint.silence()
        policies = ocp.checkpoint_managers
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=None if keep is None else policies.LatestN(keep),
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
                # A folder that cannot be made is an error at once, not a wait of minutes in the background.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            ),
        )

    def latest_step(self) -> int | None:
        """The newest step whose checkpoint is complete, or None."""
        steps = checkpoint.finished_steps(self._folder)
        return steps[-1] if steps else None

    def restore(self, state: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        """Reads a checkpoint, whatever mesh it was written from.

        Args:
            state: what to read it as: an existing state, or `abstract_state`.
            step: None is the newest.

        Returns:
            The state, laid out as the one given, and the `extra` that was saved with it.

        Raises:
            OSError: there is no such checkpoint.
            ValueError: it is of another model or optimizer; names what differs.
        """
        step = self.latest_step() if step is None else step
        if step is None or step not in checkpoint.finished_steps(self._folder):
            raise OSError(
                f"no checkpoint{'' if step is None else f' of step {step}'} in {str(self._folder)!r}"
            )
        folder, model = self._folder / str(step), type(self._model).__name__
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        true_shapes = self._param_shapes()
        params = checkpoint.restore_tree(folder / checkpoint.PARAMS, target.params, true_shapes, model)
        shapes = self._state_shapes(target)
        key = jax.eval_shape(jax.random.key_data, target.rng)
        rest = _by_name(target) | {
            "rng": jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=target.rng.sharding)
        }
        rest = checkpoint.restore_tree(folder / "state", rest, shapes, f"{model} with this optimizer")
        run = json.loads((folder / "run" / _RUN).read_text())
        rng = jax.random.wrap_key_data(rest.pop("rng"), impl=run["rng"])
        found = jax.tree.unflatten(
            jax.tree.structure(_rest(target)), [rest[name] for name in _by_name(target)]
        )
        return TrainState(params=params, rng=rng, **found), run["extra"]

    def maybe_save(
        self, step: int, state: TrainState, extra: Mapping[str, Any] | None = None, force: bool = False
    ) -> bool:
        """Saves the state if it is time to; writing goes on in the background.

        Args:
            step: steps taken so far, `state.step` as an integer.
            state: copied before this returns: the next step may overwrite it.
            extra: more to keep, of what JSON can hold.
            force: save now, whatever `every` says.

        Returns:
            Whether a save was started: not if it is not yet time, nor if this step is saved already.

        Raises:
            OSError: this save could not start, or an earlier one failed.
        """
        if not (force or step % self._every == 0) or step in self._manager.all_steps():
            return False
        rest = _by_name(state) | {"rng": jax.random.key_data(state.rng)}
        run = {"step": step, "rng": jax.random.key_impl(state.rng), "extra": dict(extra or {})}
        items = ocp.args.Composite(
            **{checkpoint.PARAMS: checkpoint.save_args(state.params, self._param_shapes())},
            state=checkpoint.save_args(rest, self._state_shapes(state)),
            run=_TextsSave(json.dumps(run), self._texts),
        )
        with self._failures(f"step {step}"):
            return self._manager.save(step, args=items, force=True)

    def close(self) -> None:
        """Waits until what was started is on disk.

        Raises:
            OSError: a save failed.
        """
        with self._failures("the last checkpoint"):
            self._manager.wait_until_finished()
        self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def _failures(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever the file system, TensorStore or Orbax's threads came up with
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise OSError(f"saving {what} to {str(self._folder)!r} failed: {reason}") from error

    def _set_unfinished_aside(self) -> None:
        """Renames what looks like a checkpoint but is none: Orbax would not save below its number."""
        if jax.process_index() == 0:
            finished = {str(step) for step in checkpoint.finished_steps(self._folder)}
            for folder in self._folder.iterdir():
                if re.fullmatch("[0-9]+", folder.name) and folder.name not in finished:
                    aside = folder.rename(self._folder / f"{folder.name}.unfinished")
                    warnings.warn(
                        f"checkpoint {folder} is unfinished: set aside as {aside.name}", stacklevel=3
                    )
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("unfinished checkpoints set aside")

    def _param_shapes(self) -> Any:
        return jax.tree.map(lambda leaf: leaf.shape, modelzoo.abstract_params(self._model))

    def _state_shapes(self, state: TrainState) -> dict[str, tuple[int, ...]]:
        """The shapes on disk of `_rest`: what has a parameter's padded shape gets its true one."""
        padded = {path: leaf.shape for path, leaf in jax.tree.leaves_with_path(state.params)}
        true = dict(jax.tree.leaves_with_path(self._param_shapes(), is_leaf=lambda x: isinstance(x, tuple)))
        shapes = {"rng": jax.eval_shape(jax.random.key_data, state.rng).shape}
        for path, leaf in jax.tree.leaves_with_path(_rest(state)):
            owner = param_of(path, leaf.shape, padded)
            shapes[_name(path)] = leaf.shape if owner is None else true[owner]
        return shapes


def _rest(state: TrainState) -> dict[str, Any]:
    """All but the parameters and the PRNG key."""
    return {"opt_state": state.opt_state, "step": state.step}


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _by_name(state: TrainState) -> dict[str, Any]:
    """`_rest` in the order of its leaves: optax's tuples leave no trace on disk."""
    return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(_rest(state))}
