"""pytorch_model.bin in all its forms becomes safetensors, without what is no parameter."""

import json

import numpy as np
import pytest

import modelzoo
from modelzoo.convert.torch_bin import config_beside
from tests import torch_files
from tests.converted import convert, read_folder
from tests.gptj_names import CONFIG, gptj_arrays
from tests.zoo import assert_equal


@pytest.fixture(scope="module")
def arrays():
    return gptj_arrays()


def save(folder, arrays, name="pytorch_model.bin", write=torch_files.save_archive, **config):
    folder.mkdir(exist_ok=True)
    write(folder / name, arrays)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))


@pytest.mark.parametrize("write", [torch_files.save_archive, torch_files.save_stream])
def test_a_folder(tmp_path, arrays, write):
    buffers = {"transformer.h.0.attn.bias": np.ones((1, 1, 4, 4), np.uint8)}
    save(tmp_path / "in", arrays | buffers, write=write)
    convert("torch", tmp_path / "in", tmp_path / "out")
    assert_equal(read_folder(tmp_path / "out"), arrays)
    assert type(modelzoo.from_hf(tmp_path / "out")[0]) is modelzoo.GPTJForCausalLM


def test_a_bare_file_and_a_config(tmp_path, arrays):
    save(tmp_path / "in", arrays, "step_100.bin")
    (tmp_path / "in" / "config.json").unlink()
    with pytest.raises(OSError, match="pass --config"):
        convert("torch", tmp_path / "in" / "step_100.bin", tmp_path / "out")
    convert("torch", tmp_path / "in" / "step_100.bin", tmp_path / "out", CONFIG)
    assert_equal(read_folder(tmp_path / "out"), arrays)


def test_parts(tmp_path, arrays):
    names = {name: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, name in enumerate(arrays)}
    for part in set(names.values()):
        save(tmp_path / "in", {n: a for n, a in arrays.items() if names[n] == part}, part)
    index = tmp_path / "in" / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    convert("torch", tmp_path / "in", tmp_path / "out")
    assert_equal(read_folder(tmp_path / "out"), arrays)


def test_the_folder_itself_may_be_the_output(tmp_path, arrays):
    save(tmp_path / "in", arrays)
    convert("torch", tmp_path / "in", tmp_path / "in")
    assert_equal(read_folder(tmp_path / "in"), arrays)
    assert (tmp_path / "in" / "pytorch_model.bin").exists()


def test_code_is_refused(tmp_path):
    save(tmp_path / "in", {})
    wicked = {"w": torch_files.Call(torch_files.Global("posix", "system"), "touch PWNED")}
    torch_files.write_archive(tmp_path / "in" / "pytorch_model.bin", wicked, {})
    with pytest.raises(ValueError, match=r"posix\.system"):
        convert("torch", tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_config_beside(tmp_path):
    assert config_beside(tmp_path, {"a": 1}) == {"a": 1}
    (tmp_path / "config.json").write_text('{"b": 2}')
    assert config_beside(tmp_path, None) == {"b": 2}
