"""Batches on their way into a step: checked while they are numpy arrays, then laid on the mesh."""

import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

import modelzoo
import parallel
from parallel import pipeline
from train import losses

Batch = Mapping[str, Any]


class Feed:
    """Checks a batch and lays it on the mesh.

    Args:
        model: of a task with a loss.
        rules: of the mesh; None is one device.
        accumulate: slices that a batch has to divide into.
    """

    def __init__(self, model: modelzoo.Model, rules: parallel.Rules | None, accumulate: int = 1):
        self.model, self.rules, self.accumulate = model, rules, accumulate
        self.labels = {part.labels for part in losses.objective(model)}
        self.names = modelzoo.input_names(model)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """The model's keyword arguments in a batch."""
        return {name: value for name, value in batch.items() if name in self.names}

    def __call__(self, batch: Batch) -> dict[str, Any]:
        """The batch as global arrays, abstract ones staying so."""
        if unknown := sorted(set(batch) - self.names - self.labels):
            raise ValueError(
                f"batch key {unknown[0]!r} is neither an input nor a label of {type(self.model).__name__}: "
                f"the labels are {sorted(self.labels)}"
            )
        if missing := sorted(self.labels - set(batch)):
            name = type(self.model).__name__
            raise ValueError(f"the batch has no {missing[0]!r}, which {name} learns from")
        losses.check_labels(self.model, batch)
        if jax.process_count() > 1 and self.rules is not None:
            sharding = parallel.batch_sharding(self.rules)
            local = {name: value for name, value in batch.items() if isinstance(value, np.ndarray)}
            whole = {
                name: jax.make_array_from_process_local_data(sharding, value) for name, value in local.items()
            }
            batch = {**batch, **whole}
        self._check_rows({name: value.shape[0] for name, value in batch.items()})
        return {name: self._place(value) for name, value in batch.items()}

    def num_microbatches(self, rows: int, wanted: int | None, num_stages: int) -> int:
        """M for a batch of so many rows.

        Raises:
            ValueError: the wanted number does not divide the rows of every shard; names the nearest that does.
        """
        shards = 1 if self.rules is None else self.rules.num_shards("act_batch")
        fits = [m for m in range(1, rows // shards + 1) if rows % (m * shards) == 0]
        if wanted is None:
            few = [m for m in fits if m <= 4 * num_stages]
            wanted = max([m for m in few if m % num_stages == 0] or few)
        if wanted not in fits:
            raise ValueError(
                f"microbatches={wanted} do not divide a batch of {rows} rows over {shards} shards (mesh data x fsdp): "
                f"the nearest that does is {min(fits, key=lambda m: abs(m - wanted))}"
            )
        if wanted < num_stages:
            share = pipeline.make_schedule("1f1b", num_stages, wanted).bubble()
            warnings.warn(
                f"microbatches={wanted} are fewer than stage={num_stages}: the stages wait {share:.0%} of the time",
                stacklevel=2,
            )
        return wanted

    def _check_rows(self, rows: Mapping[str, int]) -> None:
        size = next(iter(rows.values()))
        if any(other != size for other in rows.values()):
            raise ValueError(f"the batch's arrays differ in their first dimension: {dict(rows)}")
        shards = 1 if self.rules is None else self.rules.num_shards("act_batch")
        if size % (shards * self.accumulate):
            raise ValueError(
                f"a batch of {size} rows does not divide into accumulate={self.accumulate} slices over "
                f"{shards} shards (mesh data x fsdp): make it a multiple of {shards * self.accumulate}"
            )

    def _place(self, value: Any) -> Any:
        if self.rules is None:
            return value
        sharding = parallel.batch_sharding(self.rules)
        if isinstance(value, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
        return jax.device_put(value, sharding)
