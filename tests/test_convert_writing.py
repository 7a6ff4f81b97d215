"""Writing: only what the class has, nothing half-written, shards with an index."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest

import modelzoo
from modelzoo.convert.checkpoint import Checkpoint, Tensor
from modelzoo.convert.writing import fit, new_folder, write
from tests.converted import read_config, read_folder
from tests.gptj_names import CONFIG, gptj_arrays
from tests.zoo import assert_equal


def lazy(arrays):
    return {
        name: Tensor(name, array.shape, array.dtype, lambda array=array: array)
        for name, array in arrays.items()
    }


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "beside").mkdir()
    return Checkpoint(dict(CONFIG), lazy(gptj_arrays()), tmp_path / "beside")


def save(checkpoint, folder, dtype=None, room=10**9):
    done = []
    folder.mkdir()
    write(checkpoint, folder, dtype, room, done.append)
    return done


def test_fit_keeps_what_the_class_has(checkpoint):
    arrays = gptj_arrays()
    more = arrays | {
        "transformer.h.3.attn.masked_bias": np.ones(1),
        "score.weight": np.ones((2, 16), np.float32),
    }
    fitted = fit(dataclasses.replace(checkpoint, tensors=lazy(more)))
    assert next(iter(fitted.tensors)) == "transformer.wte.weight"
    assert fitted.tensors.keys() == arrays.keys()
    bare = {name.removeprefix("transformer."): array for name, array in arrays.items()}
    assert fit(dataclasses.replace(checkpoint, tensors=lazy(bare))).tensors.keys() == arrays.keys()


@pytest.mark.parametrize("name", ["GPTJModel", "GPTJForCausalLM", "GPTJForSequenceClassification"])
def test_a_config_without_a_class_gets_the_one_that_fits(checkpoint, caplog, name):
    arrays = gptj_arrays()
    if name != "GPTJForCausalLM":
        arrays = {key: array for key, array in arrays.items() if not key.startswith("lm_head.")}
    if name == "GPTJForSequenceClassification":
        arrays["score.weight"] = np.ones((2, 16), np.float32)
    config = {key: value for key, value in CONFIG.items() if key != "architectures"}
    fitted = fit(dataclasses.replace(checkpoint, config=config, tensors=lazy(arrays)))
    assert fitted.config["architectures"] == [name]
    assert not caplog.records  # what the classes that were tried leave out is nobody's concern
    assert len(fitted.tensors) == len(arrays)


def test_fit_names_what_is_wrong(checkpoint):
    def refuses(what, config, arrays):
        with pytest.raises(ValueError, match=what):
            fit(dataclasses.replace(checkpoint, config=config, tensors=lazy(arrays)))

    arrays = gptj_arrays()
    refuses("unknown model_type 'bart': flaxtron has", {"model_type": "bart"}, arrays)
    refuses("unknown architecture 'GPTJForX'", CONFIG | {"architectures": ["GPTJForX"]}, arrays)
    refuses(r"h.0.attn.q_proj.weight is \[16, 16\]", CONFIG | {"n_embd": 32}, arrays)
    refuses(
        "1 missing, such as lm_head.bias", CONFIG, {k: a for k, a in arrays.items() if k != "lm_head.bias"}
    )
    refuses("missing, such as", {k: v for k, v in CONFIG.items() if k != "architectures"}, {})


def test_flax_classes_are_torch_classes(checkpoint):
    config = CONFIG | {"architectures": ["FlaxGPTJForCausalLM"]}
    assert fit(dataclasses.replace(checkpoint, config=config)).config["architectures"] == ["GPTJForCausalLM"]


def test_shards_tokenizer_and_dtype(checkpoint, tmp_path):
    (checkpoint.folder / "tokenizer.json").write_text("{}")
    (checkpoint.folder / "notes.txt").write_text("not copied")
    total = sum(save(checkpoint, tmp_path / "out", np.dtype(ml_dtypes.bfloat16), 8000))
    arrays = gptj_arrays()
    assert total == 2 * sum(array.size for array in arrays.values())
    assert_equal(read_folder(tmp_path / "out"), {k: a.astype(ml_dtypes.bfloat16) for k, a in arrays.items()})
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    assert len(set(index["weight_map"].values())) == len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert read_config(tmp_path / "out")["torch_dtype"] == "bfloat16"
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert not (tmp_path / "out" / "notes.txt").exists()
    assert modelzoo.from_hf(tmp_path / "out")[0].param_dtype == ml_dtypes.bfloat16


def test_new_folder_appears_whole_or_not_at_all(tmp_path):
    output = tmp_path / "a" / "b"

    def fail():
        with new_folder(output) as (unpacked, result):
            (result / "model.safetensors").write_text("half")
            (unpacked / "x").write_text("x")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not list(tmp_path.iterdir())
    with new_folder(output) as (_, result):
        (result / "config.json").write_text("{}")
        assert not output.exists()
    assert [path.name for path in output.iterdir()] == ["config.json"]
    assert [path.name for path in tmp_path.rglob("*") if path.name.startswith(".")] == []


def test_folders_that_exist(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    for name in ("mine.txt", "model.safetensors", "config.json"):
        (tmp_path / "full" / name).write_text("old")
    for name in ("empty", "full"):
        with new_folder(tmp_path / name) as (_, result):
            (result / "config.json").write_text("new")
            (result / "model-00001-of-00001.safetensors").write_text("new")
    assert {path.name for path in (tmp_path / "full").iterdir()} == {
        *("mine.txt", "config.json", "model-00001-of-00001.safetensors")
    }
    assert (tmp_path / "empty" / "config.json").read_text() == (tmp_path / "full" / "config.json").read_text()
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="is a file"), new_folder(tmp_path / "file"):
        pass
