"""A run's state comes back as it was, on any mesh, and a run that was cut goes on as if it had not been."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import modelzoo
import parallel
import train
from tests.zoo import assert_equal
from train import optim

CONFIG = modelzoo.get_config("tiny-gptj", vocab_size=211, n_embd=32, attn_pdrop=0.1)
MODEL = modelzoo.GPTJForCausalLM(CONFIG)
OPTIMIZER = optim.adamw(learning_rate=1e-2)


def batch(seed):
    ids = np.random.default_rng(seed).integers(0, 211, (8, 12)).astype(np.int32)
    return {"input_ids": ids, "labels": ids}


def rules_of(**axes):
    return parallel.make_rules(parallel.make_mesh(**axes))


def canonical(state):
    """Everything a state holds, at its true size, on the host."""
    unpad = [
        parallel.unpad_params(tree, MODEL) for tree in (state.params, state.opt_state.mu, state.opt_state.nu)
    ]
    return jax.tree.map(
        np.asarray, (*unpad, state.opt_state.count, state.step, jax.random.key_data(state.rng))
    )


def assert_same(a, b):
    assert_equal(canonical(a), canonical(b))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(workdir, the states after steps 0 to 4): saved every 2 steps on a mesh that pads the vocabulary."""
    workdir = tmp_path_factory.mktemp("run")
    rules = rules_of(data=2, fsdp=2, tensor=2)
    state = train.init_state(MODEL, OPTIMIZER, rules=rules, rng=jax.random.key(1))
    step = train.make_train_step(MODEL, OPTIMIZER, rules=rules)
    states = [jax.tree.map(jnp.copy, state)]
    texts = {"config.gin": "x = 1\n"}
    with train.Saver(workdir, model=MODEL, every=2, keep=2, texts=texts) as saver:
        assert saver.latest_step() is None
        for at in (1, 2, 3, 4):
            state, _ = step(state, batch(at))
            states.append(jax.tree.map(jnp.copy, state))
            # `state` is overwritten by the next step while this is being written.
            assert saver.maybe_save(at, state, {"position": at}) == (at % 2 == 0)
        assert not saver.maybe_save(4, state, force=True)  # it is being saved already
    return workdir, states


@pytest.mark.parametrize("axes", [None, {"tensor": 4, "data": 2}, {"fsdp": 8}])
def test_restores_on_any_mesh(run, axes):
    workdir, states = run
    rules = None if axes is None else rules_of(**axes)
    target = train.abstract_state(MODEL, OPTIMIZER, rules=rules)
    with train.Saver(workdir, model=MODEL, every=2) as saver:
        for step in (2, 4):
            restored, extra = saver.restore(target, step)
            assert extra == {"position": step}
            assert_same(restored, states[step])
        assert saver.restore(target)[0].step == 4
    if rules is not None:
        assert jax.tree.all(jax.tree.map(lambda a, t: a.sharding == t.sharding, restored, target))


def test_cut_and_resumed_is_the_run_that_was_not_cut(run):
    workdir, states = run
    rules = rules_of(data=2, fsdp=2, tensor=2)
    step = train.make_train_step(MODEL, OPTIMIZER, rules=rules)
    with train.Saver(workdir, model=MODEL, every=2) as saver:
        state, _ = saver.restore(train.abstract_state(MODEL, OPTIMIZER, rules=rules), 2)
    for at in (3, 4):
        state, _ = step(state, batch(at))
        assert_same(state, states[at])


def test_the_folder_says_what_it_holds(run):
    workdir, _ = run
    folder = parallel.latest_checkpoint(workdir)
    assert folder == workdir / "checkpoints" / "4"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["GPTJForCausalLM"]
    assert modelzoo.GPTJConfig.from_hf(config) == CONFIG
    assert (folder / "config.gin").read_text() == "x = 1\n"


def test_inference_reads_the_parameters_alone(run):
    workdir, states = run
    params = parallel.restore_params(workdir, MODEL)
    expected = parallel.unpad_params(states[4].params, MODEL)
    assert_equal(params, expected)


@pytest.fixture(scope="module")
def small():
    """A state on one device."""
    return train.init_state(MODEL, OPTIMIZER)


def test_keeps_the_newest(small, tmp_path):
    with train.Saver(tmp_path, model=MODEL, every=1, keep=2) as saver:
        for at in (1, 2, 3, 10):
            assert saver.maybe_save(at, small)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["10", "3"]


def test_an_unfinished_folder_is_set_aside_and_hinders_nothing(small, tmp_path):
    torn = tmp_path / "checkpoints" / "7" / "params"
    torn.mkdir(parents=True)
    with pytest.warns(UserWarning, match=r"checkpoints/7 is unfinished: set aside as 7\.unfinished"):
        saver = train.Saver(tmp_path, model=MODEL, every=1, keep=1)
    with saver:
        assert saver.latest_step() is None
        saver.maybe_save(5, small)
        saver.maybe_save(6, small)
    assert parallel.latest_checkpoint(tmp_path).name == "6"


def test_a_restored_key_keeps_its_kind(tmp_path):
    state = train.init_state(MODEL, OPTIMIZER, rng=jax.random.key(3, impl="rbg"))
    with train.Saver(tmp_path, model=MODEL, every=1) as saver:
        saver.maybe_save(1, state)
        saver._manager.wait_until_finished()
        restored, _ = saver.restore(state)
    assert restored.rng.dtype == state.rng.dtype
    assert jnp.array_equal(jax.random.key_data(restored.rng), jax.random.key_data(state.rng))


def test_errors(run, small, tmp_path):
    workdir, _ = run
    with (
        train.Saver(tmp_path, model=MODEL, every=1) as saver,
        pytest.raises(OSError, match="no checkpoint in"),
    ):
        saver.restore(small)
    with train.Saver(workdir, model=MODEL, every=1) as saver:
        with pytest.raises(OSError, match="no checkpoint of step 7"):
            saver.restore(small, step=7)
        sgd = train.abstract_state(MODEL, optax.sgd(0.1, momentum=0.9))
        with pytest.raises(
            ValueError, match=r"not a checkpoint of GPTJForCausalLM with this optimizer: .*missing"
        ):
            saver.restore(sgd)
    wider = modelzoo.GPTJForCausalLM(modelzoo.get_config("tiny-gptj", vocab_size=211, n_embd=32, n_inner=48))
    with (
        train.Saver(workdir, model=wider, every=1) as saver,
        pytest.raises(ValueError, match=r"mlp/fc_in/kernel is \(2, 32, 128\), not \(2, 32, 48\)"),
    ):
        saver.restore(train.abstract_state(wider, OPTIMIZER))
    for wrong in ({"every": 0}, {"every": 1, "keep": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            train.Saver(tmp_path, model=MODEL, **wrong)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write checkpoints to"):
        train.Saver(tmp_path / "file", model=MODEL, every=1)


def test_a_save_that_fails_says_so(small, tmp_path):
    saver = train.Saver(tmp_path, model=MODEL, every=1)
    (tmp_path / "checkpoints").rename(tmp_path / "gone")
    (tmp_path / "checkpoints").write_text("a file where the folder was")

    def save():
        with saver:
            saver.maybe_save(1, small)

    with pytest.raises(OSError, match=r"saving .* failed"):
        save()


def test_the_best_stays(small, tmp_path):
    values = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5, 5: float("nan")}
    with train.Saver(tmp_path, model=MODEL, every=10, keep=1, keep_best="loss") as saver:
        for at, value in values.items():
            assert saver.maybe_save(at, small, values={"loss": value}) == (at <= 2)
        saver.maybe_save(10, small)
        assert saver.best == (2, 1.0)
        with pytest.raises(ValueError, match=r"train\.keep_best = 'loss': what is measured is accuracy, f1"):
            saver.maybe_save(11, small, values={"f1": 1.0, "accuracy": 1.0})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["10", "2"]
    with train.Saver(tmp_path, model=MODEL, every=10, keep=1, keep_best="loss") as saver:
        saver.restore(small)
        assert saver.best == (2, 1.0)
    with train.Saver(tmp_path / "f1", model=MODEL, every=10, keep_best="f1") as saver:
        assert [saver.maybe_save(at, small, values={"eval_f1": at / 9}) for at in (1, 2)] == [True, True]


DISK = """
import resource, signal, sys, warnings
import jax, modelzoo, train
model = modelzoo.GPTJForCausalLM(modelzoo.get_config("tiny-gptj", vocab_size=211, n_embd=32))
state = train.init_state(model, train.optim.adamw())
warnings.simplefilter("always")
def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
saver = train.Saver(sys.argv[1], model=model, every=1, keep=1)
saver.maybe_save(1, state)
saver._manager.wait_until_finished()
limit(20_000)
saver.maybe_save(2, state)
print(saver.maybe_save(3, state), saver.latest_step(), flush=True)
limit(resource.RLIM_INFINITY)
saver.maybe_save(4, state)
saver._manager.wait_until_finished()
print(saver.latest_step(), flush=True)
limit(20_000)
saver.maybe_save(5, state)
try:
    saver.close()
except OSError as error:
    print(error)
"""


def test_a_full_disk_costs_no_checkpoint(tmp_path):
    command = [sys.executable, "-W", "always", "-c", "import train.optim\n" + DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].endswith(" 1"), done.stdout  # the first checkpoint is still there
    assert lines[1] == "4"
    assert "saving step 5" in lines[2]
    assert "failed" in lines[2]
    assert lines[2].endswith("step 4 is saved")
    assert "saving step 2" in done.stderr
    assert "the run goes on, step 1 is saved" in done.stderr
    # A thread that had not failed yet may write after the rest was removed: the next run removes that.
    with train.Saver(tmp_path, model=MODEL, every=1):
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["4"]


def test_a_state_that_is_not_what_was_saved_is_refused(small, tmp_path):
    with train.Saver(tmp_path, model=MODEL, every=1) as saver:
        saver.maybe_save(1, small)
    file = tmp_path / "checkpoints" / "1" / "run" / "run.json"
    told = json.loads(file.read_text())
    told["certificate"]["state"]["params.lm_head.bias"] = "0" * 16
    file.write_text(json.dumps(told))
    with (
        train.Saver(tmp_path, model=MODEL, every=1, read_only=True) as saver,
        pytest.raises(OSError, match=r"params\.lm_head\.bias is not as it was saved \(1 tensors"),
    ):
        saver.restore(small)
