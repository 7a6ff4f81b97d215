"""One training step: the batch's gradient, the optimizer, and what to report, as a single compiled program.

The loss is the mean over all valid labels of the global batch. Its counts follow from the labels alone, so
every slice
of an accumulated batch divides by the counts of the whole: the slices' losses and gradients simply add up.
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh

import modelzoo
import parallel
from parallel import pipeline
from parallel.host import keep_freed_memory
from parallel.schedule import SCHEDULES
from train import losses
from train.optim import global_norm, only_trainable, without_frozen
from train.state import TrainState, abstract_state, resolve_rules, shardings_of

Batch = Mapping[str, Any]
Metrics = dict[str, jax.Array]


class TrainStep:
    """(state, batch) -> (state, metrics), compiled at the first call; made by `make_train_step`.

    The state is donated: the arrays passed in are gone afterwards. Calls return before the step has run.
    """

    def __init__(self, feed: "_Feed", jitted: Any):
        self._feed, self._jitted = feed, jitted

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Takes one step.

        Args:
            state: from `init_state` or an earlier step.
            batch: this process's part of the global batch.

        Raises:
            ValueError: the batch lacks an input or label, holds a label of no class, or does not divide.
        """
        batch = self._feed(batch)
        with parallel.use(self._feed.rules):
            return self._jitted(state, batch)

    def lower(self, state: Any, batch: Any) -> Any:
        """The step lowered for arguments that may be abstract; `.compile()` gives the program.

        Args:
            state: such as `abstract_state` returns.
            batch: a dict of arrays or jax.ShapeDtypeStruct of the global batch.
        """
        batch = self._feed(batch)
        with parallel.use(self._feed.rules):
            return self._jitted.lower(state, batch)


def make_train_step(
    model: modelzoo.Model,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh | None = None,
    rules: parallel.Rules | None = None,
    microbatches: int | None = None,
    schedule: str = "1f1b",
    virtual_stages: int | None = None,
    accumulate: int = 1,
    learning_rate: float | optax.Schedule | None = None,
    module_norms: bool = False,
    halt_on_nonfinite: bool = False,
) -> TrainStep:
    """Builds the training step. The dtype it computes in and what it recomputes are the model's.

    Args:
        model: a model of a task with a loss.
        optimizer: the optax transformation that the state was made with.
        mesh, rules: as given to `init_state`.
        microbatches: M, pieces that a pipeline cuts the batch (or each slice of it) into; None takes up to four a
            stage, as many as the rows allow. Without stages it has no effect.
        schedule: of the pipeline, one of `parallel.schedule.SCHEDULES`.
        virtual_stages: pieces of the model that a stage holds; None is 2 for the interleaved schedule, else 1.
        accumulate: slices of the batch that are computed one after another, their gradients summed in
            float32.
        learning_rate: what the optimizer was given, to report it.
        module_norms: report each module's gradient norm too, as "grad_norm/<module>".
        halt_on_nonfinite: once a loss or gradient is no number, leave parameters and optimizer state as they were
            before that step, at it and at all steps to come; `state.step` is then minus the step's number, from 1.

    Returns:
        A callable (state, batch) -> (state, metrics), with `.lower` for ahead-of-time compiles. A batch is a
        dict of numpy or jax arrays [B, ...]: the model's keyword arguments and transformers' label names.
        Metrics are arrays [] on the device: "loss", "tokens" (valid labels), "grad_norm" (before clipping),
        "learning_rate" if given, and "<part>_loss" where the loss has several parts.

    Raises:
        ValueError: an unknown schedule, a count below 1, or rules that do not fit the model. Called: as `TrainStep`,
            and where stages, layers and microbatches do not go together.
    """
    rules = resolve_rules(mesh, rules)
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r} is unknown: choose from {', '.join(SCHEDULES)}")
    if virtual_stages is None:
        virtual_stages = 2 if schedule == "interleaved" else 1
    for name, value in (
        ("accumulate", accumulate),
        ("microbatches", microbatches),
        ("virtual_stages", virtual_stages),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: it is at least 1")
    num_stages = 1 if rules is None else rules.num_shards("layers")
    feed = _Feed(model, rules, accumulate)
    target = None if rules is None else abstract_state(model, optimizer, rules=rules)
    optimizer = only_trainable(model, optimizer)
    deterministic = not has_dropout(model.config)

    def slice_loss(params: Any, batch: Batch, rng: jax.Array, counts: Mapping[str, jax.Array]) -> Any:
        with jax.named_scope("forward"):
            rngs = None if deterministic else {"dropout": rng}
            inputs = feed.inputs(batch)
            outputs = model.apply({"params": params}, **inputs, deterministic=deterministic, rngs=rngs)
        with jax.named_scope("loss"):
            found = losses.terms(model, outputs, batch)
            return losses.total(found, counts), {term.name: term.sum for term in found}

    def whole(params: Any, batch: Batch, rng: jax.Array, counts: Mapping[str, jax.Array]) -> Any:
        return jax.value_and_grad(slice_loss, has_aux=True)(params, batch, rng, counts)

    def pipelined(params: Any, batch: Batch, rng: jax.Array, counts: Mapping[str, jax.Array]) -> Any:
        assert target is not None
        rows = next(iter(batch.values())).shape[0]
        count = feed.num_microbatches(rows, microbatches, num_stages)
        return pipeline.value_and_grad(
            lambda params, piece, rng: slice_loss(params, piece, rng, counts),
            params,
            _slices(batch, count),
            rng,
            shardings=shardings_of(target.params),
            schedule=schedule,
            virtual_stages=virtual_stages,
        )

    def gradients(params: Any, batch: Batch, rng: jax.Array, counts: Mapping[str, jax.Array]) -> Any:
        (_, sums), grads = (pipelined if num_stages > 1 else whole)(params, batch, rng, counts)
        grads = without_frozen(model, grads)
        if target is not None:  # summed over the batch straight into each device's shard
            grads = lax.with_sharding_constraint(grads, shardings_of(target.params))
        return sums, grads

    def accumulated(params: Any, batch: Batch, rng: jax.Array, counts: Mapping[str, jax.Array]) -> Any:
        if accumulate == 1:
            # A pipeline folds the key by microbatch, as accumulation folds it by slice.
            return gradients(params, batch, rng if num_stages > 1 else jax.random.fold_in(rng, 0), counts)

        def body(total: Any, piece: Any) -> Any:
            index, batch = piece
            sums, grads = gradients(params, batch, jax.random.fold_in(rng, index), counts)
            return jax.tree.map(lambda t, x: t + x.astype(jnp.float32), total, (sums, grads)), None

        pieces = _slices(batch, accumulate)
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.float32), params)
        if target is not None:
            zeros = lax.with_sharding_constraint(zeros, shardings_of(target.params))
        start = ({name: jnp.float32(0) for name in counts}, zeros)
        indices = jnp.arange(accumulate, dtype=jnp.uint32)
        (sums, grads), _ = lax.scan(body, start, (indices, pieces))
        return sums, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        counts = losses.label_counts(model, batch)
        rng = jax.random.fold_in(state.rng, state.step)
        sums, grads = accumulated(state.params, batch, rng, counts)
        with jax.named_scope("optimizer"), jax.numpy_dtype_promotion("standard"):  # optax is not strict
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        with jax.named_scope("metrics"):
            metrics = _report(model, sums, counts) | {"grad_norm": global_norm(grads)}
            if learning_rate is not None:
                rate = learning_rate(state.step) if callable(learning_rate) else learning_rate
                metrics["learning_rate"] = jnp.asarray(rate, jnp.float32)
            if module_norms:
                metrics |= {
                    f"grad_norm/{name}": global_norm(part) for name, part in modules_of(grads).items()
                }
        after = TrainState(params=params, opt_state=opt_state, step=state.step + 1, rng=state.rng)
        if halt_on_nonfinite:
            after = _unless_halted(
                state, after, jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
            )
        return after, metrics

    if jax.default_backend() == "cpu":
        keep_freed_memory()
    out_shardings = None if target is None else (shardings_of(target), target.step.sharding)
    return TrainStep(feed, jax.jit(step, donate_argnums=0, out_shardings=out_shardings))


def make_eval_step(
    model: modelzoo.Model,
    *,
    mesh: Mesh | None = None,
    rules: parallel.Rules | None = None,
    fields: Sequence[str] = (),
) -> Any:
    """Builds the evaluation of one batch, without dropout.

    Args:
        model: a model of a task with a loss.
        mesh, rules: where the parameters lie.
        fields: of the model's output, to return too.

    Returns:
        A callable (params, batch) -> {"loss_sum": float32 [], "tokens": int32 []} and the fields, on the device. The
        mean over several batches is the sum of loss_sum over the sum of tokens. Where the loss has several
        parts, tokens counts the first one's labels and loss_sum is the batch's loss times that.

    Raises:
        ValueError: rules of another mesh; called, as `make_train_step`'s.
    """
    rules = resolve_rules(mesh, rules)
    feed = _Feed(model, rules, 1)

    @jax.jit
    def evaluate(params: Any, batch: Batch) -> Metrics:
        outputs = model.apply({"params": params}, **feed.inputs(batch), deterministic=True)
        found = losses.terms(model, outputs, batch)
        count = found[0].count
        loss_sum = found[0].sum if len(found) == 1 else losses.total(found) * count.astype(jnp.float32)
        return {"loss_sum": loss_sum, "tokens": count} | {name: getattr(outputs, name) for name in fields}

    def eval_step(params: Any, batch: Batch) -> Metrics:
        batch = feed(batch)
        with parallel.use(rules):
            return evaluate(params, batch)

    return eval_step


def modules_of(tree: Any) -> dict[str, Any]:
    """The parts of a parameter tree that belong together: {"embed": ..., "layers/attention": ..., "lm_head": ...}.

    Args:
        tree: nested dicts. A trunk's parts stand on their own, and so do those of a stack of layers.
    """
    found: dict[str, Any] = {}

    def walk(node: Any, names: tuple[str, ...]) -> None:
        if isinstance(node, Mapping) and (not names or names[-1] in _OPENED):
            for name, child in node.items():
                walk(child, (*names, name))
        else:
            found["/".join(name for name in names if name != "trunk")] = node

    walk(tree, ())
    return found


_OPENED = ("trunk", "layers", "encoder", "decoder")


def _unless_halted(before: TrainState, after: TrainState, finite: jax.Array) -> TrainState:
    """The state after a step that was finite, as none before it was not; else the one before, marked."""
    good = finite & (before.step >= 0)
    kept = jax.tree.map(
        lambda new, old: jnp.where(good, new, old),
        (after.params, after.opt_state),
        (before.params, before.opt_state),
    )
    halted = jnp.where(before.step < 0, before.step, -after.step)
    step = jnp.where(good, after.step, halted)
    return TrainState(params=kept[0], opt_state=kept[1], step=step, rng=after.rng)


def _slices(batch: Batch, count: int) -> dict[str, Any]:
    """[B, ...] to [count, B / count, ...]: row b is in slice b % count, so that each lies over devices as all do."""
    return {
        name: jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)
        for name, x in batch.items()
    }


def has_dropout(config: Any) -> bool:
    """Whether any dropout probability of a config is above zero."""
    values = (getattr(config, field.name) for field in dataclasses.fields(config) if "drop" in field.name)
    return any(isinstance(value, float) and value > 0 for value in values)


def _report(model: Any, sums: Mapping[str, jax.Array], counts: Mapping[str, jax.Array]) -> Metrics:
    found = [losses.Term(p.name, sums[p.name], counts[p.name], p.weight) for p in losses.objective(model)]
    metrics = {"loss": losses.total(found), "tokens": found[0].count}
    if len(found) > 1:
        metrics |= {f"{term.name}_loss": losses.total([term._replace(weight=1.0)]) for term in found}
    return metrics


class _Feed:
    """Checks a batch and lays it on the mesh."""

    def __init__(self, model: modelzoo.Model, rules: parallel.Rules | None, accumulate: int):
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
