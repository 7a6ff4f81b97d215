"""Runs that start from a checkpoint: the trunk's parameters come along, a head that is not there is new."""

import jax
import numpy as np
import pytest

import modelzoo
import parallel
from tests.zoo import assert_equal, leaves_by_name, random_params, tiny_mvp
from train import optim
from train.saving import Saver
from train.starting import open_start
from train.state import init_state

SMALL = dict(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=12, vocab_size=24)


def config(**fields):
    return modelzoo.get_config("tiny-roberta", **SMALL, **fields)


@pytest.fixture(scope="module")
def rules():
    return parallel.make_rules(parallel.make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, rules):
    """(a Hugging Face folder, a run's folder, the parameters of both)."""
    model = modelzoo.RobertaForMaskedLM(config())
    params = random_params(model)
    folder, run = tmp_path_factory.mktemp("hf"), tmp_path_factory.mktemp("run")
    modelzoo.to_hf(model, params, folder)
    state = init_state(model, optim.adamw(learning_rate=1e-3), rules=rules, params=params)
    with Saver(run, model=model, every=1) as saver:
        saver.maybe_save(1, state)
    return folder, run, params


@pytest.mark.parametrize("place", [0, 1])
def test_another_head_takes_the_trunk(pretrained, rules, place):
    start = open_start(pretrained[place])
    assert start.config("roberta").hidden_size == 8
    model = modelzoo.RobertaForSequenceClassification(config(num_labels=3, hidden_dropout_prob=0.3))
    found = leaves_by_name(start.read_params(model, rules, jax.random.key(0)))
    known = leaves_by_name(pretrained[2])
    assert set(found) == set(leaves_by_name(modelzoo.abstract_params(model)))
    for name, leaf in found.items():
        if name in known:
            np.testing.assert_array_equal(leaf, known[name])
    new = {name for name in found if name not in known}
    assert new
    assert all(name.startswith("classifier") for name in new)
    assert any(found[name].shape == (8, 3) for name in new)


@pytest.mark.parametrize("place", [0, 1])
def test_the_same_head_is_the_same_model(pretrained, rules, place):
    found = open_start(pretrained[place]).read_params(
        modelzoo.RobertaForMaskedLM(config()), rules, jax.random.key(0)
    )
    assert_equal(found, pretrained[2])


def test_slips_are_named(pretrained, rules, tmp_path):
    with pytest.raises(OSError, match=r"train.init_from = '.*nothing'"):
        open_start(tmp_path / "nothing")
    start = open_start(pretrained[1])
    with pytest.raises(ValueError, match="model_type 'roberta', where the model class is one of 'gptj'"):
        start.config("gptj")
    wider = modelzoo.RobertaForSequenceClassification(
        modelzoo.get_config("tiny-roberta", **SMALL | {"vocab_size": 30})
    )
    with pytest.raises(ValueError, match=r"embed.* is \[24, 8\], where the config makes it \[30, 8\]"):
        start.read_params(wider, rules, jax.random.key(0))


def test_prompts_are_new_to_a_checkpoint_without_them(tmp_path, rules):
    plain = modelzoo.MvpForConditionalGeneration(tiny_mvp(use_prompt=False))
    params = random_params(plain)
    modelzoo.to_hf(plain, params, tmp_path)
    lora = modelzoo.Lora(rank=1, alpha=1.0, targets=".*cross_attention/query/kernel")
    model = modelzoo.tuned(modelzoo.MvpForConditionalGeneration(tiny_mvp()), modelzoo.Tuning(lora=lora))
    found = leaves_by_name(open_start(tmp_path).read_params(model, rules, jax.random.key(0)))
    assert found.keys() == leaves_by_name(modelzoo.abstract_params(model)).keys()
    known = leaves_by_name(params)
    assert all("_prompt/" in name or "/lora/" in name for name in found.keys() - known.keys())
    for name, leaf in known.items():
        np.testing.assert_array_equal(found[name], leaf)
    assert np.any(found["trunk/decoder/self_prompt/embed/embedding"])
