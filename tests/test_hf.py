import logging
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import inference
import modelzoo
import parallel
from modelzoo import hf
from tests import torch_files
from tests.hf_folders import LM_HEAD, D, L, N, V, equal, make_tensors, write


@pytest.fixture(scope="module")
def tensors():
    return make_tensors(**LM_HEAD)


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
# Layers of their own are put together like stacked ones.
params = jax.block_until_ready(modelzoo.from_hf(folder + "/large", mesh=mesh, unstack=bool(mesh))[1])
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


@pytest.mark.parametrize("mesh", [None, dict(fsdp=2, tensor=4)], ids=str)
def test_layers_of_their_own_and_int8_on_the_way_in(tmp_path, tensors, mesh, monkeypatch):
    folder = write(tmp_path, tensors)
    rules = mesh and parallel.make_rules(parallel.make_mesh(**mesh))
    _, stacked = modelzoo.from_hf(folder, rules=rules)
    model, layers = modelzoo.from_hf(folder, rules=rules, unstack=True)
    want = modelzoo.unstack_layers(stacked)
    assert jax.tree.structure(layers) == jax.tree.structure(want)
    assert equal(layers, want)

    whole: list[Any] = []  # in full precision, while the next is read
    read = hf.placing.read_array

    def spy(*args):
        whole.append(weakref.ref(array := read(*args)))
        return array

    monkeypatch.setattr(hf.placing, "read_array", spy)
    largest = []
    turn = hf.quantizing.quantize_array

    def count(array, shared):
        alive = [ref() for ref in whole]
        largest.append(
            sum(a.nbytes for a in alive if a is not None and a.ndim > 1 and a.shape[0] not in (V, V + 1))
        )
        return turn(array, shared)

    monkeypatch.setattr(hf.quantizing, "quantize_array", count)
    _, packed = modelzoo.from_hf(folder, rules=rules, quantize="int8")
    assert max(largest) == 68 * D * 4 if mesh else V * D * 4  # one array at a time: the head's is the largest
    monkeypatch.undo()
    expected = inference.prepare(model, stacked, rules, quantize="int8")
    assert jax.tree.structure(packed) == jax.tree.structure(expected)
    assert equal(packed, expected)
    assert all(
        jax.tree.leaves(
            jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), packed, expected)
        )
    )
    with pytest.raises(ValueError, match="quantize = 'fp8'"):
        modelzoo.from_hf(folder, quantize="fp8")
    with pytest.raises(ValueError, match=r"to write: 7 are in int8, such as \S+: write the parameters"):
        modelzoo.to_hf(model, packed, tmp_path / "out")
