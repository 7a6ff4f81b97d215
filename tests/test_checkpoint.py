"""Checkpoints are canonical: any mesh writes them, any mesh reads them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import modelzoo
import parallel
from parallel import checkpoint

CONFIG = modelzoo.get_config("tiny-gptj", vocab_size=211, n_layer=2, n_embd=32)  # 211 is a prime: every mesh pads it
MODEL = modelzoo.GPTJForCausalLM(CONFIG)


def rules_of(**axes):
    count = int(np.prod(list(axes.values())))
    return parallel.make_rules(parallel.make_mesh(**axes, devices=jax.devices()[:count]))


def save(folder, params, step=1, keep=None):
    store = checkpoint.Checkpoints(folder, keep)
    store.save(step, MODEL, {"params": params}, {"position": 7}, {"note.txt": "hello"})
    store.close()
    return folder / str(step)


@pytest.fixture(scope="module")
def params():
    return parallel.init_params(MODEL, jax.random.key(0))


@pytest.fixture(scope="module")
def written(params, tmp_path_factory):
    """Written from a mesh that pads the vocabulary."""
    sharded = parallel.shard_params(params, MODEL, rules_of(data=2, fsdp=2, tensor=2))
    assert sharded["lm_head"]["kernel"].shape == (32, 212)
    return save(tmp_path_factory.mktemp("run") / "checkpoints", sharded)


@pytest.mark.parametrize("axes", [{}, {"tensor": 4}, {"fsdp": 8}, {"data": 2, "tensor": 2}])
def test_opens_bit_equal_on_any_mesh(written, params, axes):
    rules = rules_of(**axes) if axes else None
    restored = parallel.restore_params(written, MODEL, rules)
    if axes.get("tensor") == 4:
        table = restored["trunk"]["embed"]["embedding"]
        assert table.shape == (212, 32)
        assert table.sharding.spec == jax.sharding.PartitionSpec("tensor", "fsdp")
        assert not np.any(table[211:])
    jax.tree.map(np.testing.assert_array_equal, parallel.unpad_params(restored, MODEL), params)


def test_holds_true_shapes_texts_and_extra(written):
    stored = checkpoint.ocp.PyTreeCheckpointHandler().metadata(checkpoint.epath.Path(written) / "params").tree
    assert tuple(stored["trunk"]["embed"]["embedding"].shape) == (211, 32)
    assert (written / "note.txt").read_text() == "hello"
    assert checkpoint.read_extra(written) == {"position": 7}


def test_converts_on_the_way(written):
    restored = parallel.restore_params(written, MODEL, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(restored)} == {jnp.dtype(jnp.bfloat16)}


def test_arrays_may_be_overwritten_once_save_returns(params, tmp_path):
    wiped = jax.jit(lambda tree: jax.tree.map(lambda a: a * 0 - 1, tree), donate_argnums=0)
    store = checkpoint.Checkpoints(tmp_path)
    mine = jax.tree.map(jnp.copy, params)
    store.save(3, MODEL, {"params": mine}, {}, {})
    wiped(mine)
    store.close()
    jax.tree.map(np.testing.assert_array_equal, parallel.restore_params(tmp_path / "3", MODEL), params)


def test_keeps_the_newest_and_finds_them(params, tmp_path):
    for step in (1, 2, 10):
        save(tmp_path / "checkpoints", params, step, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["10", "2"]
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "10"):
        assert parallel.latest_checkpoint(path).name == "10"


def test_a_torn_checkpoint_is_not_the_latest(written, tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "1").symlink_to(written)
    (folder / "2.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    (folder / "3").mkdir()
    assert parallel.latest_checkpoint(tmp_path).name == "1"


def test_another_architecture_is_named(written):
    wider = modelzoo.GPTJForCausalLM(modelzoo.get_config("tiny-gptj", vocab_size=211, n_embd=32, n_inner=48))
    with pytest.raises(ValueError, match=re.escape("trunk/layers/mlp/fc_in/kernel has shape (2, 32, 128), not (2, 32, 48)")):
        parallel.restore_params(written, wider)
    with pytest.raises(ValueError, match=r"qa_outputs/kernel is missing.*lm_head/bias is not the model's"):
        parallel.restore_params(written, modelzoo.GPTJForQuestionAnswering(CONFIG))


def test_what_is_not_there_is_an_oserror(written, tmp_path):
    with pytest.raises(OSError, match="no such folder"):
        parallel.latest_checkpoint(tmp_path / "nowhere")
    with pytest.raises(OSError, match="no checkpoint in it"):
        parallel.latest_checkpoint(tmp_path)
    with pytest.raises(OSError, match="has no 'opt_state'"):
        checkpoint.restore(written, "opt_state", {}, MODEL)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot make the checkpoint folder"):
        checkpoint.Checkpoints(tmp_path / "file" / "checkpoints")
