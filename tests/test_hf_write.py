"""What `to_hf` writes: every form of parameters, in files that `from_hf` and others read."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import modelzoo
from modelzoo import registry
from tests.hf_folders import LM_HEAD, equal, make_tensors, write


@pytest.fixture(scope="module")
def tensors():
    return make_tensors(**LM_HEAD)


@pytest.mark.parametrize("form", ["stacked", "unstacked", "boxed", "numpy", "listed"])
def test_to_hf_takes_every_form(tmp_path, tensors, form):
    model, params = modelzoo.from_hf(write(tmp_path / "in", tensors))
    if form == "unstacked":
        params = modelzoo.unstack_layers(params)
    elif form == "listed":
        params = modelzoo.unstack_layers(params)
        params["trunk"]["layers"] = list(params["trunk"]["layers"])
    elif form == "boxed":
        params = jax.tree.map(lambda a: nn.LogicallyPartitioned(a, (None,) * a.ndim), params)
    elif form == "numpy":
        params = jax.tree.map(np.asarray, params)
    modelzoo.to_hf(model, params, tmp_path / "out")
    again = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert all(np.array_equal(again[name], tensor) for name, tensor in tensors.items())
    hf_config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert hf_config["architectures"] == ["GPTJForCausalLM"]
    assert hf_config["model_type"] == "gptj"
    assert hf_config["torch_dtype"] == "float32"


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_round_trip_is_bit_equal(tmp_path, dtype):
    rng = np.random.default_rng(0)
    for cls in registry.get_family("gptj").classes:
        labels = 2 if cls.task == "question_answering" else 5
        config = modelzoo.get_config("tiny-gptj", vocab_size=67, num_labels=labels)
        model = cls(config, dtype=dtype, param_dtype=dtype)
        params = jax.tree.map(
            lambda spec: jnp.asarray(rng.standard_normal(spec.shape).astype(dtype)),
            modelzoo.abstract_params(model),
        )
        modelzoo.to_hf(model, params, tmp_path, max_shard_size="100KB")
        again, loaded = modelzoo.from_hf(tmp_path)
        assert again == model
        assert equal(params, loaded)


def test_shards_and_their_index(tmp_path, tensors):
    model, params = modelzoo.from_hf(write(tmp_path / "in", tensors))
    out = tmp_path / "out"
    modelzoo.to_hf(model, params, out, max_shard_size=20_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 2
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for name in files:
        held = safetensors.numpy.load_file(out / name)
        assert sum(tensor.nbytes for tensor in held.values()) <= 20_000
        for tensor, array in held.items():
            assert index["weight_map"][tensor] == name
            np.testing.assert_array_equal(array, tensors[tensor])
    assert equal(modelzoo.from_hf(out)[1], params)
    modelzoo.to_hf(model, params, out)  # in one file now: nothing of the parts stays
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]


def test_to_hf_over_the_folder_it_came_from(tmp_path, tensors):
    model, params = modelzoo.from_hf(write(tmp_path, tensors))
    params["lm_head"]["bias"] = params["lm_head"]["bias"] + 1
    modelzoo.to_hf(model, params, tmp_path)
    assert equal(modelzoo.from_hf(tmp_path)[1], params)


def test_only_the_first_process_writes(tmp_path, tensors, monkeypatch):
    model, params = modelzoo.from_hf(write(tmp_path / "in", tensors))
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    modelzoo.to_hf(model, params, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_to_hf_refuses_what_is_not_the_model(tmp_path, tensors):
    model, params = modelzoo.from_hf(write(tmp_path / "in", tensors))
    with pytest.raises(ValueError, match=r"trunk\.layers.* is missing"):
        modelzoo.to_hf(model, {"lm_head": params["lm_head"]}, tmp_path / "out")
    with pytest.raises(ValueError, match="max_shard_size"):
        modelzoo.to_hf(model, params, tmp_path / "out", max_shard_size="many")
    with pytest.raises(OSError, match="cannot write to"):
        modelzoo.to_hf(model, params, tmp_path / "in" / "config.json")
    assert not (tmp_path / "out").exists()
