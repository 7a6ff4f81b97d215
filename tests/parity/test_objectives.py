"""Losses of every class for every kind of labels, and the gradients of one, against transformers and torch."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import modelzoo
import train
from tests.parity import cases
from tests.parity.labels import NONE, batches
from tests.parity.pairs import Pair, forward, our_fields, pair, stored_tensors, their_loss
from tests.zoo import quick_jit

TRAINED = [name for name in cases.CLASSES if modelzoo.get_model_class(name).task != "base"]
TAKE_NO_COLUMN = {
    "BloomForSequenceClassification",
    "RobertaForMultipleChoice",
    "MegatronBertForMultipleChoice",
}
"""Classes whose labels transformers does not flatten."""
TAKES = {name: modelzoo.input_names(modelzoo.get_model_class(name)) for name in TRAINED}
every_trained_class = pytest.mark.parametrize("name", TRAINED)


def pair_and_inputs(name: str, num_labels: int | None = None) -> tuple[Pair, dict[str, Any]]:
    title, options = cases.loss_cell(name)
    both = pair(name, title) if num_labels is None else pair(name, title, num_labels=num_labels)
    if options is None:
        options = "right + decoder" if "decoder_input_ids" in TAKES[name] else "right"
    return both, both.inputs(options)


@functools.cache
def outputs(name: str, num_labels: int | None = None) -> Any:
    both, inputs = pair_and_inputs(name, num_labels)
    return forward(both.ours, both.params, inputs, output_attentions=False, output_hidden_states=False)


@every_trained_class
def test_losses(name, measured):
    both, inputs = pair_and_inputs(name)
    seen = set()
    for given in batches(both.ours.task, our_fields(outputs(name))):
        seen.add(given.kind)
        both, inputs = pair_and_inputs(name, given.num_labels)
        if given.kind.startswith("a column,") and name in TAKE_NO_COLUMN:
            with pytest.raises((RuntimeError, ValueError), match="multi-target"):
                their_loss(both.theirs, inputs, given)
            continue
        want = their_loss(both.theirs, inputs, given).item()
        config = dataclasses.replace(both.ours.config, problem_type=given.problem_type)
        batch = inputs | given.labels
        got = float(train.loss(both.ours.clone(config=config), outputs(name, given.num_labels), batch)[0])
        if NONE in given.kind:
            assert math.isnan(want), f"{given.kind}: transformers' loss is {want}"
            assert got == 0.0, f"{given.kind}: {got}, not 0"
        else:
            apart = abs(got - want) / abs(want)
            assert apart <= 1e-5, f"{given.kind}: {got} and {want} are {apart:.3g} apart"
            measured(name, loss=apart)
    assert len(seen) >= 4


@pytest.mark.parametrize("name", [name for name in TRAINED if "labels" in TAKES[name]])
def test_decoder_inputs_follow_from_labels(name):
    """Where the class makes them, as transformers does."""
    both, _ = pair_and_inputs(name)
    inputs = both.inputs("right")
    for given in batches(both.ours.task, our_fields(forward(both.ours, both.params, inputs)))[:2]:
        want = their_loss(both.theirs, inputs, given).item()
        out = forward(both.ours, both.params, inputs | given.labels)
        got, _ = train.loss(both.ours, out, inputs | given.labels)
        np.testing.assert_allclose(got, want, rtol=1e-5)


@every_trained_class
def test_gradients(name, measured, tmp_path):
    """Of every tensor under transformers' name; a parameter that torch has as a buffer is frozen here."""
    both, inputs = pair_and_inputs(name)
    given = batches(both.ours.task, our_fields(outputs(name)))[0]
    both, inputs = pair_and_inputs(name, given.num_labels)
    batch = inputs | given.labels
    both.theirs.zero_grad()
    their_loss(both.theirs, inputs, given).backward()

    def loss(params: Any) -> jax.Array:
        out = both.ours.apply({"params": params}, **jax.tree.map(jnp.asarray, inputs))
        return train.loss(both.ours, out, batch)[0]

    gradients = quick_jit(jax.grad(loss))(both.params)
    modelzoo.to_hf(both.ours, gradients, tmp_path)  # fuses and turns them as it does weights
    ours = load_file(tmp_path / "model.safetensors")
    theirs = dict(both.theirs.named_parameters(remove_duplicate=False))
    buffers = stored_tensors(both.theirs).keys() - theirs.keys()
    assert ours.keys() - theirs.keys() == buffers
    largest = max(float(tensor.grad.abs().max()) for tensor in theirs.values() if tensor.grad is not None)
    assert largest > 1e-3
    for key in sorted(ours.keys() - buffers):
        want = theirs[key].grad
        want = np.zeros(theirs[key].shape) if want is None else want.double().numpy()
        apart, size = np.max(np.abs(ours[key] - want)), np.max(np.abs(want))
        if size < 1e-6 * largest:  # zero but for rounding, as a bias under a softmax is: then ours is, too
            assert apart < 1e-6 * max(largest, 1.0), f"{key}: {apart:.3g} where there is no gradient"
            continue
        assert apart <= 1e-4 * size, f"{key}: differs by {apart / size:.3g} of its largest element"
        measured(name, gradient=float(apart / size))


@every_trained_class
def test_what_is_frozen_is_a_buffer(name, tmp_path):
    both, _ = pair_and_inputs(name)
    marks = jax.tree.map(
        lambda leaf, trains: np.full(leaf.shape, trains, np.float32),
        both.params,
        modelzoo.trainable(both.ours),
    )
    modelzoo.to_hf(both.ours, marks, tmp_path)
    frozen = {key for key, mark in load_file(tmp_path / "model.safetensors").items() if not mark.any()}
    assert frozen == stored_tensors(both.theirs).keys() - dict(both.theirs.named_parameters()).keys()
