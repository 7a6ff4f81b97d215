"""Converted checkpoints against the models that they were made from, opened by transformers (torch)."""

import argparse
import contextlib
import json
import warnings
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import modelzoo
from modelzoo.convert import convert_checkpoint
from tests import megatron_state as megatron
from tests.converted import read_folder
from tests.mesh_state import save_shards, shards_of
from tests.parity import cases, pairs

SIZES = {
    "gptj": dict(vocab_size=64, n_positions=32, n_embd=32, n_layer=11, n_head=8, rotary_dim=2),
    "bloom": dict(vocab_size=61, hidden_size=24, n_layer=2, n_head=3),
    "roberta": dict(
        vocab_size=61,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=37,
        max_position_embeddings=40,
        type_vocab_size=1,
    ),
}
CONFIGS = {"gptj": "GPTJConfig", "bloom": "BloomConfig", "roberta": "RobertaConfig"}
FLAX = [name for name in cases.CLASSES if hasattr(transformers, f"Flax{name}")]


def torch_model(name, dtype=torch.float32, **changes):
    """A model none of whose tensors is constant: a swap of two would show."""
    torch.manual_seed(0)
    family = next(family for family in SIZES if name.lower().startswith(family))
    config = getattr(transformers, CONFIGS[family])(**(SIZES[family] | changes))
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model.to(dtype).eval()


def open_both(folder):
    """The folder's model in torch and in ours; nothing may be missing or unexpected."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, name).from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", torch_dtype="auto"
    )
    assert not any(info.values()), info
    return model.eval(), modelzoo.from_hf(folder) if hasattr(modelzoo, name) else None


@contextlib.contextmanager
def transformers_flax():
    """Under which its deprecated classes run: they warn, mix dtypes, and use a name that jax has dropped."""
    with (
        warnings.catch_warnings(),
        jax.numpy_dtype_promotion("standard"),
        mock.patch.object(jnp, "cat", jnp.concatenate, create=True),
    ):
        warnings.simplefilter("ignore")
        yield


def assert_same_state(model, other):
    have, want = model.state_dict(), other.state_dict()
    assert have.keys() == want.keys()
    for name, tensor in want.items():
        assert have[name].dtype == tensor.dtype
        assert torch.equal(have[name], tensor), name


@pytest.mark.parametrize("parts", [False, True], ids=["one file", "parts"])
@pytest.mark.parametrize("name", FLAX)
def test_flax(tmp_path, name, parts):
    """What transformers' Flax classes save, against the torch model that they were made from."""
    source = pairs.torch_model(name, cases.cases_of(name).configs[cases.titles(name)[0]])
    source.save_pretrained(tmp_path / "torch")
    with transformers_flax():
        flax = getattr(transformers, f"Flax{name}").from_pretrained(tmp_path / "torch", from_pt=True)
        flax.save_pretrained(tmp_path / "flax", max_shard_size="20KB" if parts else "5GB")
    assert (tmp_path / "flax" / "flax_model.msgpack.index.json").exists() == parts
    convert_checkpoint("flax", tmp_path / "flax", tmp_path / "out")
    model, ours = open_both(tmp_path / "out")
    assert_same_state(model, source)
    assert type(ours[0]).__name__ == name


def test_flax_bfloat16(tmp_path):
    source = torch_model("RobertaForMaskedLM")
    source.save_pretrained(tmp_path / "torch")
    with transformers_flax():
        flax = transformers.FlaxRobertaForMaskedLM.from_pretrained(tmp_path / "torch", from_pt=True)
        flax.save_pretrained(tmp_path / "flax", params=flax.to_bf16(flax.params))
    convert_checkpoint("flax", tmp_path / "flax", tmp_path / "out")
    assert_same_state(open_both(tmp_path / "out")[0], source.to(torch.bfloat16))


@pytest.mark.parametrize("form", ["bin", "stream", "parts", "bare"])
@pytest.mark.parametrize("name", ["GPTJForCausalLM", "BloomForCausalLM", "RobertaForMaskedLM"])
def test_torch(tmp_path, name, form):
    """Tied copies, which a .bin holds as well, are written once."""
    source = torch_model(name, torch.bfloat16)
    folder, config, path = tmp_path / "in", None, tmp_path / "in"
    if form == "parts":
        source.save_pretrained(folder, safe_serialization=False, max_shard_size="20KB")
    else:
        source.config.architectures = [name]
        source.config.save_pretrained(folder)
        path = folder / "weights.bin" if form == "bare" else folder / "pytorch_model.bin"
        torch.save(source.state_dict(), path, _use_new_zipfile_serialization=form != "stream")
    if form == "bare":
        config = (folder / "config.json").rename(tmp_path / "elsewhere.json")
    convert_checkpoint("torch", path, tmp_path / "out", config)
    assert_same_state(open_both(tmp_path / "out")[0], source)


def torch_tree(tree):
    return (
        {key: torch_tree(value) for key, value in tree.items()}
        if isinstance(tree, dict)
        else torch.from_numpy(np.array(tree))
    )


def save_run(file, model, version, **options):
    """model_optim_rng.pt by torch itself, with what a run keeps beside its model."""
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.tensor_model_parallel = True
    args = argparse.Namespace(
        **vars(megatron.options(**options))
        | dict(
            params_dtype=torch.float16, attn_mask_type=None, device=torch.device("cpu"), shape=torch.Size([1])
        )
    )
    content = {
        "iteration": 7,
        "checkpoint_version": version,
        "args": args,
        "model": torch_tree(model),
        "optimizer": {"fp32": [[parameter]], "state": {0: torch.ones(2)}, "lr": np.float64(0.1)},
        "random_rng_state": np.random.get_state(),
        "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, file)


@pytest.mark.parametrize("version", [0, 1.0, 2.0])
@pytest.mark.parametrize("tp", [1, 2])
def test_megatron_bert_logits(tmp_path, version, tp):
    """Megatron's layout of a transformers model gives that model's logits again, by torch and by us."""
    arrays = megatron.bert_arrays()
    config = transformers.MegatronBertConfig(**megatron.BERT_SIZES)
    source = transformers.MegatronBertForPreTraining(config).eval()
    source.load_state_dict({k: torch.from_numpy(a) for k, a in arrays.items()}, strict=False)
    source.tie_weights()
    for rank in range(tp):
        model = megatron.bert_rank(arrays, version, rank, tp)
        save_run(tmp_path / "in" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt", model, version)
    convert_checkpoint("megatron-bert", tmp_path / "in", tmp_path / "out")
    model, (ours, params) = open_both(tmp_path / "out")
    ids = np.arange(14).reshape(2, 7) % megatron.PADDED
    with torch.no_grad():
        want, have = source(torch.tensor(ids)), model(torch.tensor(ids))
    assert torch.equal(have.prediction_logits, want.prediction_logits)
    assert torch.equal(have.seq_relationship_logits, want.seq_relationship_logits)
    out = ours.apply({"params": params}, input_ids=jnp.asarray(ids), deterministic=True)
    np.testing.assert_allclose(out.prediction_logits, want.prediction_logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("version", [0, 1.0, 2.0])
def test_megatron_gpt2_logits(tmp_path, version):
    arrays = megatron.gpt2_arrays()
    config = transformers.GPT2Config(
        **megatron.GPT2_SIZES, activation_function="gelu_fast", attn_implementation="eager"
    )
    source = transformers.GPT2LMHeadModel(config).eval()
    source.load_state_dict({k: torch.from_numpy(a) for k, a in arrays.items()}, strict=False)
    source.tie_weights()
    for rank in range(2):
        for stage in range(2):
            model = megatron.gpt2_rank(arrays, version, rank, 2, stage, 2)
            file = tmp_path / "in" / "release" / f"mp_rank_{rank:02d}_{stage:03d}" / "model_optim_rng.pt"
            save_run(file, model, version, orig_vocab_size=megatron.V, bias_gelu_fusion=True)
    (tmp_path / "in" / "latest_checkpointed_iteration.txt").write_text("release")
    convert_checkpoint("megatron-lm", tmp_path / "in", tmp_path / "out")
    model, _ = open_both(tmp_path / "out")
    ids = torch.arange(14).reshape(2, 7) % megatron.V
    with torch.no_grad():
        assert torch.equal(model(ids).logits, source(ids).logits)


@pytest.mark.parametrize("num_shards", [1, 8])
def test_mesh_transformer_logits(tmp_path, num_shards):
    """11 layers: jax's order of their names is not the order of their numbers."""
    source = torch_model("GPTJForCausalLM")
    arrays = {name: tensor.numpy() for name, tensor in source.state_dict().items()}
    save_shards(tmp_path / "in", shards_of(arrays, SIZES["gptj"]["n_layer"], num_shards))
    config = dict(layers=11, d_model=32, n_heads=8, n_vocab=64, pe_rotary_dims=2, seq=32)
    (tmp_path / "run.json").write_text(json.dumps(config))
    convert_checkpoint("mesh-transformer-jax", tmp_path / "in", tmp_path / "out", tmp_path / "run.json")
    model, (ours, params) = open_both(tmp_path / "out")
    ids = np.arange(14).reshape(2, 7)
    with torch.no_grad():
        want = source(torch.tensor(ids)).logits
        np.testing.assert_allclose(model(torch.tensor(ids)).logits, want, rtol=0, atol=2e-5)
    out = jax.jit(ours.apply)({"params": params}, input_ids=jnp.asarray(ids))
    np.testing.assert_allclose(out.logits, want, rtol=0, atol=2e-5)
    assert read_folder(tmp_path / "out").keys() == {n for n in arrays if ".attn.bias" not in n}
