"""What a task minimises: `train.loss`, with the semantics of transformers 4.57.6.

A task is a row of `OBJECTIVES`: one or more parts, each saying which logits meet which labels. Every part
gives a sum and a count, and a loss is the weighted sum of sum / count. A step that cuts its batch into slices
can therefore form the mean over all valid labels of the global batch (the counts follow from the labels
alone, before any forward pass), never a mean of means.

Departure from transformers: where every label is ignored the loss is 0 with a count of 0, not NaN, so that
one empty batch does not end a run.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

IGNORED = -100
"""The label that is not learned from."""

_SUM_WINDOW = 32  # columns that one vectorised loop adds up on a CPU; 16 to 128 measure alike


class Target(NamedTuple):
    """What a part's logits are held against.

    Attributes:
        labels: class numbers int32 [...], or floats shaped like the logits.
        valid: bool [...], False where the label is ignored.
        num_classes: a label that is valid must be below it; None where labels are floats.
        score: (logits, labels) -> float32 [...], the loss of every label.
    """

    labels: jax.Array
    valid: jax.Array
    num_classes: int | None
    score: Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Part:
    """One sum of an objective.

    Attributes:
        name: what the metrics call it.
        logits: the output's field that it scores.
        labels: the batch's key that it reads, named as in transformers.
        target: (config, labels, length) -> Target; length is T, the positions that a span label may name.
        weight: factor of its mean in the total.
    """

    name: str
    logits: str
    labels: str
    target: Callable[[Any, jax.Array, int], Target]
    weight: float = 1.0


class Term(NamedTuple):
    """A part's result on a batch: the sum of its losses, float32 [], over `count` valid labels, int32 []."""

    name: str
    sum: jax.Array
    count: jax.Array
    weight: float


# --- cross-entropy ------------------------------------------------------------------------------------------


def _sum_exp(logits: jax.Array, highest: jax.Array) -> jax.Array:
    """sum(exp(logits - highest)) over the last dimension, in float32, without an array of their size."""

    def plain(logits: jax.Array, highest: jax.Array) -> jax.Array:
        return jnp.exp(logits.astype(jnp.float32) - highest[..., None]).sum(-1)

    def windowed(logits: jax.Array, highest: jax.Array) -> jax.Array:
        # XLA's CPU backend computes a fused exp + row sum element by element on one core. Summing short
        # windows first is vectorised over the rows and cores: 40 ms instead of 166 ms for 1024 x 50400 on two
        # cores.
        window = (1,) * (logits.ndim - 1) + (_SUM_WINDOW,)
        padding = ((0, 0),) * (logits.ndim - 1) + ((0, -logits.shape[-1] % _SUM_WINDOW),)
        logits = lax.optimization_barrier(logits)  # else bfloat16 logits become a float32 array first
        terms = jnp.exp(logits.astype(jnp.float32) - highest[..., None])
        return lax.reduce_window(terms, jnp.float32(0), lax.add, window, window, padding).sum(-1)

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:  # windows would cross the edges of a sharded vocabulary
        return plain(logits, highest)
    return lax.platform_dependent(logits, highest, cpu=windowed, default=plain)


@jax.custom_vjp
def logsumexp_and_pick(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The log of the softmax's denominator, and the logit of each label.

    Neither pass holds a float32 copy of the logits: the forward pass reads them, the backward pass writes
    their gradient in their own dtype. Columns of minus infinity (a padded vocabulary) get a gradient of zero.
    A sharded last dimension costs all-reduces of the two results, no gather of the logits.

    Args:
        logits: [..., V], any float dtype.
        labels: int32 [...], each in [0, V).

    Returns:
        float32 [...] twice.
    """
    return _pick_forward(logits, labels)[0]


def _pick_forward(logits: jax.Array, labels: jax.Array):
    highest = logits.max(-1).astype(jnp.float32)
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1, mode="clip")[..., 0]
    lse = highest + jnp.log(_sum_exp(logits, highest))
    return (lse, picked.astype(jnp.float32)), (logits, labels, lse)


def _pick_backward(saved, gradients):
    (logits, labels, lse), (d_lse, d_picked) = saved, gradients
    softmax = jnp.exp(logits.astype(jnp.float32) - lse[..., None])
    hit = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == labels[..., None]
    d_logits = softmax * d_lse[..., None] + jnp.where(hit, d_picked[..., None], 0.0)
    return d_logits.astype(logits.dtype), None


logsumexp_and_pick.defvjp(_pick_forward, _pick_backward)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log softmax(logits)[label], in float32.

    Args:
        logits: [..., C], any float dtype; columns of minus infinity have no probability.
        labels: int32 [...], each in [0, C).

    Returns:
        float32 [...].
    """
    lse, picked = logsumexp_and_pick(logits, labels)
    return lse - picked


def _squared_error(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.square(logits.astype(jnp.float32) - labels.astype(jnp.float32))


def _binary_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    x, y = logits.astype(jnp.float32), labels.astype(jnp.float32)
    return jnp.maximum(x, 0.0) - x * y + jnp.log1p(jnp.exp(-jnp.abs(x)))


# --- which labels meet which logits -------------------------------------------------------------------------


def _classes(labels: jax.Array, num_classes: int) -> Target:
    return Target(labels, labels != IGNORED, num_classes, cross_entropy)


def _next_tokens(config: Any, labels: jax.Array, length: int) -> Target:
    shifted = jnp.concatenate([labels[:, 1:], jnp.full_like(labels[:, :1], IGNORED)], axis=1)
    return _classes(shifted, config.vocab_size)


def _tokens(config: Any, labels: jax.Array, length: int) -> Target:
    return _classes(labels, config.vocab_size)


def _token_classes(config: Any, labels: jax.Array, length: int) -> Target:
    return _classes(labels, config.num_labels)


def _choice(config: Any, labels: jax.Array, length: int) -> Target:
    return _classes(labels.reshape(-1), length)  # the logits are [B, choices]


def _follows(config: Any, labels: jax.Array, length: int) -> Target:
    return _classes(labels.reshape(-1), 2)


def _sequence_label(config: Any, labels: jax.Array, length: int) -> Target:
    problem = config.problem_type
    if problem is None:
        if config.num_labels == 1:
            problem = "regression"
        else:
            integers = jnp.issubdtype(labels.dtype, jnp.integer)
            problem = "single_label_classification" if integers else "multi_label_classification"
    if problem == "single_label_classification":
        return _classes(labels.reshape(-1), config.num_labels)
    if problem == "regression" and config.num_labels == 1:
        labels = labels.reshape(-1, 1)
    if labels.ndim != 2 or labels.shape[1] != config.num_labels:
        raise ValueError(f"labels {labels.shape}: {problem} needs [B, num_labels], with {config.num_labels=}")
    score = _squared_error if problem == "regression" else _binary_cross_entropy
    return Target(labels, jnp.ones(labels.shape, bool), None, score)


def _span_end(config: Any, labels: jax.Array, length: int) -> Target:
    # transformers clamps into [0, T] and ignores T: an answer past the text counts for nothing
    position = jnp.clip(labels.reshape(-1), 0, length)
    return Target(position, position < length, length, cross_entropy)


_ANY_TOKEN = (Part("lm", "logits", "labels", _tokens),)  # labels stand where their logits do

OBJECTIVES: Mapping[str, tuple[Part, ...]] = {
    "causal_lm": (Part("lm", "logits", "labels", _next_tokens),),
    "masked_lm": _ANY_TOKEN,
    "seq2seq_lm": _ANY_TOKEN,
    "unshifted_lm": _ANY_TOKEN,
    "sequence_classification": (Part("classification", "logits", "labels", _sequence_label),),
    "token_classification": (Part("classification", "logits", "labels", _token_classes),),
    "question_answering": (
        Part("start", "start_logits", "start_positions", _span_end, 0.5),
        Part("end", "end_logits", "end_positions", _span_end, 0.5),
    ),
    "multiple_choice": (Part("choice", "logits", "labels", _choice),),
    "next_sentence": (Part("next_sentence", "logits", "labels", _follows),),
    "pretraining": (
        Part("lm", "prediction_logits", "labels", _tokens),
        Part("next_sentence", "seq_relationship_logits", "next_sentence_label", _follows),
    ),
}
"""Task of a model class -> the parts of its loss."""


def objective(model: Any) -> tuple[Part, ...]:
    """The parts of a model's loss.

    Raises:
        ValueError: the model's task has none.
    """
    if model.task not in OBJECTIVES:
        raise ValueError(
            f"{type(model).__name__} (task {model.task!r}) has no loss: these have {[*OBJECTIVES]}"
        )
    return OBJECTIVES[model.task]


def _target(model: Any, part: Part, batch: Mapping[str, Any], outputs: Any = None) -> Target:
    if batch.get(part.labels) is None:
        raise ValueError(f"the batch has no {part.labels!r}, which {type(model).__name__} learns from")
    if outputs is not None:
        length = getattr(outputs, part.logits).shape[1]
    else:
        names = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds")
        length = next((batch[name].shape[1] for name in names if name in batch), 0)
    return part.target(model.config, jnp.asarray(batch[part.labels]), length)


def check_labels(model: Any, batch: Mapping[str, Any], outputs: Any = None) -> None:
    """Refuses labels that name no class. Reads numpy arrays; arrays on a device are left alone (see `terms`).

    Args:
        model: a model of a task with a loss.
        batch: labels, and the inputs unless there are outputs: they say how many choices or positions there are.
        outputs: what `model.apply` returned, if it is there yet.

    Raises:
        ValueError: a label outside the classes; names it and its place.
    """
    for part in objective(model):
        labels = batch.get(part.labels)
        if not isinstance(labels, np.ndarray):
            continue
        with jax.ensure_compile_time_eval():  # numpy labels are numbers even where the caller traces
            target = _target(model, part, batch, outputs)
        if target.num_classes is None:
            continue
        target = jax.tree.map(np.asarray, target._replace(score=None))
        wrong = target.valid & ((target.labels < 0) | (target.labels >= target.num_classes))
        if wrong.any():
            label = target.labels[wrong][0]
            row = np.argwhere(wrong)[0][0]
            raise ValueError(
                f"{part.labels} holds {label} in row {row}: {type(model).__name__} has the classes 0 to "
                f"{target.num_classes - 1} ({IGNORED} is ignored)"
            )


# --- sums, counts, the loss ---------------------------------------------------------------------------------


def label_counts(model: Any, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The number of valid labels of every part, int32 []: from the labels alone, without outputs.

    Args:
        model: a model of a task with a loss.
        batch: its labels, and the inputs (their length bounds a span).
    """
    return {part.name: _target(model, part, batch).valid.sum(dtype=jnp.int32) for part in objective(model)}


def terms(model: Any, outputs: Any, batch: Mapping[str, Any]) -> list[Term]:
    """The sum and count of every part of the loss.

    A label outside the classes, where nobody could look at it before (`check_labels`), makes the sum NaN.

    Args:
        model: a model of a task with a loss.
        outputs: what `model.apply` returned.
        batch: transformers' label names beside the inputs; labels of -100 are ignored.
    """
    found = []
    for part in objective(model):
        labels, valid, num_classes, score = _target(model, part, batch, outputs)
        logits = getattr(outputs, part.logits)
        if num_classes is None:
            losses = score(logits, labels)
        else:
            wrong = (labels < 0) | (labels >= num_classes)
            losses = score(logits, jnp.where(valid & ~wrong, labels, 0))
            losses = jnp.where(valid, jnp.where(wrong, jnp.nan, losses), 0.0)
        found.append(Term(part.name, losses.sum(), valid.sum(dtype=jnp.int32), part.weight))
    return found


def total(found: list[Term], counts: Mapping[str, jax.Array] | None = None) -> jax.Array:
    """The weighted sum of the terms' means, float32 [].

    Args:
        found: the terms of a batch or of a slice of it.
        counts: valid labels of the whole batch by part; by default the terms' own. With them the totals of
            the slices add up to the total of the batch.
    """
    each = []
    for term in found:
        count = term.count if counts is None else counts[term.name]
        each.append(term.weight * term.sum / jnp.maximum(count, 1).astype(jnp.float32))
    return sum(each[1:], start=each[0])


def loss(model: Any, outputs: Any, batch: Mapping[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss that transformers computes for this model class.

    Args:
        model: a model of a task with a loss; its `config` names the classes and the problem type.
        outputs: what `model.apply` returned.
        batch: transformers' label names beside the inputs. "labels" is int [B, T] for language models (shifted inside
            for causal ones) and token classes; int [B], or float [B, C], for classes of sequences; int [B] for
            choices and next sentences. Pretraining also has "next_sentence_label" int [B]; question answering has
            "start_positions" and "end_positions", int [B].

    Returns:
        The loss, float32 [], the mean over all valid labels (0 where there are none), and metrics: "loss",
        "tokens" (int32 [], valid labels of the first part), and "<part>_loss" where the loss has several
        parts.

    Raises:
        ValueError: the model's task has no loss, a key is missing, labels have the wrong shape or name no
            class.
    """
    check_labels(model, batch, outputs)
    found = terms(model, outputs, batch)
    value = total(found)
    metrics = {"loss": value, "tokens": found[0].count}
    if len(found) > 1:
        metrics |= {f"{term.name}_loss": total([term._replace(weight=1.0)]) for term in found}
    return value, metrics
