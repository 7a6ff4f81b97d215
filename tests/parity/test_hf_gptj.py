"""Checkpoints in both directions between transformers (torch) and modelzoo."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import modelzoo
import parallel
from modelzoo import registry

CLASSES = [cls.__name__ for cls in registry.get_family("gptj").classes]
CONFIG = dict(vocab_size=67, n_embd=48, n_layer=3, n_head=4, rotary_dim=4, n_positions=32, n_inner=80)


def torch_model(name, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    labels = {"num_labels": 2 if "Question" in name else 5}
    model = getattr(transformers, name)(transformers.GPTJConfig.from_dict(CONFIG | labels | changes)).to(
        dtype
    )
    with torch.no_grad():  # no tensor may be constant: a swap of two would not show
        for parameter in model.parameters():
            parameter.normal_()
    return model.eval()


def save(model, folder, form):
    """Every form in which such checkpoints are found."""
    if form == "safetensors":
        model.save_pretrained(folder)
    elif form == "safetensors shards":
        model.save_pretrained(folder, max_shard_size="40KB")
        assert len(list(folder.glob("*.safetensors"))) > 3
    elif form == "bin shards":
        model.save_pretrained(folder, max_shard_size="40KB", safe_serialization=False)
        assert len(list(folder.glob("*.bin"))) > 3
    else:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        zipped = form == "bin"
        torch.save(model.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)


FORMS = ["safetensors", "safetensors shards", "bin", "bin stream", "bin shards"]


def bits(array):
    """Bytes of a numpy, jax or torch array, bfloat16 included."""
    if isinstance(array, torch.Tensor):
        return (
            array.detach().contiguous().view(torch.uint8).numpy().tobytes()
            if array.dim()
            else array.numpy().tobytes()
        )
    return np.asarray(array).tobytes()


def reload(name, folder):
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not any(info.values()), info
    return model


def assert_same_state(model, other):
    mine, theirs = model.state_dict(), other.state_dict()
    assert list(mine) == list(theirs)
    for name in mine:
        assert mine[name].dtype == theirs[name].dtype
        assert torch.equal(mine[name], theirs[name]), name


def logits(out):
    return [
        out[key]
        for key in ("logits", "start_logits", "end_logits", "last_hidden_state")
        if out.get(key) is not None
    ]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CLASSES)
def test_there_and_back(tmp_path, name, form):
    theirs = torch_model(name, pad_token_id=0)
    (tmp_path / "in").mkdir()
    save(theirs, tmp_path / "in", form)
    model, params = modelzoo.from_hf(tmp_path / "in")
    assert type(model).__name__ == name

    ids = np.arange(1, 15, dtype=np.int32).reshape(2, 7)
    with torch.no_grad():
        expected = logits(theirs(torch.tensor(ids, dtype=torch.long)))
    got = logits(vars(model.apply({"params": params}, input_ids=jnp.asarray(ids))))
    assert len(expected) == len(got)
    for a, b in zip(expected, got, strict=True):
        np.testing.assert_allclose(b, a.numpy(), rtol=2e-5, atol=2e-5 * float(a.abs().max()))

    modelzoo.to_hf(model, params, tmp_path / "out", max_shard_size="5GB" if form == "safetensors" else "40KB")
    assert_same_state(reload(name, tmp_path / "out"), theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("form", ["safetensors", "bin", "bin stream"])
def test_dtypes(tmp_path, dtype, form):
    theirs = torch_model("GPTJForCausalLM", dtype)
    (tmp_path / "in").mkdir()
    save(theirs, tmp_path / "in", form)
    model, params = modelzoo.from_hf(tmp_path / "in")
    kept = torch.float32 if dtype == torch.float64 else dtype
    assert str(kept) == f"torch.{model.param_dtype.name}"
    state = theirs.to(kept).state_dict()
    assert bits(params["lm_head"]["kernel"].T) == bits(state["lm_head.weight"])
    assert bits(params["trunk"]["layers"]["mlp"]["fc_in"]["bias"][1]) == bits(
        state["transformer.h.1.mlp.fc_in.bias"]
    )
    modelzoo.to_hf(model, params, tmp_path / "out")
    assert_same_state(reload("GPTJForCausalLM", tmp_path / "out"), theirs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_conversion_rounds_as_torch_does(tmp_path, dtype):
    theirs = torch_model("GPTJForCausalLM")
    theirs.save_pretrained(tmp_path / "in")
    model, params = modelzoo.from_hf(tmp_path / "in", param_dtype=dtype)
    modelzoo.to_hf(model, params, tmp_path / "out")
    assert_same_state(reload("GPTJForCausalLM", tmp_path / "out"), theirs.to(getattr(torch, dtype)))


def test_a_trunk_into_every_head_and_a_head_into_the_trunk(tmp_path):
    trunk = torch_model("GPTJModel")
    trunk.save_pretrained(tmp_path / "trunk")
    _, base = modelzoo.from_hf(tmp_path / "trunk")
    for name in CLASSES[1:]:
        _, params = modelzoo.from_hf(tmp_path / "trunk", name)
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bits(a) == bits(b), params["trunk"], base)))
        head = torch_model(name)
        head.save_pretrained(tmp_path / name)
        model, params = modelzoo.from_hf(tmp_path / name, "GPTJModel")
        modelzoo.to_hf(model, params, tmp_path / "out")
        assert_same_state(reload("GPTJModel", tmp_path / "out"), head.transformer)


def test_from_a_mesh(tmp_path):
    theirs = torch_model("GPTJForCausalLM")
    theirs.save_pretrained(tmp_path / "in")
    mesh = parallel.make_mesh(fsdp=2, tensor=2, data=2)
    model, params = modelzoo.from_hf(tmp_path / "in", mesh=mesh)
    assert params["lm_head"]["bias"].shape == (68,)
    modelzoo.to_hf(model, params, tmp_path / "out")
    assert_same_state(reload("GPTJForCausalLM", tmp_path / "out"), theirs)


def test_configs_survive(tmp_path):
    theirs = torch_model("GPTJForSequenceClassification", attn_pdrop=0.1, rotary_dim=None, pad_token_id=3)
    theirs.config.id2label = {i: f"kind {i}" for i in range(5)}
    theirs.config.problem_type = "multi_label_classification"
    theirs.save_pretrained(tmp_path / "in")
    model, params = modelzoo.from_hf(tmp_path / "in")
    modelzoo.to_hf(model, params, tmp_path / "out")
    again = transformers.AutoConfig.from_pretrained(tmp_path / "out").to_dict()
    before = transformers.AutoConfig.from_pretrained(tmp_path / "in").to_dict()
    for volatile in ("_name_or_path", "label2id", "transformers_version", "use_cache"):
        before.pop(volatile, None)
        again.pop(volatile, None)
    # None is written as the head's width: transformers 5 wants a number.
    assert again == before | {"rotary_dim": model.config.head_dim}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [
        type(theirs).__name__
    ]


def test_a_question_head_has_two_columns_whatever_num_labels_says(tmp_path):
    """transformers sizes it by num_labels, and then fails unless that is 2."""
    model = modelzoo.GPTJForQuestionAnswering(modelzoo.get_config("tiny-gptj", num_labels=5))
    params = jax.tree.map(lambda spec: np.ones(spec.shape, np.float32), modelzoo.abstract_params(model))
    modelzoo.to_hf(model, params, tmp_path)
    assert reload("GPTJForQuestionAnswering", tmp_path).qa_outputs.out_features == 2


def test_the_auto_class_finds_it(tmp_path):
    model = modelzoo.GPTJForCausalLM(modelzoo.get_config("tiny-gptj"))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda spec: rng.random(spec.shape, np.float32), modelzoo.abstract_params(model))
    modelzoo.to_hf(model, params, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs) is transformers.GPTJForCausalLM
    assert bits(theirs.lm_head.weight) == bits(params["lm_head"]["kernel"].T)
