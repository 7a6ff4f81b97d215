"""Bad steps: which are skipped, which halt a run, and how float16's scale follows torch.amp.GradScaler's rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import modelzoo
import train
from tests.zoo import assert_equal, tiny_gptj
from train import guard, optim
from train.guard import StateOptions

MODEL = modelzoo.GPTJForCausalLM(tiny_gptj(n_layer=1))
OPTIMIZER = optim.adamw(learning_rate=1e-2)


def state_of(options, step=0):
    count = jnp.int32(step)
    return train.TrainState(
        params={"w": jnp.float32(step)},
        opt_state=jnp.float32(step),
        step=count,
        rng=jax.random.key(0),
        ema={"w": jnp.float32(step)} if options.ema else None,
        guard=guard.new_guard() if options.guarded else None,
    )


def walk(options, finite, halt=False):
    """The states after steps that were finite or not."""
    states, state = [], state_of(options)

    @jax.jit
    def judge(before, good):
        after = before.replace(
            params={"w": before.params["w"] + 1}, opt_state=before.opt_state + 1, step=before.step + 1
        )
        return guard.judged(before, after, good, options, halt)

    for good in finite:
        state = judge(state, jnp.bool_(good))
        states.append(state)
    return states


def test_steps_that_are_skipped_are_counted_and_change_nothing():
    states = walk(StateOptions(skip_nonfinite=2), [True, False, True, False, False, True], halt=True)
    assert [int(state.step) for state in states] == [1, 2, 3, 4, 5, 6]
    assert [float(state.params["w"]) for state in states] == [1, 1, 2, 2, 2, 3]
    assert [int(state.guard.skipped) for state in states] == [0, 1, 1, 2, 3, 3]
    assert [int(state.guard.in_row) for state in states] == [0, 1, 0, 1, 2, 0]


def test_one_too_many_in_a_row_halts_with_the_state_before_it():
    states = walk(StateOptions(skip_nonfinite=2), [True, False, False, False, True], halt=True)
    assert [int(state.step) for state in states] == [1, 2, 3, -4, -4]
    assert_equal(states[3].guard, states[2].guard)  # as it was before step 4
    assert_equal(states[4].params, {"w": 1.0})


def test_without_halting_every_bad_step_is_skipped():
    states = walk(StateOptions(skip_nonfinite=1), [False, False, False, True])
    assert [int(state.step) for state in states] == [1, 2, 3, 4]
    assert [int(state.guard.skipped) for state in states] == [1, 2, 3, 3]
    assert float(states[-1].params["w"]) == 1


def test_nothing_is_judged_where_nobody_asked():
    (state,) = walk(StateOptions(), [False])
    assert float(state.params["w"]) == 1
    assert state.guard is None


def grad_scaler(start, growth_interval, finite):
    """The scales of torch.amp.GradScaler after each step."""
    scale, streak, scales = start, 0, []
    for good in finite:
        streak = streak + 1 if good else 0
        if not good:
            scale *= 0.5
        elif streak == growth_interval:
            scale, streak = scale * 2.0, 0
        scales.append(scale)
    return scales


def test_the_scale_follows_grad_scaler():
    finite = [True, False, True, True, True, True, False, False, True, True, True, True]
    options = StateOptions(loss_scale=1024.0, loss_scale_growth=3)
    states = walk(options, finite, halt=True)
    found = [float(guard.scale_of(state.guard, options)) for state in states]
    assert found == grad_scaler(1024.0, 3, finite)
    assert [int(state.step) for state in states] == list(range(1, 13))  # an overflow never halts
    assert int(states[-1].guard.skipped) == 3
    assert int(states[-1].guard.in_row) == 0


def test_at_its_least_the_scale_mends_no_more():
    options = StateOptions(loss_scale=4.0)
    states = walk(options, [False] * 4, halt=True)
    assert [int(state.step) for state in states] == [1, 2, -3, -3]
    assert float(guard.scale_of(states[-1].guard, options)) == guard.LEAST_SCALE


def poison(state):
    bias = state.params["lm_head"]["bias"].at[3].set(jnp.nan)
    return state.replace(params={**state.params, "lm_head": {**state.params["lm_head"], "bias": bias}})


def test_a_training_step_in_float16():
    """Its scale moves, its gradients are those of float32 to float16's rounding, and what it skips it reports."""
    model = modelzoo.GPTJForCausalLM(tiny_gptj(n_layer=1), dtype=jnp.float16)
    options = StateOptions(ema=0.9, skip_nonfinite=1, loss_scale=2.0**30, loss_scale_growth=2)
    ids = np.random.default_rng(0).integers(0, 37, (4, 8)).astype(np.int32)
    batch = {"input_ids": ids, "labels": ids}
    step = train.make_train_step(model, OPTIMIZER, options=options, halt_on_nonfinite=True)
    state = train.init_state(model, OPTIMIZER, options=options, rng=jax.random.key(1))
    first = jax.tree.map(np.array, state.params)
    scales, norms = [], []
    for _ in range(24):
        before = jax.tree.map(np.array, (state.params, state.ema))
        state, metrics = step(state, batch)
        scales.append(float(metrics["loss_scale"]))
        norms.append(float(metrics["grad_norm"]))
        if not np.isfinite(norms[-1]):
            assert_equal((state.params, state.ema), before)
    bad = int(np.sum(~np.isfinite(norms)))
    assert 1 <= bad == int(metrics["skipped_steps"])
    assert scales[:2] == [2.0**30, 2.0**29]
    assert max(scales[bad:]) > min(scales)
    assert int(state.step) == 24
    exact = train.make_train_step(MODEL, OPTIMIZER)
    _, metrics = exact(train.init_state(MODEL, OPTIMIZER, params=first), batch)
    assert norms[int(np.argmax(np.isfinite(norms)))] == pytest.approx(float(metrics["grad_norm"]), rel=1e-2)
