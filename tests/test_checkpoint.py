"""Checkpoints are canonical: any mesh writes them, any mesh reads them."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import modelzoo
import parallel
from parallel import checkpoint
from tests.zoo import assert_equal

CONFIG = modelzoo.get_config(
    "tiny-gptj", vocab_size=211, n_embd=32
)  # 211 is a prime: every tensor axis pads it
MODEL = modelzoo.GPTJForCausalLM(CONFIG)


def rules_of(**axes):
    count = int(np.prod(list(axes.values())))
    return parallel.make_rules(parallel.make_mesh(**axes, devices=jax.devices()[:count]))


def shapes_of(model):
    return jax.tree.map(lambda leaf: leaf.shape, modelzoo.abstract_params(model))


def finish(step):
    """Marks a folder as a finished checkpoint, as Orbax does."""
    (step / "params").mkdir(parents=True)
    (step / "commit_success.txt").write_text("")
    return step


@pytest.fixture(scope="module")
def params():
    return parallel.init_params(MODEL, jax.random.key(0))


@pytest.fixture(scope="module")
def step_dir(params, tmp_path_factory):
    """Written from a mesh that pads the vocabulary."""
    sharded = parallel.shard_params(params, MODEL, rules_of(data=2, fsdp=2, tensor=2))
    assert sharded["lm_head"]["kernel"].shape == (32, 212)
    folder = tmp_path_factory.mktemp("run") / "checkpoints" / "3"
    folder.mkdir(parents=True)
    checkpoint.save_tree(folder / "params", sharded, shapes_of(MODEL))
    (folder / "commit_success.txt").write_text("")
    return folder


@pytest.mark.parametrize("axes", [{}, {"tensor": 4}, {"fsdp": 8}, {"data": 2, "tensor": 2}])
def test_opens_bit_equal_on_any_mesh(step_dir, params, axes):
    restored = parallel.restore_params(step_dir, MODEL, rules_of(**axes) if axes else None)
    assert_equal(parallel.unpad_params(restored, MODEL), params)
    if axes == {"tensor": 4}:
        table = restored["trunk"]["embed"]["embedding"]
        assert table.shape == (212, 32)
        assert table.sharding.spec == P("tensor", "fsdp")
        assert not np.any(table[211:])


def test_the_file_holds_true_shapes(step_dir):
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        stored = reader.metadata(step_dir / "params").item_metadata.tree
    assert tuple(stored["trunk"]["embed"]["embedding"].shape) == (211, 32)
    assert tuple(stored["trunk"]["layers"]["mlp"]["fc_in"]["kernel"].shape) == (2, 32, 128)


def test_what_is_cut_is_resharded_not_gathered():
    # 211 rows do not lie over tensor=2, but 32 columns do: nobody holds the whole table.
    rules = rules_of(data=2, fsdp=2, tensor=2)
    table = parallel.init_params(MODEL, jax.random.key(0), rules)["trunk"]["embed"]["embedding"]
    cut = checkpoint.cut(table, (211, 32))
    assert cut.addressable_shards[0].data.shape == (211, 8)
    np.testing.assert_array_equal(cut, np.asarray(table)[:211])
    bias = parallel.init_params(MODEL, jax.random.key(0), rules)["lm_head"]["bias"]
    assert checkpoint.cut(bias, (211,)).addressable_shards[0].data.shape == (211,)  # no other dimension


def test_converts_on_the_way(step_dir, params):
    restored = parallel.restore_params(step_dir, MODEL, dtype=jnp.bfloat16)
    expected = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    assert_equal(restored, expected)


def test_finds_the_newest_that_is_finished(tmp_path):
    folder = tmp_path / "checkpoints"
    for step in (2, 10):
        finish(folder / str(step))
    (folder / "11").mkdir()  # torn: no mark
    (folder / "12.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    for path in (tmp_path, folder, folder / "10", str(tmp_path)):
        assert parallel.latest_checkpoint(path).name == "10"
    assert parallel.latest_checkpoint(folder / "2").name == "2"
    assert checkpoint.finished_steps(folder) == [2, 10]


def test_a_run_folder_is_taken_for_its_newest_checkpoint(step_dir, params):
    restored = parallel.restore_params(step_dir.parent.parent, MODEL)
    assert_equal(restored, params)


def test_another_architecture_is_named_in_the_first_line(step_dir):
    def first_line(model):
        with pytest.raises(ValueError, match="is not a checkpoint of") as error:
            parallel.restore_params(step_dir, model)
        return str(error.value).splitlines()[0]

    wider = modelzoo.GPTJForCausalLM(modelzoo.get_config("tiny-gptj", vocab_size=211, n_embd=32, n_inner=48))
    assert "trunk/layers/mlp/fc_in/kernel is (2, 32, 128), not (2, 32, 48)" in first_line(wider)
    line = first_line(modelzoo.GPTJForQuestionAnswering(CONFIG))
    assert "qa_outputs/kernel is missing" in line
    assert "lm_head/bias is not of the model" in line
    other_vocabulary = modelzoo.GPTJForCausalLM(modelzoo.get_config("tiny-gptj", vocab_size=210, n_embd=32))
    assert "trunk/embed/embedding is (211, 32), not (210, 32)" in first_line(other_vocabulary)


def test_what_is_not_there_is_an_oserror(tmp_path, params):
    with pytest.raises(OSError, match="there is no such folder"):
        parallel.latest_checkpoint(tmp_path / "nowhere")
    with pytest.raises(OSError, match="no finished checkpoint"):
        parallel.restore_params(tmp_path, MODEL)
    with pytest.raises(OSError, match="no checkpoint at"):
        checkpoint.restore_tree(tmp_path / "params", {}, {}, "a model")
    (tmp_path / "params").mkdir()
    with pytest.raises(OSError, match="cannot write"):
        checkpoint.save_tree(tmp_path / "params", params, shapes_of(MODEL))


def test_a_damaged_file_is_an_oserror(step_dir, tmp_path):
    import shutil

    copy = shutil.copytree(step_dir, tmp_path / "3")
    (copy / "params" / "_METADATA").write_text("{")
    with pytest.raises(OSError, match="cannot be read"):
        parallel.restore_params(copy, MODEL)
    copy = shutil.copytree(step_dir, tmp_path / "4")
    (copy / "params" / "manifest.ocdbt").write_bytes(b"")
    with pytest.raises(OSError, match="cannot be read"):
        parallel.restore_params(copy, MODEL)


def test_finding_a_checkpoint_needs_no_orbax(tmp_path):
    finish(tmp_path / "1")
    code = (
        f"import parallel, sys; print(parallel.latest_checkpoint({str(tmp_path)!r})); "
        "assert not any(name.startswith(('orbax', 'tensorstore')) for name in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "1")
