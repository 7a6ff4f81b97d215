"""What a state holds beside parameters and moments: saved, read on another mesh, new to a run, or left out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import modelzoo
import parallel
import train
from tests.zoo import assert_close, assert_equal
from train import canonical, optim
from train.guard import StateOptions

MODEL = modelzoo.GPTJForCausalLM(modelzoo.get_config("tiny-gptj", vocab_size=211, n_embd=32))
OPTIMIZER = optim.adamw(learning_rate=1e-2)
OPTIONS = StateOptions(ema=0.9, skip_nonfinite=3, loss_scale=64.0)


def rules_of(**axes):
    return parallel.make_rules(parallel.make_mesh(**axes))


def on_disk(state):
    return {
        name: np.asarray(array)[tuple(map(slice, shape))]
        for name, (array, shape) in canonical.leaves_of(MODEL, state).items()
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder, state) of a run that keeps everything, on a mesh that pads the vocabulary, and of a plain one."""
    found = []
    for options in (OPTIONS, StateOptions()):
        workdir = tmp_path_factory.mktemp("run")
        rules = rules_of(data=2, fsdp=2, tensor=2)
        state = train.init_state(MODEL, OPTIMIZER, rules=rules, options=options)
        if state.ema is not None:
            state = state.replace(
                ema=jax.tree.map(lambda a: 2 * a, state.ema),
                guard=state.guard.replace(skipped=state.guard.skipped + 5, scale=state.guard.scale + 32),
            )
        with train.Saver(workdir, model=MODEL, every=1) as saver:
            saver.maybe_save(1, state)
        found.append((workdir, state))
    return found


def read(workdir, options, rules=None):
    saver = train.Saver(workdir, model=MODEL, every=1, read_only=True)
    return saver.restore(train.abstract_state(MODEL, OPTIMIZER, rules=rules, options=options))[0]


@pytest.mark.parametrize("axes", [None, {"fsdp": 8}])
def test_read_on_another_mesh(runs, axes):
    workdir, state = runs[0]
    restored = read(workdir, OPTIONS, None if axes is None else rules_of(**axes))
    assert_equal(on_disk(restored), on_disk(state))


def test_what_is_new_to_a_run_begins(runs):
    workdir, state = runs[1]
    restored = read(workdir, OPTIONS)
    assert_equal(restored.ema, restored.params)
    assert_equal(restored.guard, jax.tree.map(jnp.zeros_like, restored.guard))
    assert_equal(restored.params, parallel.unpad_params(state.params, MODEL))


def test_what_a_run_has_no_use_for_is_left_out(runs):
    workdir, state = runs[0]
    restored = read(workdir, StateOptions())
    assert restored.ema is None
    assert restored.guard is None
    assert_equal(restored.params, parallel.unpad_params(state.params, MODEL))


def test_inference_takes_the_average_unless_told_otherwise(runs):
    workdir, state = runs[0]
    params = parallel.unpad_params(state.params, MODEL)
    assert_close(parallel.restore_params(workdir, MODEL), jax.tree.map(lambda a: 2 * a, params), 1e-7)
    assert_equal(parallel.restore_params(workdir, MODEL, average=False), params)
    assert_equal(parallel.restore_params(runs[1][0], MODEL), parallel.unpad_params(runs[1][1].params, MODEL))
