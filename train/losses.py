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

from train.softmax import logsumexp_and_pick, logsumexp_pick_and_mean

IGNORED = -100
"""The label that is not learned from."""


class Target(NamedTuple):
    """What a part's logits are held against.

    Attributes:
        labels: class numbers int32 [...], or floats shaped like the logits.
        valid: bool [...], False where the label is ignored.
        num_classes: a label that is valid must be below it; None where labels are floats.
        score: (logits, labels) -> float32 [...], the loss of every label that is a float; None where it is a class.
    """

    labels: jax.Array
    valid: jax.Array
    num_classes: int | None
    score: Callable[[jax.Array, jax.Array], jax.Array] | None


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
    """A part's result on a batch: the sum of its losses, float32 [], over `count` valid labels, int32 [].

    `z_sum` is that of its z-losses, of which `count` is the same.
    """

    name: str
    sum: jax.Array
    count: jax.Array
    weight: float
    z_sum: jax.Array | None = None


class Shaping(NamedTuple):
    """What training adds to the cross-entropy of every class label; evaluation does not.

    Attributes:
        label_smoothing: share of a label that is spread over all classes, as torch.nn.functional.cross_entropy does.
        z_loss: factor of the squared log of the softmax's denominator, which keeps it near 1 (Chowdhery et al., 2022,
            arXiv:2204.02311, section 5: 1e-4).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0


PLAIN = Shaping()


# --- scores -------------------------------------------------------------------------------------------------


def _squared_error(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.square(logits.astype(jnp.float32) - labels.astype(jnp.float32))


def _binary_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    x, y = logits.astype(jnp.float32), labels.astype(jnp.float32)
    return jnp.maximum(x, 0.0) - x * y + jnp.log1p(jnp.exp(-jnp.abs(x)))


# --- which labels meet which logits -------------------------------------------------------------------------


def _classes(labels: jax.Array, num_classes: int) -> Target:
    return Target(labels, labels != IGNORED, num_classes, None)


def _next_tokens(config: Any, labels: jax.Array, length: int) -> Target:
    shifted = jnp.concatenate([labels[..., 1:], jnp.full_like(labels[..., :1], IGNORED)], axis=-1)
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
    return Target(position, position < length, length, None)


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
    "double_heads": (
        Part("lm", "logits", "labels", _next_tokens),
        Part("choice", "mc_logits", "mc_labels", _choice),
    ),
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
        shape = getattr(outputs, part.logits).shape
        if len(shape) < 2:
            raise ValueError(
                f"{type(model).__name__} learns from choices: its inputs are [rows, choices, tokens], not "
                "[rows, tokens]"
            )
        length = shape[1]
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


def terms(model: Any, outputs: Any, batch: Mapping[str, Any], shaping: Shaping = PLAIN) -> list[Term]:
    """The sum and count of every part of the loss.

    A label outside the classes, where nobody could look at it before (`check_labels`), makes the sum NaN.

    Args:
        model: a model of a task with a loss.
        outputs: what `model.apply` returned.
        batch: transformers' label names beside the inputs; labels of -100 are ignored.
        shaping: label smoothing and z-loss.

    Raises:
        ValueError: there is something to shape, and labels are no classes.
    """
    found = []
    for part in objective(model):
        labels, valid, num_classes, score = _target(model, part, batch, outputs)
        logits, z_sum = getattr(outputs, part.logits), None
        if score is not None:
            if shaping != PLAIN:
                name = "label_smoothing" if shaping.label_smoothing else "z_loss"
                raise ValueError(
                    f"train.{name} = {getattr(shaping, name)}: it is for labels that are classes, and "
                    f"{type(model).__name__} learns from numbers here (regression or several labels): set it to 0"
                )
            losses = score(logits, labels)
        else:
            assert num_classes is not None
            wrong = (labels < 0) | (labels >= num_classes)
            losses, lse = _of_classes(
                logits, jnp.where(valid & ~wrong, labels, 0), num_classes, shaping.label_smoothing
            )
            losses = jnp.where(valid, jnp.where(wrong, jnp.nan, losses), 0.0)
            if shaping.z_loss:
                z_sum = shaping.z_loss * jnp.where(valid, jnp.square(lse), 0.0).sum()
        found.append(Term(part.name, losses.sum(), valid.sum(dtype=jnp.int32), part.weight, z_sum))
    return found


def _of_classes(
    logits: jax.Array, labels: jax.Array, num_classes: int, smoothing: float
) -> tuple[jax.Array, jax.Array]:
    """The cross-entropy of every label and the log of its softmax's denominator, float32 [...] each."""
    if not smoothing:
        lse, picked = logsumexp_and_pick(logits, labels)
        return lse - picked, lse
    sums: Any = logsumexp_pick_and_mean(logits, labels, num_classes)
    lse, picked, mean = sums
    return lse - (1 - smoothing) * picked - smoothing * mean, lse


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


def z_total(found: list[Term], counts: Mapping[str, jax.Array] | None = None) -> jax.Array:
    """As `total`, of the z-losses; 0 where there are none."""
    squares = [term._replace(sum=term.z_sum) for term in found if term.z_sum is not None]
    return total(squares, counts) if squares else jnp.float32(0)


def loss(
    model: Any,
    outputs: Any,
    batch: Mapping[str, Any],
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss that transformers computes for this model class, and what training may add to it.

    Args:
        model: a model of a task with a loss; its `config` names the classes and the problem type.
        outputs: what `model.apply` returned.
        batch: transformers' label names beside the inputs. "labels" is int [B, T] for language models (shifted inside
            for causal ones) and token classes; int [B], or float [B, C], for classes of sequences; int [B] for
            choices and next sentences. Pretraining also has "next_sentence_label" int [B]; question answering has
            "start_positions" and "end_positions", int [B]; two heads have "labels" int [B, C, T] and "mc_labels"
            int [B], of whose losses, which transformers returns apart, this is the sum.
        label_smoothing, z_loss: as in `Shaping`.

    Returns:
        What to minimise, float32 [], the mean over all valid labels (0 where there are none), and metrics: "loss"
        (the same without z-loss), "tokens" (int32 [], valid labels of the first part), "<part>_loss" where the loss
        has several parts, and "z_loss" where there is one.

    Raises:
        ValueError: the model's task has no loss, a key is missing, labels have the wrong shape or name no
            class.
    """
    check_labels(model, batch, outputs)
    found = terms(model, outputs, batch, Shaping(label_smoothing, z_loss))
    value = total(found)
    metrics = {"loss": value, "tokens": found[0].count}
    if len(found) > 1:
        metrics |= {f"{term.name}_loss": total([term._replace(weight=1.0)]) for term in found}
    if z_loss:
        metrics["z_loss"] = z_total(found)
        value += metrics["z_loss"]
    return value, metrics
