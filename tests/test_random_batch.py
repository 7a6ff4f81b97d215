"""train/random_batch.py: a batch for every class that has a loss."""

import jax
import numpy as np
import pytest

import modelzoo
import train
from modelzoo.registry import FAMILIES
from tests.zoo import TINY
from train.losses import OBJECTIVES
from train.random_batch import draw_batch

CLASSES = [
    pytest.param(cls, TINY[family.model_type], id=cls.__name__)
    for family in FAMILIES.values()
    for cls in family.classes
    if cls.task in OBJECTIVES
]


@pytest.mark.parametrize(("cls", "preset"), CLASSES)
def test_every_class_takes_its_batch(cls, preset):
    model = cls(modelzoo.get_config(preset))
    batch = draw_batch(model, rows=3, length=6)
    names = modelzoo.input_names(model)
    inputs = {name: value for name, value in batch.items() if name in names}

    def loss(params):
        return train.loss(model, model.apply({"params": params}, **inputs), batch)

    value, metrics = jax.eval_shape(loss, modelzoo.abstract_params(model))
    assert value.shape == metrics["tokens"].shape == ()
    assert {value.dtype for value in batch.values()} <= {np.dtype(np.int32), np.dtype(np.float32)}


def test_it_follows_its_seed_and_has_padding_and_ignored_labels():
    model = modelzoo.GPTJForCausalLM(modelzoo.get_config("tiny-gptj"))
    batch, same, other = (draw_batch(model, 4, 9, seed) for seed in (1, 1, 2))
    for name in batch:
        np.testing.assert_array_equal(batch[name], same[name])
    assert np.any(batch["input_ids"] != other["input_ids"])
    assert batch["attention_mask"].sum(axis=1).tolist() == [9, 8, 7, 9]
    assert np.all(batch["labels"][batch["attention_mask"] == 0] == -100)
    learned = batch["labels"] != -100
    assert 0.4 < learned[batch["attention_mask"] == 1].mean() < 1.0


def test_a_choice_is_scored_by_its_last_token():
    batch = draw_batch(modelzoo.GPT2DoubleHeadsModel(modelzoo.get_config("tiny-gpt2")), 2, 9)
    np.testing.assert_array_equal(batch["mc_token_ids"] + 1, batch["attention_mask"].sum(-1))
    assert np.all(batch["labels"][batch["attention_mask"] == 0] == -100)
    assert batch["mc_labels"].shape == (2,)


@pytest.mark.parametrize(
    ("rows", "length", "message"),
    [(0, 8, "rows = 0"), (2, 1, "length = 1: it is from 2 to the model's 64"), (2, 65, "length = 65")],
)
def test_sizes_that_cannot_be(rows, length, message):
    model = modelzoo.GPTJForCausalLM(modelzoo.get_config("tiny-gptj"))
    with pytest.raises(ValueError, match=message):
        draw_batch(model, rows, length)


def test_a_trunk_has_no_labels():
    with pytest.raises(ValueError, match="has no loss"):
        draw_batch(modelzoo.GPTJModel(modelzoo.get_config("tiny-gptj")), 2, 8)
