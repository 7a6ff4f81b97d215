"""Steps in which a part trains: only that has gradients and optimizer state, on any mesh."""

import jax
import numpy as np
import pytest

import modelzoo
import parallel
from tests.zoo import assert_close, assert_close_relative, leaves_by_name, random_params, tiny_gptj
from train import optim
from train.state import init_state
from train.step import make_train_step
from train.trained import Trained

FIELDS = dict(n_embd=32, n_head=4, n_inner=48, vocab_size=38)
PLAIN = modelzoo.GPTJForCausalLM(tiny_gptj(**FIELDS))
LORA = modelzoo.Lora(rank=3, alpha=6.0, targets=(".*kernel",), also=".*norm/.*")
MODEL = modelzoo.tuned(PLAIN, modelzoo.Tuning(lora=LORA))
IDS = np.random.default_rng(0).integers(3, 37, (4, 8)).astype(np.int32)
BATCH = {"input_ids": IDS, "labels": IDS}
ADAMW = dict(learning_rate=1e-2, weight_decay=0.1)


def params_of(model):
    params = random_params(model)
    return jax.tree.map_with_path(
        lambda path, leaf: leaf * 0 + 2 if path[-1].key == "scale" and "lora" in str(path) else leaf, params
    )


def run(model, rules=None, steps=2, **options):
    """The state after some steps, as numpy, and the losses."""
    optimizer = optim.adamw(**ADAMW)
    state = init_state(model, optimizer, rules=rules, params=params_of(model))
    step, losses = make_train_step(model, optimizer, rules=rules, **options), []
    for _ in range(steps):
        state, metrics = step(state, BATCH)
        losses.append(float(metrics["loss"]))
    return parallel.unpad_params(jax.tree.map(np.asarray, state.params), model), losses, state


@pytest.fixture(scope="module")
def alone():
    return run(MODEL)


def test_only_what_trains_changes_and_has_state(alone):
    params, losses, state = alone
    trains, before = leaves_by_name(modelzoo.trainable(MODEL)), leaves_by_name(params_of(MODEL))
    changed = {
        name for name, leaf in leaves_by_name(params).items() if not np.array_equal(leaf, before[name])
    }
    assert changed == {name for name, does in trains.items() if does}
    assert losses[1] < losses[0]
    kept = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    assert kept == 1 + 2 * sum(before[name].size for name in changed)


def check_same(alone, rules, **options):
    params, losses, _ = run(MODEL, rules, **options)
    np.testing.assert_allclose(losses, alone[1], rtol=1e-5)
    assert_close_relative(params, alone[0], 1e-4)


def test_on_a_mesh_in_slices(alone):
    mesh = parallel.make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
    check_same(alone, parallel.make_rules(mesh), accumulate=2)


@pytest.mark.long
def test_on_a_pipeline(alone):
    mesh = parallel.make_mesh(stage=2, tensor=2, devices=jax.devices()[:4])
    check_same(alone, parallel.make_rules(mesh), microbatches=2)


def test_what_is_frozen_costs_no_gradient():
    config = tiny_gptj(n_embd=64, n_head=2, n_inner=256, vocab_size=64, n_layer=2)
    plain = modelzoo.GPTJForCausalLM(config)
    lora = modelzoo.Lora(rank=1, alpha=1.0, targets=".*attention/query/kernel")
    ids = jax.ShapeDtypeStruct((8, 32), np.int32)

    def cost(model):
        def loss(part, whole):
            logits = model.apply(
                {"params": Trained(model).join(part, whole)}, input_ids=np.zeros((8, 32), np.int32)
            ).logits
            return logits.sum()

        whole = modelzoo.abstract_params(model)
        lowered = jax.jit(jax.grad(loss)).lower(Trained(model).of(whole), whole)
        return lowered.cost_analysis()["flops"]

    assert ids.shape == (8, 32)
    assert cost(modelzoo.tuned(plain, modelzoo.Tuning(lora=lora))) < 0.75 * cost(plain)


def test_join_and_filled():
    trained = Trained(modelzoo.tuned(PLAIN, modelzoo.Tuning(tune="lm_head/.*")))
    params = params_of(PLAIN)
    part = trained.of(params)
    assert set(leaves_by_name(part)) == {"lm_head/bias", "lm_head/kernel"}
    assert_close(trained.join(part, params), params, 0.0)
    filled = leaves_by_name(trained.filled(part, params))
    assert all(np.any(leaf) == name.startswith("lm_head/") for name, leaf in filled.items())
