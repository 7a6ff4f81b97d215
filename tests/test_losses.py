"""Losses: their numbers, their memory, and that slices of a batch add up to the batch."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import modelzoo
import train
from tests.zoo import tiny_gptj
from train import losses

LM = modelzoo.GPTJForCausalLM(tiny_gptj())
QA = modelzoo.GPTJForQuestionAnswering(tiny_gptj())


def classifier(**config):
    return modelzoo.GPTJForSequenceClassification(tiny_gptj(**config))


def logits_of(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(0, 3, shape), dtype)


def outputs(**fields):
    return types.SimpleNamespace(**fields)


def reference(logits, labels):
    """-log softmax in float64."""
    logits = np.asarray(logits, np.float64)
    highest = logits.max(-1, keepdims=True)
    lse = np.log(np.exp(logits - highest).sum(-1)) + highest[..., 0]
    return lse - np.take_along_axis(logits, labels[..., None], -1)[..., 0]


def test_causal_labels_are_shifted_and_minus_100_is_ignored():
    logits = logits_of(2, 4, 37)
    labels = np.asarray([[5, 6, -100, 7], [-100, -100, 8, -100]], np.int32)
    value, metrics = train.loss(LM, outputs(logits=logits), {"labels": labels})
    # position t predicts label t + 1
    each = [reference(logits[0, 0], np.asarray(6)), reference(logits[0, 2], np.asarray(7))]
    each += [reference(logits[1, 1], np.asarray(8))]
    assert value.dtype == jnp.float32
    assert value == pytest.approx(np.mean(each), rel=1e-6)
    assert metrics["loss"] == value
    assert metrics["tokens"] == 3
    assert set(metrics) == {"loss", "tokens"}


def test_all_ignored_is_zero_over_zero_labels():
    labels = jnp.full((2, 4), -100)

    def value(logits):
        value, metrics = train.loss(LM, outputs(logits=logits), {"labels": labels})
        return value, metrics["tokens"]

    (loss, tokens), gradient = jax.value_and_grad(value, has_aux=True)(logits_of(2, 4, 37))
    assert loss == 0
    assert tokens == 0
    np.testing.assert_array_equal(gradient, 0)


def test_single_label_classification():
    logits, labels = logits_of(5, 3), np.asarray([0, 2, 1, -100, 2])
    for config in ({"num_labels": 3}, {"num_labels": 3, "problem_type": "single_label_classification"}):
        value, metrics = train.loss(classifier(**config), outputs(logits=logits), {"labels": labels})
        keep = labels >= 0
        assert value == pytest.approx(reference(logits[keep], labels[keep]).mean(), rel=1e-6)
        assert metrics["tokens"] == 4


def test_regression():
    logits = logits_of(4, 1)
    for labels in (np.arange(4.0, dtype=np.float32), np.arange(4.0, dtype=np.float32)[:, None]):
        value, _ = train.loss(classifier(num_labels=1), outputs(logits=logits), {"labels": labels})
        assert value == pytest.approx(np.square(np.asarray(logits)[:, 0] - np.arange(4)).mean(), rel=1e-6)
    wide, labels = logits_of(4, 3), np.ones((4, 3), np.float32)
    model = classifier(num_labels=3, problem_type="regression")
    value, _ = train.loss(model, outputs(logits=wide), {"labels": labels})
    assert value == pytest.approx(np.square(np.asarray(wide) - 1).mean(), rel=1e-6)


def test_multi_label_classification_is_inferred_from_float_labels():
    logits, labels = logits_of(4, 3), (np.arange(12).reshape(4, 3) % 2).astype(np.float32)
    p = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    want = -(labels * np.log(p) + (1 - labels) * np.log(1 - p)).mean()
    value, metrics = train.loss(classifier(num_labels=3), outputs(logits=logits), {"labels": labels})
    assert value == pytest.approx(float(want), rel=1e-6)
    assert metrics["tokens"] == 12


def test_question_answering_clamps_ignores_and_averages():
    start, end = logits_of(3, 6), logits_of(3, 6, seed=1)
    # a negative position is the first; one past the text counts for nothing
    batch = {"start_positions": np.asarray([2, -3, 9]), "end_positions": np.asarray([[4], [6], [5]])}
    value, metrics = train.loss(QA, outputs(start_logits=start, end_logits=end), batch)
    start_loss = reference(start[:2], np.asarray([2, 0])).mean()
    end_loss = reference(end[np.asarray([0, 2])], np.asarray([4, 5])).mean()
    assert value == pytest.approx((start_loss + end_loss) / 2, rel=1e-6)
    assert metrics["start_loss"] == pytest.approx(start_loss, rel=1e-6)
    assert metrics["end_loss"] == pytest.approx(end_loss, rel=1e-6)
    assert metrics["tokens"] == 2


def test_slices_add_up_to_the_batch():
    # 3, 0 and 2 starts, other counts of ends: a mean of means would be another number
    start, end = logits_of(6, 5), logits_of(6, 5, seed=1)
    batch = {
        "input_ids": np.zeros((6, 5), np.int32),
        "start_positions": np.asarray([0, 4, 9, 9, 9, 2]),
        "end_positions": np.asarray([1, 9, 3, 9, 4, 9]),
    }
    whole, _ = train.loss(QA, outputs(start_logits=start, end_logits=end), batch)
    counts = losses.label_counts(QA, batch)
    assert {name: int(count) for name, count in counts.items()} == {"start": 3, "end": 3}
    parts = []
    for rows in (slice(0, 2), slice(2, 4), slice(4, 6)):
        out = outputs(start_logits=start[rows], end_logits=end[rows])
        found = losses.terms(QA, out, {name: value[rows] for name, value in batch.items()})
        parts.append(losses.total(found, counts))
    assert sum(parts) == pytest.approx(float(whole), rel=1e-6)


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (LM, {"labels": np.asarray([[1, 37, 2]])}, "labels holds 37 in row 0: .* classes 0 to 36"),
        (LM, {"labels": np.asarray([[1, 1, 1], [1, -7, 2]])}, "labels holds -7 in row 1"),
        (classifier(num_labels=3), {"labels": np.asarray([0, 3])}, "holds 3 in row 1: .* classes 0 to 2"),
        (classifier(num_labels=3), {"labels": np.ones((2, 2), np.float32)}, r"needs \[B, num_labels\]"),
        (LM, {"input_ids": np.zeros((1, 3), np.int32)}, "the batch has no 'labels'"),
        (modelzoo.GPTJModel(tiny_gptj()), {}, r"GPTJModel \(task 'base'\) has no loss"),
    ],
)
def test_wrong_labels_are_named(model, batch, message):
    with pytest.raises(ValueError, match=message):
        train.loss(model, outputs(logits=jnp.zeros((2, 3, 37))), batch)


def test_a_wrong_label_that_nobody_could_look_at_makes_nan():
    labels = jnp.asarray([[1, 37, 2]])  # column 37 exists: it pads the vocabulary
    value, _ = jax.jit(
        lambda labels: train.loss(LM, outputs(logits=jnp.zeros((1, 3, 40))), {"labels": labels})
    )(labels)
    assert np.isnan(value)


# --- every task's labels -------------------------------------------------------------------------------------


def tiny_task(task, num_labels=3):
    """A model of a task, for its name and config; no forward pass is needed here."""
    config = types.SimpleNamespace(vocab_size=7, num_labels=num_labels, problem_type=None)
    return types.SimpleNamespace(task=task, config=config)


@pytest.mark.parametrize("task", ["masked_lm", "seq2seq_lm", "unshifted_lm", "token_classification"])
def test_labels_that_stand_where_their_logits_do(task):
    classes = 3 if task == "token_classification" else 7
    logits, labels = logits_of(2, 4, classes), np.array([[0, -100, 2, 1], [-100, -100, 2, 0]], np.int32)
    value, metrics = train.loss(tiny_task(task), outputs(logits=logits), {"labels": labels})
    valid = labels != -100
    np.testing.assert_allclose(value, reference(logits, np.where(valid, labels, 0))[valid].mean(), rtol=1e-6)
    assert metrics["tokens"] == 5
    labels[0, 0] = classes
    with pytest.raises(ValueError, match=f"labels holds {classes} in row 0"):
        train.loss(tiny_task(task), outputs(logits=logits), {"labels": labels})


def test_multiple_choice():
    logits, labels = logits_of(3, 5), np.array([4, -100, 0], np.int32)
    model = tiny_task("multiple_choice")
    value, metrics = train.loss(model, outputs(logits=logits), {"labels": labels})
    expected = reference(logits, np.maximum(labels, 0))[[0, 2]].mean()
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert metrics["tokens"] == 2
    # the counts come from the inputs' second dimension, the choices
    batch = {"labels": labels, "input_ids": np.zeros((3, 5, 9), np.int32)}
    assert losses.label_counts(model, batch)["choice"] == 2
    with pytest.raises(ValueError, match="holds 5 in row 1"):
        losses.check_labels(model, batch | {"labels": np.array([4, 5, 0])})


def test_pretraining_is_the_sum_of_its_two_means():
    prediction, relation = logits_of(2, 4, 7), logits_of(2, 2, seed=1)
    labels = np.array([[0, -100, 2, 1], [-100, -100, 6, -100]], np.int32)
    batch = {"labels": labels, "next_sentence_label": np.array([[1], [0]], np.int32)}
    out = outputs(prediction_logits=prediction, seq_relationship_logits=relation)
    value, metrics = train.loss(tiny_task("pretraining"), out, batch)
    valid = labels != -100
    lm = reference(prediction, np.where(valid, labels, 0))[valid].mean()
    follows = reference(relation, np.array([1, 0])).mean()
    np.testing.assert_allclose(value, lm + follows, rtol=1e-6)
    np.testing.assert_allclose(metrics["lm_loss"], lm, rtol=1e-6)
    np.testing.assert_allclose(metrics["next_sentence_loss"], follows, rtol=1e-6)


def test_two_heads_are_the_sum_of_their_means():
    words, choices = logits_of(2, 3, 4, 7), logits_of(2, 3, seed=1)
    labels = np.full((2, 3, 4), -100, np.int32)
    labels[0, 1, 1:], labels[1, 2, 3] = (4, 0, 6), 5
    batch = {"labels": labels, "mc_labels": np.array([1, -100], np.int32)}
    out, model = outputs(logits=words, mc_logits=choices), tiny_task("double_heads")
    value, metrics = train.loss(model, out, batch)
    lm = np.mean([*reference(words[0, 1, :3], np.array([4, 0, 6])), reference(words[1, 2, 2], np.array(5))])
    choice = reference(choices, np.array([1, 0]))[0]
    np.testing.assert_allclose(value, lm + choice, rtol=1e-6)
    np.testing.assert_allclose(metrics["lm_loss"], lm, rtol=1e-6)
    np.testing.assert_allclose(metrics["choice_loss"], choice, rtol=1e-6)
    assert metrics["tokens"] == 4
    with pytest.raises(ValueError, match="mc_labels holds 3 in row 1"):
        train.loss(model, out, batch | {"mc_labels": np.array([1, 3])})
    with pytest.raises(ValueError, match=r"its inputs are \[rows, choices, tokens\], not \[rows, tokens\]"):
        train.loss(model, outputs(logits=words[:, 0], mc_logits=choices[:, 0]), batch)


def test_next_sentence():
    logits, labels = logits_of(3, 2), np.array([1, 0, -100], np.int32)
    value, _ = train.loss(tiny_task("next_sentence"), outputs(logits=logits), {"labels": labels})
    np.testing.assert_allclose(value, reference(logits, np.maximum(labels, 0))[:2].mean(), rtol=1e-6)


def test_every_class_of_the_zoo_has_a_loss_but_the_bare_trunks():
    classes = [cls for family in modelzoo.registry.FAMILIES.values() for cls in family.classes]
    trunks = {family.classes[0] for family in modelzoo.registry.FAMILIES.values()}
    assert all((cls.task in losses.OBJECTIVES) != (cls in trunks) for cls in classes)
    assert set(losses.OBJECTIVES) >= {cls.task for cls in classes} - {"base"}


SMOOTHED_LABELS = np.asarray([2, 6, -100, 0, 3])


def smoothed(logits, labels, smoothing):
    """By its definition, in float64: the label is a mixture of itself and all classes."""
    logits, keep = np.asarray(logits, np.float64), labels >= 0
    logs = logits - (np.log(np.exp(logits).sum(-1, keepdims=True)))
    target = (1 - smoothing) * np.eye(logits.shape[-1])[np.where(keep, labels, 0)] + smoothing / logits.shape[
        -1
    ]
    return -(target * logs).sum(-1)[keep].mean()


def test_label_smoothing_and_z_loss():
    logits, labels = logits_of(5, 7), SMOOTHED_LABELS
    model = classifier(num_labels=7)
    value, metrics = train.loss(model, outputs(logits=logits), {"labels": labels}, label_smoothing=0.1)
    assert value == pytest.approx(smoothed(logits, labels, 0.1), rel=1e-6)
    assert set(metrics) == {"loss", "tokens"}
    total, metrics = train.loss(
        model, outputs(logits=logits), {"labels": labels}, label_smoothing=0.1, z_loss=1e-2
    )
    lse = np.log(np.exp(np.asarray(logits, np.float64)).sum(-1))
    assert metrics["z_loss"] == pytest.approx(1e-2 * np.square(lse[labels >= 0]).mean(), rel=1e-6)
    assert metrics["loss"] == value
    assert total == pytest.approx(float(value + metrics["z_loss"]), rel=1e-6)


def test_label_smoothing_spares_the_padding_of_a_vocabulary():
    logits, ids = logits_of(2, 4, 37), np.random.default_rng(0).integers(0, 37, (2, 4))
    padded = jnp.concatenate([logits, jnp.full((2, 4, 3), -jnp.inf)], -1)
    value, _ = train.loss(LM, outputs(logits=padded), {"labels": ids}, label_smoothing=0.2)
    want = smoothed(logits[:, :-1].reshape(-1, 37), ids[:, 1:].reshape(-1), 0.2)
    assert value == pytest.approx(want, rel=1e-6)


def test_spans_are_smoothed_over_their_positions():
    start, end = logits_of(3, 6), logits_of(3, 6, seed=1)
    batch = {"start_positions": np.asarray([2, 0, 9]), "end_positions": np.asarray([4, 3, 5])}
    value, _ = train.loss(QA, outputs(start_logits=start, end_logits=end), batch, label_smoothing=0.1)
    want = smoothed(start[:2], np.asarray([2, 0]), 0.1) / 2 + smoothed(end, np.asarray([4, 3, 5]), 0.1) / 2
    assert value == pytest.approx(want, rel=1e-6)


def test_numbers_are_not_smoothed():
    model, batch = classifier(num_labels=1), {"labels": np.arange(4, dtype=np.float32)}
    with pytest.raises(ValueError, match=r"train\.label_smoothing = 0\.1: it is for labels that are classes"):
        train.loss(model, outputs(logits=logits_of(4, 1)), batch, label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"train\.z_loss = 0\.1"):
        train.loss(model, outputs(logits=logits_of(4, 1)), batch, z_loss=0.1)
