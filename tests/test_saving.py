"""A run's state comes back as it was, on any mesh."""

import json

import jax
import numpy as np
import pytest

import modelzoo
import parallel
import train
from train import optim

MODEL = modelzoo.GPTJForCausalLM(modelzoo.get_config("tiny-gptj", vocab_size=211, n_embd=32, attn_pdrop=0.1))
OPTIMIZER = optim.adamw(learning_rate=1e-2)


def batch(seed):
    ids = np.random.default_rng(seed).integers(0, 211, (8, 12)).astype(np.int32)
    return {"input_ids": ids, "labels": ids}


def rules_of(**axes):
    return parallel.make_rules(parallel.make_mesh(**axes))


def canonical(state):
    # What every layout shares: parameters and moments at their true sizes.
    from parallel.checkpoint import canonical

    return jax.tree.map(np.asarray, canonical((state.params, state.opt_state, state.step), MODEL))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(workdir, the state) after two steps on a mesh that pads the vocabulary."""
    workdir = tmp_path_factory.mktemp("run")
    rules = rules_of(data=2, fsdp=2, tensor=2)
    state = train.init_state(MODEL, OPTIMIZER, rules=rules, rng=jax.random.key(1))
    step = train.make_train_step(MODEL, OPTIMIZER, rules=rules)
    with train.Saver(workdir, every=2, keep=2) as saver:
        for at in (1, 2):
            state, _ = step(state, batch(at))
            wrote = saver.maybe_save(at, state, {"position": at}, texts={"config.gin": "x = 1"}, model=MODEL)
            assert wrote == (at == 2)
        assert not saver.maybe_save(2, state, {}, texts={}, model=MODEL, force=True)  # it is there already
    return workdir, state


@pytest.mark.parametrize("axes", [None, {"tensor": 4, "data": 2}, {"fsdp": 8}])
def test_restores_on_any_mesh(saved, axes):
    workdir, state = saved
    rules = None if axes is None else rules_of(**axes)
    target = train.abstract_state(MODEL, OPTIMIZER, rules=rules)
    restored, extra = train.Saver(workdir, every=2).restore(MODEL, target)
    assert extra == {"position": 2}
    jax.tree.map(np.testing.assert_array_equal, canonical(restored), canonical(state))
    assert jax.random.key_data(restored.rng).tolist() == jax.random.key_data(state.rng).tolist()
    if rules is not None:
        assert all(jax.tree.leaves(jax.tree.map(lambda a, t: a.sharding == t.sharding, restored, target)))


def test_going_on_is_bit_identical(saved):
    workdir, _ = saved
    rules = rules_of(data=2, fsdp=2, tensor=2)
    step = train.make_train_step(MODEL, OPTIMIZER, rules=rules)
    whole = train.init_state(MODEL, OPTIMIZER, rules=rules, rng=jax.random.key(1))
    for at in (1, 2, 3):
        whole, want = step(whole, batch(at))
    resumed, _ = train.Saver(workdir, every=2).restore(MODEL, train.abstract_state(MODEL, OPTIMIZER, rules=rules))
    resumed, got = step(resumed, batch(3))
    assert float(got["loss"]) == float(want["loss"])
    jax.tree.map(np.testing.assert_array_equal, canonical(resumed), canonical(whole))


def test_the_folder_says_what_it_holds(saved):
    workdir, _ = saved
    folder = workdir / "checkpoints" / "2"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["GPTJForCausalLM"]
    assert modelzoo.GPTJConfig.from_hf(config) == MODEL.config
    assert (folder / "config.gin").read_text() == "x = 1"


def test_errors(saved, tmp_path):
    workdir, state = saved
    with pytest.raises(OSError, match="no checkpoint to restore"):
        train.Saver(tmp_path, every=1).restore(MODEL, state)
    with pytest.raises(OSError, match="no such checkpoint"):
        train.Saver(workdir, every=1).restore(MODEL, state, step=7)
    sgd = train.abstract_state(MODEL, optim.adamw(learning_rate=1e-2).__class__(*optim.optax.sgd(0.1, 0.9)))
    with pytest.raises(ValueError, match="opt_state of another architecture"):
        train.Saver(workdir, every=1).restore(MODEL, sgd)
