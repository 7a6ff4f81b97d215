"""What a folder would hold, from as much of it as is there."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import modelzoo
from modelzoo import hf, hf_files
from modelzoo.hf_headers import Headers
from tests.hf_folders import LM_HEAD, make_tensors, write


@pytest.fixture(scope="module")
def tensors():
    return make_tensors(**LM_HEAD)


def opened(folder):
    headers = Headers()
    return headers, hf.open_folder(folder, headers=headers)


def same(one, other):
    """The same tensors with the same shapes go into the same parameters."""

    def table(opened):
        return {
            path: [(source.tensor.name, source.ref.shape, source.part) for source in group]
            for path, group in opened.sources.items()
        }

    return table(one) == table(other)


def test_a_config_alone(tmp_path, tensors):
    whole = hf.open_folder(write(tmp_path, tensors))
    (tmp_path / "model.safetensors").unlink()
    headers, alone = opened(tmp_path)
    assert same(whole, alone)
    assert (headers.num_read, headers.num_absent, headers.assumed) == (0, 0, np.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    assert opened(tmp_path)[1].model.param_dtype == jnp.bfloat16
    (tmp_path / "config.json").write_text(json.dumps(config | {"torch_dtype": "int8"}))
    with pytest.raises(ValueError, match=r"config\.json: its torch_dtype 'int8' is no floating-point dtype"):
        opened(tmp_path)


def test_headers_without_their_data(tmp_path, tensors):
    file = write(tmp_path, tensors) / "model.safetensors"
    whole, content = hf.open_folder(tmp_path), file.read_bytes()
    file.write_bytes(content[: 8 + int.from_bytes(content[:8], "little")])
    headers, cut = opened(tmp_path)
    assert same(whole, cut)
    assert (headers.num_read, headers.assumed) == (1, None)
    with pytest.raises(ValueError, match="truncated"):
        modelzoo.from_hf(tmp_path)
    file.write_bytes(content[:100])
    with pytest.raises(ValueError, match="not a sound safetensors file"):
        opened(tmp_path)


def test_an_index_and_some_of_its_files(tmp_path, tensors):
    bare = {name.removeprefix("transformer."): array.astype(np.float16) for name, array in tensors.items()}
    names = list(bare)
    folder = write(tmp_path, {name: bare[name] for name in names[:9]}, "model-1-of-2.safetensors")
    index = {"weight_map": {name: f"model-{1 + (name not in names[:9])}-of-2.safetensors" for name in names}}
    (folder / (hf_files.SAFETENSORS + hf_files.INDEX)).write_text(json.dumps(index))
    headers, some = opened(folder)
    assert (headers.num_read, headers.num_absent, headers.assumed) == (1, 1, np.float32)
    stored = {source.ref.dtype for group in some.sources.values() for source in group}
    assert stored == {np.dtype(np.float16), np.dtype(np.float32)}
    safetensors.numpy.save_file({name: bare[name] for name in names[9:]}, folder / "model-2-of-2.safetensors")
    headers, whole = opened(folder)
    assert same(some, whole)
    assert (headers.num_read, headers.num_absent, headers.assumed) == (2, 0, None)
    del index["weight_map"][names[-1]]  # a tensor that no file has is missed, not assumed
    (folder / "model-2-of-2.safetensors").unlink()
    (folder / (hf_files.SAFETENSORS + hf_files.INDEX)).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="1 missing"):
        opened(folder)
