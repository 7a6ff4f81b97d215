"""When a run is saved and what is kept of it; how arrays get to disk is `parallel.checkpoint`'s.

    WORKDIR/checkpoints/STEP/
        params/                  the parameters in the canonical layout: layers stacked, vocabularies unpadded
        ema/                     likewise the moving average of those that train, if the run keeps one
        state/                   optimizer state laid out likewise, the step and the PRNG key
        run/run.json             step, what the caller gave as `extra`, such as the position in the data, and the
                                 certificate: hashes of the batches and of the state (`train.certificate`)
        config.json  ...         the model's config and the caller's texts, readable without Orbax
        checksums.json           size and CRC-32 of every file (`train.integrity`)

A step's folder appears under its name only when it is complete.
"""

import contextlib
import json
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import future

import modelzoo
from parallel import checkpoint
from train import canonical, certificate, integrity, restoring
from train.certificate import HashedBatches
from train.state import TrainState
from train.tasks.scores import lower_is_better

_RUN = "run.json"


class _TextsHandler(ocp.AsyncCheckpointHandler):
    """Writes what a run needs to go on into the item's own folder, and the texts beside the arrays."""

    async def async_save(self, directory: Any, args: "_TextsSave") -> list[Any]:
        async def write() -> None:
            if jax.process_index() == 0:
                (directory / _RUN).write_text(args.run())
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
    def __init__(self, run: Callable[[], str], texts: Mapping[str, str]):
        self.run, self.texts = run, texts


class Saver:
    """Saves a run while it goes on, keeps its newest checkpoints, and finds where to go on from.

    A save that fails while the run goes on, as on a full disk, is a warning, and the next one is tried in its time;
    of those before it none is dropped. That the last one failed is an error when the Saver closes.

    Args:
        workdir: the run's folder; created.
        model: the model that is trained. Its config is saved as config.json.
        every: steps between two checkpoints.
        keep: how many of the newest stay; None keeps all.
        keep_best: name of a value that `maybe_save` is given; the checkpoint with the best one stays too. The lowest
            is best where `scores.lower_is_better`, else the highest.
        texts: files to lay beside the arrays of every checkpoint: name -> contents.
        batches: what the run learns from, for the certificate.
        mesh_shape: sizes of the mesh's axes, likewise.
        read_only: restore only, and leave the folder as it is.

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
        keep_best: str | None = None,
        texts: Mapping[str, str] | None = None,
        batches: HashedBatches | None = None,
        mesh_shape: Mapping[str, int] | None = None,
        read_only: bool = False,
    ):
        for name, value in (("every", every), ("keep", keep)):
            if value is not None and value < 1:
                raise ValueError(f"Saver: {name}={value}: it is at least 1")
        self._folder = checkpoint.as_path(workdir) / checkpoint.CHECKPOINTS
        self._model, self._every = model, every
        self._keep_best, self._best = keep_best, None
        self._batches, self._mesh_shape = batches, mesh_shape or {}
        self._saving: int | None = None  # the step that was last begun
        self._failed: OSError | None = None  # what became of it, once known
        self._texts = checkpoint.texts_of(model) | dict(texts or {})
        self._manager: Any = None
        if read_only:
            return
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
        kept: Any = None if keep is None else policies.LatestN(keep)
        if kept is not None and keep_best is not None:
            kept = policies.AnyPreservationPolicy([kept, _Best(self)])
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=kept,
                enable_async_checkpointing=True,
                # A folder that cannot be made is an error at once, not a wait of minutes in the background.
                async_options=ocp.AsyncOptions(
                    create_directories_asynchronously=False, post_finalization_callback=self._write_checksums
                ),
            ),
        )

    @property
    def best(self) -> tuple[int, float] | None:
        """The step of the best checkpoint and its value; None if nothing was measured yet."""
        return self._best

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
            OSError: there is no such checkpoint, or its state has not the digests that it was saved with.
            ValueError: it is of another model or optimizer; names what differs.
        """
        step = self.latest_step() if step is None else step
        if step is None or step not in checkpoint.finished_steps(self._folder):
            raise OSError(
                f"no checkpoint{'' if step is None else f' of step {step}'} in {str(self._folder)!r}"
            )
        folder = self._folder / str(step)
        restored, run = restoring.read_state(folder, self._model, state)
        saved = (run.get("certificate") or {}).get("state")
        if wrong := certificate.differing(*restoring.comparable(self.digests(restored), saved)):
            raise OSError(
                f"{folder}: {wrong[0]} is not as it was saved ({len(wrong)} tensors in all are not): rename the "
                "folder, and the same command goes on from the checkpoint before"
            )
        best = run.get("best")
        if best and best["of"] == self._keep_best and best["step"] in checkpoint.finished_steps(self._folder):
            self._best = (best["step"], best["value"])
        return restored, run["extra"]

    def certificate(self, step: int) -> dict[str, Any] | None:
        """The certificate of a checkpoint; None if it was written without."""
        return json.loads((self._folder / str(step) / restoring.RUN).read_text()).get("certificate")

    def digests(self, state: TrainState) -> dict[str, str]:
        """{name: digest} of everything in a state, the same on any mesh."""
        return certificate.as_texts(certificate.digest_of(canonical.leaves_of(self._model, state)))

    def is_due(self, step: int) -> bool:
        """Whether this step is one that is saved whatever happens."""
        return step % self._every == 0

    def maybe_save(
        self,
        step: int,
        state: TrainState,
        extra: Mapping[str, Any] | None = None,
        force: bool = False,
        values: Mapping[str, float] | None = None,
    ) -> bool:
        """Saves the state if it is time to; writing goes on in the background.

        Args:
            step: steps taken so far, `state.step` as an integer.
            state: copied before this returns: the next step may overwrite it.
            extra: more to keep, of what JSON can hold.
            force: save now, whatever `every` says.
            values: what was measured at this step. The best `keep_best` so far is saved now.

        Returns:
            Whether a save was started: not if it is not yet time, nor if this step is saved already, nor if it could
            not start, which is a warning.

        Raises:
            ValueError: `keep_best` names none of the values.
        """
        force = self._is_best(step, values) or force
        if not (force or self.is_due(step)):
            return False
        self.settle()
        if step in self._manager.all_steps():
            return False
        rest = canonical.rest_by_name(state) | {"rng": jax.random.key_data(state.rng)}
        run = {"step": step, "rng": jax.random.key_impl(state.rng), "extra": dict(extra or {})}
        if self._best:
            run["best"] = {"of": self._keep_best, "step": self._best[0], "value": self._best[1]}
        certified = {"batches": self._batches.certify()} if self._batches else {}
        certified["made"] = certificate.circumstances(self._mesh_shape)
        digests = certificate.digest_of(canonical.leaves_of(self._model, state))

        def text() -> str:  # in the background: it waits for the digests
            texts = certificate.as_texts(digests)
            return json.dumps(
                run | {"certificate": certified | {"state": texts, "whole": certificate.whole(texts)}}
            )

        arrays = {checkpoint.PARAMS: checkpoint.save_args(state.params, canonical.param_shapes(self._model))}
        if state.ema is not None:
            average = canonical.average_by_name(state), canonical.average_shapes(self._model, state)
            arrays[checkpoint.AVERAGE] = checkpoint.save_args(*average)
        items = ocp.args.Composite(
            **arrays,
            state=checkpoint.save_args(rest, canonical.rest_shapes(self._model, state)),
            run=_TextsSave(text, self._texts),
        )
        self._saving = step
        try:
            with self._failures(f"step {step}"):
                return self._manager.save(step, args=items, force=True)
        except OSError as error:
            self._forget(step, error)
            return False

    def close(self) -> None:
        """Waits until what was started is on disk.

        Raises:
            OSError: the last save failed.
        """
        if self._manager is None:
            return
        failed = self._failed
        try:
            with self._failures(f"step {self._saving}"):
                self._manager.wait_until_finished()
        except OSError as error:
            self._clean(self._saving)
            failed = error
        self._failed = None
        self._manager.close()
        if failed:
            newest = self.latest_step()
            raise OSError(
                f"{failed}; " + (f"step {newest} is saved" if newest else "nothing is saved")
            ) from failed

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

    @property
    def is_writing(self) -> bool:
        """Whether a save goes on in the background."""
        return self._manager.is_saving_in_progress()

    def settle(self) -> None:
        """Waits for the save before; that it failed is a warning."""
        try:
            with self._failures(f"step {self._saving}"):
                self._manager.wait_until_finished()
        except OSError as error:
            self._forget(self._saving, error)
        else:
            self._failed = None

    def _forget(self, step: int | None, error: OSError) -> None:
        """Goes on after a save that failed, if there is a folder to go on with."""
        if not self._folder.is_dir():
            raise error
        self._clean(step)
        self._manager.reload()  # it took the ones before for dropped
        self._failed = error
        newest = self.latest_step()
        have = f"step {newest} is saved" if newest else "nothing is saved yet"
        warnings.warn(f"{error}; the run goes on, {have}", stacklevel=4)

    def _clean(self, step: int | None) -> None:
        """Removes what a failed save left, which may be what fills the disk."""
        if self._best and self._best[0] == step:
            self._best = None
        if jax.process_index() == 0:
            for left in self._unfinished(step):
                for _ in range(20):  # threads that have not failed yet may still write into it
                    with contextlib.suppress(OSError):
                        left.rmtree()
                        break
                    time.sleep(0.1)

    def _unfinished(self, step: int | None) -> list[Any]:
        """The folders in which a step is being written."""
        there = self._folder.iterdir() if self._folder.is_dir() else ()
        found = [path for path in there if path.name.partition(".")[0] == str(step)]
        return [path for path in found if "orbax-checkpoint-tmp" in path.name]

    def _write_checksums(self) -> None:
        """Called in process 0 when all of a checkpoint is written, before it gets its name."""
        for folder in self._unfinished(self._saving) or [self._folder / str(self._saving)]:
            integrity.write_checksums(folder)

    def _set_unfinished_aside(self) -> None:
        """Renames what looks like a checkpoint but is none: Orbax would not save below its number.

        What was cut off while it was written is removed.
        """
        if jax.process_index() == 0:
            finished = {str(step) for step in checkpoint.finished_steps(self._folder)}
            for folder in self._folder.iterdir():
                if "orbax-checkpoint-tmp" in folder.name:
                    folder.rmtree()
                if re.fullmatch("[0-9]+", folder.name) and folder.name not in finished:
                    aside = folder.rename(self._folder / f"{folder.name}.unfinished")
                    warnings.warn(
                        f"checkpoint {folder} is unfinished: set aside as {aside.name}", stacklevel=3
                    )
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("unfinished checkpoints set aside")

    def _is_best(self, step: int, values: Mapping[str, float] | None) -> bool:
        name = self._keep_best
        if name is None or not values:
            return False
        value = values.get(name, values.get(f"eval_{name}"))
        if value is None:
            known = ", ".join(sorted(key.removeprefix("eval_") for key in values))
            raise ValueError(f"train.keep_best = {name!r}: what is measured is {known}")
        sign = -1 if lower_is_better(name) else 1
        if not math.isfinite(value) or (self._best and sign * value <= sign * self._best[1]):
            return False
        self._best = (step, float(value))
        return True


class _Best(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps a Saver's best checkpoint."""

    def __init__(self, saver: Saver):
        self._saver = saver

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        best = self._saver.best
        return [best is not None and info.step == best[0] for info in checkpoints]
