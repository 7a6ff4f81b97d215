"""flax_model.msgpack, whole and in parts, becomes the torch model's tensors."""

import json

import numpy as np
import pytest
from flax import serialization, traverse_util

import modelzoo
from tests.converted import convert, read_config, read_folder
from tests.gptj_names import CONFIG, gptj_arrays
from tests.zoo import assert_equal


def flax_tree(arrays):
    """What transformers' Flax classes hold: kernels turned, scales and embeddings by those names."""
    flat = {}
    for name, array in arrays.items():
        *modules, last = name.split(".")
        if last == "weight":
            last = (
                "embedding"
                if modules[-1] == "wte"
                else "scale"
                if modules[-1].startswith("ln_")
                else "kernel"
            )
        flat[(*modules, last)] = array.T if last == "kernel" else array
    return traverse_util.unflatten_dict(flat)


@pytest.fixture(scope="module")
def arrays():
    return gptj_arrays()


def save(folder, arrays, config=CONFIG):
    folder.mkdir()
    (folder / "flax_model.msgpack").write_bytes(serialization.to_bytes(flax_tree(arrays)))
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "params"])
def test_one_file(tmp_path, arrays, wrapped):
    save(tmp_path / "in", arrays)
    if wrapped:
        tree = {"params": flax_tree(arrays)}
        (tmp_path / "in" / "flax_model.msgpack").write_bytes(serialization.to_bytes(tree))
    convert("flax", tmp_path / "in", tmp_path / "out")
    assert_equal(read_folder(tmp_path / "out"), arrays)
    assert CONFIG.items() <= read_config(tmp_path / "out").items()
    assert type(modelzoo.from_hf(tmp_path / "out")[0]) is modelzoo.GPTJForCausalLM


def test_parts_and_tokenizer_files(tmp_path, arrays):
    folder = tmp_path / "in"
    save(folder, arrays)
    (folder / "flax_model.msgpack").unlink()
    (folder / "vocab.json").write_text("{}")
    flat = traverse_util.flatten_dict(flax_tree(arrays), sep="/")
    parts = {name: f"flax_model-0000{i % 2 + 1}-of-00002.msgpack" for i, name in enumerate(flat)}
    for part in set(parts.values()):
        tree = traverse_util.unflatten_dict({n: a for n, a in flat.items() if parts[n] == part}, sep="/")
        (folder / part).write_bytes(serialization.to_bytes(tree))
    index = folder / "flax_model.msgpack.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    for path, out in ((folder, "out"), (index, "other")):
        convert("flax", path, tmp_path / out)
        assert_equal(read_folder(tmp_path / out), arrays)
        assert (tmp_path / out / "vocab.json").read_text() == "{}"
    (folder / "flax_model-00002-of-00002.msgpack").unlink()
    with pytest.raises(OSError, match="1 of 2 parts are missing: flax_model-00002-of-00002.msgpack"):
        convert("flax", folder, tmp_path / "third")


def test_names_what_is_wrong(tmp_path, arrays):
    save(tmp_path / "in", arrays)
    file = tmp_path / "in" / "flax_model.msgpack"
    tree = flax_tree(arrays)
    tree["lm_head"]["kernel"] = np.ones((2, 3, 4), np.float32)
    file.write_bytes(serialization.to_bytes(tree))
    with pytest.raises(ValueError, match=r"the kernel lm_head/kernel has shape \[2, 3, 4\]"):
        convert("flax", file, tmp_path / "out")
    (tmp_path / "in" / "config.json").unlink()
    with pytest.raises(OSError, match=r"no config\.json beside the weights: pass --config"):
        convert("flax", file, tmp_path / "out")
    file.rename(tmp_path / "in" / "other")
    with pytest.raises(OSError, match=r"no flax_model\.msgpack, nor an index"):
        convert("flax", tmp_path / "in", tmp_path / "out", CONFIG)
    assert not (tmp_path / "out").exists()
