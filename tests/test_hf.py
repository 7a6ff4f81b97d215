import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import modelzoo
import parallel
from modelzoo import hf, registry
from tests import torch_files

V, D, L, N = 67, 32, 3, 4
HF_CONFIG = {
    "model_type": "gptj",
    "architectures": ["GPTJForCausalLM"],
    "vocab_size": V,
    "n_positions": 16,
    "n_embd": D,
    "n_layer": L,
    "n_head": N,
    "rotary_dim": 4,
    "n_inner": 48,
    "torch_dtype": "float32",
    "some_field_of_the_future": {"a": 1},
}


def make_tensors(prefix="transformer.", **heads):
    """A GPT-J checkpoint as transformers writes it."""
    rng = np.random.default_rng(0)
    shapes = {"wte.weight": (V, D), "ln_f.weight": (D,), "ln_f.bias": (D,)}
    for i in range(L):
        layer = {"ln_1.weight": (D,), "ln_1.bias": (D,), "mlp.fc_in.weight": (48, D), "mlp.fc_in.bias": (48,)}
        layer |= {"mlp.fc_out.weight": (D, 48), "mlp.fc_out.bias": (D,)}
        layer |= {f"attn.{name}_proj.weight": (D, D) for name in ("q", "k", "v", "out")}
        shapes |= {f"h.{i}.{name}": shape for name, shape in layer.items()}
    shapes = {prefix + name: shape for name, shape in shapes.items()} | heads
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


LM_HEAD = {"lm_head.weight": (V, D), "lm_head.bias": (V,)}


@pytest.fixture(scope="module")
def tensors():
    return make_tensors(**LM_HEAD)


def write(folder, tensors, name="model.safetensors", **hf_config):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps(HF_CONFIG | hf_config))
    if name.endswith("safetensors"):
        safetensors.numpy.save_file(tensors, folder / name)
    else:
        torch_files.save_archive(folder / name, tensors)
    return folder


def check_trunk(params, tensors, prefix="transformer."):
    """The parameters, from the tensors, written out by hand."""

    def layers(name):
        return np.stack([tensors[f"{prefix}h.{i}.{name}.weight"] for i in range(L)])

    got = params["layers"]
    for name, short in (("query", "q"), ("key", "k"), ("value", "v")):
        kernel = layers(f"attn.{short}_proj").reshape(L, N, D // N, D).transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(got["attention"][name]["kernel"], kernel)
    out = layers("attn.out_proj").transpose(0, 2, 1).reshape(L, N, D // N, D)
    np.testing.assert_array_equal(got["attention"]["out"]["kernel"], out)
    np.testing.assert_array_equal(got["mlp"]["fc_in"]["kernel"], layers("mlp.fc_in").transpose(0, 2, 1))
    np.testing.assert_array_equal(got["mlp"]["fc_out"]["kernel"], layers("mlp.fc_out").transpose(0, 2, 1))
    np.testing.assert_array_equal(got["norm"]["scale"], layers("ln_1"))
    np.testing.assert_array_equal(params["embed"]["embedding"][:V], tensors[prefix + "wte.weight"])
    np.testing.assert_array_equal(params["final_norm"]["bias"], tensors[prefix + "ln_f.bias"])


def equal(tree, other):
    same = jax.tree.map(
        lambda a, b: (
            a.dtype == b.dtype and a.shape == b.shape and np.asarray(a).tobytes() == np.asarray(b).tobytes()
        ),
        tree,
        other,
    )
    return all(jax.tree.leaves(same))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_from_hf(tmp_path, tensors, name):
    model, params = modelzoo.from_hf(write(tmp_path, tensors, name))
    assert type(model) is modelzoo.GPTJForCausalLM
    assert (model.config.n_layer, model.config.n_inner, model.config.rotary_dim) == (L, 48, 4)
    assert model.dtype == model.param_dtype == np.float32
    check_trunk(params["trunk"], tensors)
    np.testing.assert_array_equal(params["lm_head"]["kernel"], tensors["lm_head.weight"].T)
    np.testing.assert_array_equal(params["lm_head"]["bias"], tensors["lm_head.bias"])
    shapes = modelzoo.abstract_params(model)
    assert jax.tree.structure(params) == jax.tree.structure(shapes)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a.shape == b.shape, params, shapes)))
    out: Any = model.apply({"params": params}, input_ids=jnp.zeros((1, 4), jnp.int32))
    assert out.logits.shape == (1, 4, V)


MESHES = [
    dict(fsdp=8),
    dict(tensor=4, data=2),
    dict(fsdp=2, tensor=2, data=2),
    dict(stage=1, fsdp=4, tensor=1),
]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_onto_a_mesh_and_back(tmp_path, tensors, sizes):
    folder = write(tmp_path / "in", tensors)
    mesh = parallel.make_mesh(**sizes, devices=jax.devices()[: np.prod(list(sizes.values()))])
    model, params = modelzoo.from_hf(folder, mesh=mesh)
    rules = parallel.make_rules(mesh)
    assert jax.tree.map(lambda a: a.sharding, params) == parallel.param_shardings(model, rules)
    check_trunk(params["trunk"], tensors)
    rows = params["trunk"]["embed"]["embedding"].shape[0]
    assert rows == -(-V // mesh.shape["tensor"]) * mesh.shape["tensor"]
    assert not np.asarray(params["lm_head"]["kernel"])[:, V:].any()
    assert not np.asarray(params["trunk"]["embed"]["embedding"])[V:].any()

    modelzoo.to_hf(model, params, tmp_path / "out")
    again = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert set(again) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(again[name], tensor)


def test_rules_and_mesh_must_agree(tmp_path, tensors, monkeypatch):
    folder = write(tmp_path, tensors)
    one, other = parallel.make_mesh(fsdp=8), parallel.make_mesh(tensor=4, data=2)
    with pytest.raises(ValueError, match="another mesh"):
        modelzoo.from_hf(folder, mesh=one, rules=parallel.make_rules(other))
    _, params = modelzoo.from_hf(folder, rules=parallel.make_rules(other))
    assert params["lm_head"]["bias"].sharding.mesh == other
    with pytest.raises(ValueError, match=r"parameter lm_head/kernel .*'embed' has size 32.*fsdp=3"):
        modelzoo.from_hf(folder, mesh=parallel.make_mesh(fsdp=3, devices=jax.devices()[:3]))
    monkeypatch.setattr(hf, "default_rules", None)
    with pytest.raises(ValueError, match="without rules"):
        modelzoo.from_hf(folder, mesh=one)


def test_dtypes(tmp_path, tensors):
    folder = write(tmp_path, tensors)
    model, params = modelzoo.from_hf(folder, param_dtype=jnp.bfloat16)
    assert model.dtype == model.param_dtype == jnp.bfloat16
    expected = tensors["lm_head.weight"].T.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(params["lm_head"]["kernel"], expected)
    model, params = modelzoo.from_hf(folder, dtype="bfloat16")
    assert (model.dtype, model.param_dtype) == (jnp.bfloat16, jnp.float32)
    assert {a.dtype for a in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    for value in ("int8", "float99", 3):
        with pytest.raises(ValueError, match=r"param_dtype = .*floating-point"):
            modelzoo.from_hf(folder, param_dtype=value)


def test_the_file_decides_the_dtype(tmp_path, tensors):
    half = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    half["transformer.ln_f.bias"] = tensors["transformer.ln_f.bias"]
    half["transformer.h.1.ln_1.bias"] = tensors["transformer.h.1.ln_1.bias"]
    model, params = modelzoo.from_hf(write(tmp_path, half))
    assert model.param_dtype == model.dtype == np.float16
    assert params["lm_head"]["kernel"].dtype == np.float16
    assert params["trunk"]["final_norm"]["bias"].dtype == np.float32
    assert params["trunk"]["layers"]["norm"]["bias"].dtype == np.float32  # one of its layers is


def test_a_trunk_goes_into_a_head_and_back(tmp_path, tensors, caplog):
    bare = make_tensors(prefix="")
    folder = write(tmp_path / "bare", bare, architectures=["GPTJModel"])
    _, base = modelzoo.from_hf(folder)
    check_trunk(base, bare, prefix="")
    with caplog.at_level(logging.WARNING, "modelzoo.hf"):
        model, params = modelzoo.from_hf(folder, "GPTJForSequenceClassification", param_dtype=jnp.bfloat16)
    assert "newly initialised, to be trained: score.weight" in caplog.text
    check_trunk(params["trunk"], {name: t.astype(ml_dtypes.bfloat16) for name, t in bare.items()}, prefix="")
    score = params["score"]["kernel"]
    assert (score.shape, score.dtype) == ((D, 2), jnp.bfloat16)
    assert 0.01 < np.asarray(score, np.float32).std() < 0.03
    again = modelzoo.from_hf(folder, modelzoo.GPTJForSequenceClassification, param_dtype=jnp.bfloat16)[1]
    assert equal(params, again)

    folder = write(tmp_path / "head", tensors)
    model, params = modelzoo.from_hf(folder, modelzoo.GPTJModel)
    assert type(model) is modelzoo.GPTJModel
    check_trunk(params, tensors)


def test_a_new_head_lies_on_the_mesh(tmp_path):
    folder = write(tmp_path, make_tensors(prefix=""), architectures=["GPTJModel"])
    rules = parallel.make_rules(parallel.make_mesh(fsdp=2, tensor=4))
    model, params = modelzoo.from_hf(folder, "GPTJForCausalLM", rules=rules)
    assert jax.tree.map(lambda a: a.sharding, params) == parallel.param_shardings(model, rules)
    kernel = np.asarray(params["lm_head"]["kernel"])
    assert kernel.shape == (D, 68)
    assert not kernel[:, V:].any()
    _, plain = modelzoo.from_hf(folder, "GPTJForCausalLM")
    np.testing.assert_array_equal(kernel[:, :V], plain["lm_head"]["kernel"])
    with parallel.use(rules):
        _, inside = modelzoo.from_hf(folder, "GPTJForCausalLM")
    assert equal(plain, inside)


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


BAD = {
    "model_type": (dict(model_type="llama"), "config.json: unknown model_type 'llama'"),
    "architecture": (dict(architectures=["GPTJForLuck"]), "unknown architecture 'GPTJForLuck'"),
    "value": (dict(n_head=7), "config.json: GPTJConfig.n_embd"),
    "vocabulary": (dict(vocab_size=V + 1), r"transformer\.wte\.weight is \[67, 32\].*\[68, 32\]"),
    "layers": (dict(n_layer=L + 1), "10 missing, such as transformer.h.3"),
    "fewer layers": (dict(n_layer=L - 1), "10 unexpected, such as transformer.h.2"),
}


@pytest.mark.parametrize(("change", "what"), BAD.values(), ids=BAD)
def test_configs_that_do_not_fit(tmp_path, tensors, change, what):
    with pytest.raises(ValueError, match=what) as error:
        modelzoo.from_hf(write(tmp_path, tensors, **change))
    assert str(tmp_path) in str(error.value).splitlines()[0]


def test_nothing_is_read_before_everything_fits(tmp_path, tensors, monkeypatch):
    folder = write(tmp_path, {name: t for name, t in tensors.items() if "wte" not in name})
    monkeypatch.setattr(hf.placing, "read_array", lambda *_: pytest.fail("read"))
    with pytest.raises(ValueError, match="1 missing"):
        modelzoo.from_hf(folder)


def test_wicked_and_broken_files(tmp_path, tensors):
    folder = write(tmp_path, tensors)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1000])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a sound safetensors file.*truncated"):
        modelzoo.from_hf(folder)
    (folder / "model.safetensors").unlink()
    wicked = torch_files.Call(torch_files.Global("posix", "system"), f"touch {tmp_path}/PWNED")
    torch_files.write_archive(folder / "pytorch_model.bin", {"transformer.wte.weight": wicked}, {})
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: its pickle asks for posix\.system"):
        modelzoo.from_hf(folder)
    assert not (tmp_path / "PWNED").exists()
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(OSError, match=r"no model\.safetensors"):
        modelzoo.from_hf(folder)
    (folder / "config.json").unlink()
    with pytest.raises(OSError, match=r"config\.json: no such file"):
        modelzoo.from_hf(folder)


def test_progress_is_shown_on_terminals_alone(tmp_path, tensors, monkeypatch, capsys):
    folder = write(tmp_path, tensors)
    monkeypatch.setattr(hf, "PROGRESS_BYTES", 1)
    modelzoo.from_hf(folder)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    modelzoo.from_hf(folder)
    shown = capsys.readouterr().err
    assert f"loading {folder.name}" in shown
    assert "100" in shown or "/" in shown


MEMORY = """
import sys, jax, modelzoo, parallel
def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
folder, stage, fsdp, tensor = sys.argv[1], *map(int, sys.argv[2:])
mesh = parallel.make_mesh(stage=stage, fsdp=fsdp, tensor=tensor) if fsdp else None
modelzoo.from_hf(folder + "/small", mesh=mesh)  # imports and compiles what a load needs
before = status("VmRSS")
params = jax.block_until_ready(modelzoo.from_hf(folder + "/large", mesh=mesh)[1])
print((status("VmHWM") - before) / sum(a.nbytes for a in jax.tree.leaves(params)))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
@pytest.mark.parametrize("layout", [(1, 0, 0), (2, 2, 2)], ids=str)
def test_memory_is_bounded(tmp_path, layout):
    """Peak host memory over the level before, as a ratio to the checkpoint; the issue allows 1.15 at 2 GB."""
    for name, width in (("small", 64), ("large", 1024)):
        config = modelzoo.get_config("tiny-gptj", n_embd=width, vocab_size=8000, n_head=8, n_layer=4)
        model = modelzoo.GPTJForCausalLM(config)
        params = jax.tree.map(lambda spec: np.zeros(spec.shape, np.float32), modelzoo.abstract_params(model))
        modelzoo.to_hf(model, params, tmp_path / name, max_shard_size="100MB")
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), *map(str, layout)],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.15
