"""A loss that is no number stops a run, with its state and its batch."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import modelzoo
import train
from tests.zoo import assert_equal
from train import optim
from train.certificate import HashedBatches
from train.halting import Halting

MODEL = modelzoo.GPTJForCausalLM(modelzoo.get_config("tiny-gptj", vocab_size=17, n_embd=32, n_layer=1))
OPTIMIZER = optim.adamw(learning_rate=1e-2)


class Source:
    """Batches of step n; that of `bad` makes the scale of the loss infinite through the model's own weights."""

    def __init__(self):
        self.step = 0

    def __next__(self):
        self.step += 1
        ids = np.random.default_rng(self.step).integers(0, 17, (4, 8)).astype(np.int32)
        return {"input_ids": ids, "labels": ids}

    def get_state(self):
        return self.step

    def set_state(self, state):
        self.step = state


def poison(state):
    """The state with one parameter that is no number, as an overflow leaves it."""
    bias = state.params["lm_head"]["bias"].at[3].set(jnp.nan)
    return state.replace(params={**state.params, "lm_head": {**state.params["lm_head"], "bias": bias}})


@pytest.fixture(scope="module")
def step():
    return train.make_train_step(MODEL, OPTIMIZER, module_norms=True, halt_on_nonfinite=True)


@pytest.mark.long
def test_a_finite_step_is_the_plain_step(step):
    def taken(step):
        # At level 0, the suite's, XLA rounds the same sums of two programs in two ways.
        state, batch = train.init_state(MODEL, OPTIMIZER), next(Source())
        return step.lower(state, batch).compile({"xla_backend_optimization_level": 1})(state, batch)

    ours, metrics = taken(step)
    theirs, _ = taken(train.make_train_step(MODEL, OPTIMIZER))
    assert_equal(ours.params, theirs.params)
    assert int(ours.step) == 1
    parts = {name.partition("/")[2]: float(value) for name, value in metrics.items() if "/" in name}
    assert {"embed", "layers/attention", "layers/mlp", "lm_head"} <= parts.keys()
    assert sum(value**2 for value in parts.values()) == pytest.approx(
        float(metrics["grad_norm"]) ** 2, rel=1e-5
    )


def test_the_state_stays_as_it_was(step):
    state = train.init_state(MODEL, OPTIMIZER)
    state, _ = step(state, next(Source()))
    poisoned = poison(state)
    before = jax.tree.map(np.asarray, (poisoned.params, poisoned.opt_state))
    for _ in range(2):
        poisoned, _ = step(poisoned, next(Source()))
        assert int(poisoned.step) == -2
    assert_equal((poisoned.params, poisoned.opt_state), before)


def test_a_run_stops_with_state_and_batch(step, tmp_path):
    batches = HashedBatches(Source())
    halting = Halting(tmp_path, batches, every=4)
    state = train.init_state(MODEL, OPTIMIZER)
    seen = {}

    def run(saver, state):
        for at in range(1, 20):
            seen[at] = next(batches)
            state, _ = step(poison(state) if at == 6 else state, seen[at])
            halting.check(at, state, seen[at], {"batches": batches.get_state()}, saver)

    with (
        train.Saver(tmp_path, model=MODEL, every=100, batches=batches) as saver,
        pytest.raises(
            ValueError, match=r"step 6: its loss .* the state of step 5 is saved, the batch of step 6"
        ),
    ):
        run(saver, state)
    assert max(seen) == 8  # the next time that it looked
    with train.Saver(tmp_path, model=MODEL, every=100) as saver:
        restored, extra = saver.restore(train.abstract_state(MODEL, OPTIMIZER))
        certified = saver.certificate(5)
    assert (int(restored.step), extra) == (5, {"batches": 5})
    assert len(certified["batches"]["hashes"]) == 5
    kept = np.load(tmp_path / "nonfinite-6.npz")
    np.testing.assert_array_equal(kept["input_ids"], seen[6]["input_ids"])


def test_a_run_that_never_learned_says_so(step, tmp_path):
    batches = HashedBatches(Source())
    halting = Halting(tmp_path, batches, every=4)
    with train.Saver(tmp_path, model=MODEL, every=100) as saver:
        batch = next(batches)
        state, _ = step(poison(train.init_state(MODEL, OPTIMIZER)), batch)
        with pytest.raises(
            ValueError, match=re.escape("step 1: its loss or gradient is not a finite number: nothing was")
        ):
            halting.check(1, state, batch, {}, saver, now=True)
        assert saver.latest_step() is None
