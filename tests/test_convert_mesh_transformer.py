"""mesh-transformer-jax's shards become GPT-J: every array in its place, and one line for what is missing."""

import shutil
import tarfile

import ml_dtypes
import numpy as np
import pytest

import modelzoo
from tests.converted import convert, read_config, read_folder
from tests.gptj_names import CONFIG, gptj_arrays
from tests.mesh_state import save_shards, shards_of

RUN = dict(
    layers=11, d_model=16, n_heads=4, n_vocab=24, pe_rotary_dims=2, seq=16, norm="layernorm", pe="rotary"
)


@pytest.fixture(scope="module")
def arrays():
    return gptj_arrays()


def assert_as(folder, arrays, tolerance):
    have = read_folder(folder)
    assert have.keys() == arrays.keys()
    for name, array in arrays.items():
        assert have[name].shape == array.shape
        np.testing.assert_allclose(have[name].astype(np.float32), array, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("num_shards", [1, 2, 8])
@pytest.mark.parametrize("config", [RUN, CONFIG], ids=["the run's config", "config.json"])
def test_shards(tmp_path, arrays, num_shards, config):
    save_shards(tmp_path / "in" / "step_383500", shards_of(arrays, 11, num_shards))
    convert("mesh-transformer-jax", tmp_path / "in", tmp_path / "out", config)
    assert_as(tmp_path / "out", arrays, 1e-6)  # the biases of shards are sums
    exact = {k: a for k, a in arrays.items() if "fc_out.bias" not in k and "wte" not in k}
    have = read_folder(tmp_path / "out")
    for name, array in exact.items():
        np.testing.assert_array_equal(have[name], array, err_msg=name)
    assert {k: v for k, v in read_config(tmp_path / "out").items() if k in CONFIG} == CONFIG
    model, _ = modelzoo.from_hf(tmp_path / "out")
    assert type(model) is modelzoo.GPTJForCausalLM


def test_raw_bfloat16_and_its_sums(tmp_path, arrays):
    save_shards(tmp_path / "in", shards_of(arrays, 11, 8), ml_dtypes.bfloat16)
    with np.load(tmp_path / "in" / "shard_0" / "0.npz") as file:
        assert file["arr_0"].dtype == np.dtype("V2")
    convert("mesh-transformer-jax", tmp_path / "in", tmp_path / "out", RUN)
    assert {array.dtype for array in read_folder(tmp_path / "out").values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert read_config(tmp_path / "out")["torch_dtype"] == "bfloat16"
    convert("mesh-transformer-jax", tmp_path / "in", tmp_path / "wide", RUN, dtype="float32")
    wide, narrow = read_folder(tmp_path / "wide"), read_folder(tmp_path / "out")
    bias = arrays["transformer.h.3.mlp.fc_out.bias"]
    want = 8 * (bias / 8).astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(wide["transformer.h.3.mlp.fc_out.bias"], want)
    for name, array in wide.items():
        np.testing.assert_array_equal(narrow[name], array.astype(ml_dtypes.bfloat16), err_msg=name)


def test_an_optimizer_comes_before_the_parameters(tmp_path, arrays):
    states = shards_of(arrays, 11, 2)
    for state in states:
        state["opt_state"] = [{"count": np.array(1)}, {"mu": state["params"], "nu": state["params"]}]
    save_shards(tmp_path / "in", states)
    convert("mesh-transformer-jax", tmp_path / "in", tmp_path / "out", RUN)
    assert_as(tmp_path / "out", arrays, 1e-6)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_tar_file(tmp_path, arrays, suffix):
    save_shards(tmp_path / "in" / "step_1", shards_of(arrays, 11, 2))
    with tarfile.open(tmp_path / f"a.tar{suffix}", "w" + suffix.replace(".", ":")) as archive:
        archive.add(tmp_path / "in" / "step_1", "step_1")
    convert("mesh-transformer-jax", tmp_path / f"a.tar{suffix}", tmp_path / "out", RUN)
    assert_as(tmp_path / "out", arrays, 1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"a.tar{suffix}", "in", "out"]


def test_names_what_is_wrong(tmp_path, arrays):
    def refuses(what, config=RUN, path=tmp_path / "in"):
        with pytest.raises((OSError, ValueError), match=what) as error:
            convert("mesh-transformer-jax", path, tmp_path / "out", config)
        assert str(tmp_path) in str(error.value).splitlines()[0]
        assert not (tmp_path / "out").exists()

    save_shards(tmp_path / "in", shards_of(arrays, 11, 4))
    refuses("117 arrays, where 28 layers have 287", None)
    refuses("'pe' = |pe = 't5'; GPT-J has 'rotary'", RUN | {"pe": "t5"})
    refuses("config's seq is None, not a size", {k: v for k, v in RUN.items() if k != "seq"})
    refuses("the config is of model_type 'bloom'", CONFIG | {"model_type": "bloom"})
    refuses("4 shards hold 24 rows of the vocabulary, where the config has 50", RUN | {"n_vocab": 50})
    refuses("4 shards, where the config's cores_per_replica is 8", RUN | {"cores_per_replica": 8})
    shutil.rmtree(tmp_path / "in" / "shard_3")
    refuses("3 shards hold 18 rows of the vocabulary, where the config has 24: shards are missing")
    shutil.rmtree(tmp_path / "in" / "shard_1")
    refuses("1 shards are missing: shard_1")
    (tmp_path / "in" / "shard_0").rename(tmp_path / "in" / "shard_1")
    (tmp_path / "in" / "shard_2").rename(tmp_path / "in" / "shard_0")
    file = tmp_path / "in" / "shard_0" / "5.npz"
    file.write_bytes(file.read_bytes()[:300])
    refuses(r"5\.npz: not a sound \.npz file")
    file.unlink()
    refuses(r"shard_0 has no 5\.npz")
    (tmp_path / "a.tar.zstd").write_bytes(b"\x28\xb5\x2f\xfd1234")
    refuses(r"unpack it first \(tar --zstd -xf\)", path=tmp_path / "a.tar.zstd")
    (tmp_path / "b.tar").write_bytes(b"no tar file")
    refuses("neither a folder nor a sound tar file", path=tmp_path / "b.tar")
    (tmp_path / "empty").mkdir()
    refuses("has no shard_0", path=tmp_path / "empty")


def test_pickled_arrays_are_refused(tmp_path, arrays):
    """numpy can store objects, which are pickles; they are never read."""
    save_shards(tmp_path / "in", shards_of(arrays, 11, 1))
    file = tmp_path / "in" / "shard_0" / "15.npz"
    with np.load(file) as held:
        parts = [held[name] for name in held.files]
    np.savez(file, *[np.array([{}], dtype=object)] * (len(parts) - 1), parts[-1])
    with pytest.raises(ValueError, match="holds Python objects"):
        convert("mesh-transformer-jax", tmp_path / "in", tmp_path / "out", RUN)
    assert not (tmp_path / "out").exists()
