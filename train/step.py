"""One training step: the batch's gradient, the optimizer, and what to report, as a single compiled program.

The loss is the mean over all valid labels of the global batch. Its counts follow from the labels alone, so
every slice
of an accumulated batch divides by the counts of the whole: the slices' losses and gradients simply add up.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh

import modelzoo
import parallel
from modelzoo.layers.linear import contract, multiply_by
from parallel import pipeline
from parallel.host import keep_freed_memory
from parallel.schedule import SCHEDULES
from train import guard, losses
from train.averaging import after_step
from train.feed import Batch, Feed
from train.guard import NO_OPTIONS, StateOptions
from train.low_precision import multiplication
from train.optim import fitted, global_norm
from train.state import TrainState, abstract_state, resolve_rules, shardings_of
from train.trained import Trained

Metrics = dict[str, jax.Array]


class Known(NamedTuple):
    """What a slice's share of the loss depends on beside the slice.

    Attributes:
        counts: valid labels of the whole batch, by part.
        scale: what the loss is multiplied by; None is 1.
    """

    counts: Mapping[str, jax.Array]
    scale: jax.Array | None


class TrainStep:
    """(state, batch) -> (state, metrics), compiled at the first call; made by `make_train_step`.

    The state is donated: the arrays passed in are gone afterwards. Calls return before the step has run.
    """

    def __init__(self, feed: Feed, jitted: Any):
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
    options: StateOptions = NO_OPTIONS,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    quantize: str | None = None,
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
        options: as given to `init_state`: averaging, which steps are skipped, the scale of float16 gradients.
        label_smoothing, z_loss: what is added to the cross-entropy (`losses.Shaping`).
        quantize: "int8" or "fp8": what products with kernels are computed in (`train.low_precision`).

    Returns:
        A callable (state, batch) -> (state, metrics), with `.lower` for ahead-of-time compiles. A batch is a
        dict of numpy or jax arrays [B, ...]: the model's keyword arguments and transformers' label names.
        Metrics are arrays [] on the device: "loss", "tokens" (valid labels), "grad_norm" (before clipping),
        "learning_rate" if given, "<part>_loss" where the loss has several parts, "z_loss" (which "loss" does not hold)
        where there is one, and "skipped_steps" and "loss_scale" where the options count and scale.

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
    feed = Feed(model, rules, accumulate)
    target = None if rules is None else abstract_state(model, optimizer, rules=rules, options=options)
    optimizer = fitted(model, optimizer)
    trained, deterministic = Trained(model), not has_dropout(model)
    shaping = losses.Shaping(label_smoothing, z_loss)
    multiply: Any = contract if quantize is None else multiplication(quantize)

    def slice_loss(params: Any, batch: Batch, rng: jax.Array, known: Known) -> Any:
        with jax.named_scope("forward"):
            rngs = None if deterministic else {"dropout": rng}
            inputs = feed.inputs(batch)
            outputs = model.apply({"params": params}, **inputs, deterministic=deterministic, rngs=rngs)
        with jax.named_scope("loss"):
            found = losses.terms(model, outputs, batch, shaping)
            value, sums = losses.total(found, known.counts), {term.name: term.sum for term in found}
            if z_loss:
                sums["z_loss"] = losses.z_total(found, known.counts)
                value += sums["z_loss"]
            return value if known.scale is None else value * known.scale, sums

    def whole(params: Any, batch: Batch, rng: jax.Array, known: Known) -> Any:
        def loss_of(part: Any) -> Any:
            return slice_loss(trained.join(part, params), batch, rng, known)

        return jax.value_and_grad(loss_of, has_aux=True)(trained.of(params))

    def pipelined(params: Any, batch: Batch, rng: jax.Array, known: Known) -> Any:
        assert target is not None
        rows = next(iter(batch.values())).shape[0]
        count = feed.num_microbatches(rows, microbatches, num_stages)
        return pipeline.value_and_grad(
            lambda params, piece, rng: slice_loss(params, piece, rng, known),
            params,
            _slices(batch, count),
            rng,
            shardings=shardings_of(target.params),
            schedule=schedule,
            virtual_stages=virtual_stages,
        )

    def gradients(params: Any, batch: Batch, rng: jax.Array, known: Known) -> Any:
        (_, sums), grads = (pipelined if num_stages > 1 else whole)(params, batch, rng, known)
        grads = trained.of(grads)
        if target is not None:  # summed over the batch straight into each device's shard
            grads = lax.with_sharding_constraint(grads, trained.of(shardings_of(target.params)))
        return sums, grads

    def accumulated(params: Any, batch: Batch, rng: jax.Array, known: Known) -> Any:
        if accumulate == 1:
            # A pipeline folds the key by microbatch, as accumulation folds it by slice.
            return gradients(params, batch, rng if num_stages > 1 else jax.random.fold_in(rng, 0), known)

        def body(total: Any, piece: Any) -> Any:
            index, batch = piece
            sums, grads = gradients(params, batch, jax.random.fold_in(rng, index), known)
            return jax.tree.map(lambda t, x: t + x.astype(jnp.float32), total, (sums, grads)), None

        pieces = _slices(batch, accumulate)
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.float32), trained.of(params))
        if target is not None:
            zeros = lax.with_sharding_constraint(zeros, trained.of(shardings_of(target.params)))
        reported = [*known.counts, *["z_loss"] * bool(z_loss)]
        start = ({name: jnp.float32(0) for name in reported}, zeros)
        indices = jnp.arange(accumulate, dtype=jnp.uint32)
        (sums, grads), _ = lax.scan(body, start, (indices, pieces))
        return sums, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, trained.of(params))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        known = Known(losses.label_counts(model, batch), guard.scale_of(state.guard, options))
        rng = jax.random.fold_in(state.rng, state.step)
        with multiply_by(multiply):
            sums, grads = accumulated(state.params, batch, rng, known)
        if known.scale is not None:
            unscale = 1 / known.scale
            grads = jax.tree.map(lambda g: g * unscale.astype(g.dtype), grads)
        with jax.named_scope("optimizer"), jax.numpy_dtype_promotion("standard"):  # optax is not strict
            filled = trained.filled(grads, state.params)
            updates, opt_state = optimizer.update(filled, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        with jax.named_scope("metrics"):
            metrics = _report(model, sums, known.counts) | {"grad_norm": global_norm(grads)}
            if learning_rate is not None:
                # A schedule counts the optimizer's updates.
                taken = state.step if state.guard is None else state.step - state.guard.skipped
                rate = learning_rate(taken) if callable(learning_rate) else learning_rate
                metrics["learning_rate"] = jnp.asarray(rate, jnp.float32)
            if module_norms:
                metrics |= {
                    f"grad_norm/{name}": global_norm(part)
                    for name, part in modules_of(grads).items()
                    if jax.tree.leaves(part)  # not of what is frozen
                }
        ema = None if options.ema is None else after_step(state.ema, params, state.step, options.ema)
        after = dataclasses.replace(state, params=params, opt_state=opt_state, step=state.step + 1, ema=ema)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        after = guard.judged(state, after, finite, options, halt_on_nonfinite)
        return after, metrics | guard.report(state, after, options)

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
    feed = Feed(model, rules)

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


def _slices(batch: Batch, count: int) -> dict[str, Any]:
    """[B, ...] to [count, B / count, ...]: row b is in slice b % count, so that each lies over devices as all do."""
    return {
        name: jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)
        for name, x in batch.items()
    }


def has_dropout(model: modelzoo.Model) -> bool:
    """Whether any dropout probability of a model's config, or of its adapters, is above zero."""
    settings = [model.config, *([model.tuning.lora] if model.tuning and model.tuning.lora else [])]
    values = (
        getattr(s, field.name) for s in settings for field in dataclasses.fields(s) if "drop" in field.name
    )
    return any(isinstance(value, float) and value > 0 for value in values)


def _report(model: Any, sums: Mapping[str, jax.Array], counts: Mapping[str, jax.Array]) -> Metrics:
    found = [losses.Term(p.name, sums[p.name], counts[p.name], p.weight) for p in losses.objective(model)]
    metrics = {"loss": losses.total(found), "tokens": found[0].count}
    if len(found) > 1:
        metrics |= {f"{term.name}_loss": losses.total([term._replace(weight=1.0)]) for term in found}
    return metrics | ({"z_loss": sums["z_loss"]} if "z_loss" in sums else {})
