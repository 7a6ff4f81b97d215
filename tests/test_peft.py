"""Adapter folders there and back; that peft opens them, and ours opens peft's, is in tests/parity/test_peft.py."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import modelzoo
from modelzoo import weights as tables
from modelzoo.peft import CONFIG, WEIGHTS, read_adapter, write_adapter
from tests.zoo import assert_close, leaves_by_name, random_params, tiny_gptj

BLOOM = modelzoo.BloomForSequenceClassification(
    modelzoo.BloomConfig(vocab_size=37, hidden_size=24, n_layer=2, n_head=3, num_labels=3, pad_token_id=3)
)
LORA = modelzoo.Lora(rank=2, alpha=3.0, targets=(".*(query|value)/kernel", ".*mlp/fc_in/kernel"), dropout=0.5)


def tuned(model, lora=LORA):
    model = modelzoo.tuned(model, modelzoo.Tuning(lora=lora))
    settings = {"scale": lora.scale, "dropout": lora.dropout}

    def settle(path, leaf):
        return (
            leaf * 0 + settings[path[-1].key] if path[-1].key in settings and path[-2].key == "lora" else leaf
        )

    return model, jax.tree.map_with_path(settle, random_params(model))


def plain_of(params):
    kept = {name: leaf for name, leaf in leaves_by_name(params).items() if "/lora/" not in name}
    return tables.unflatten({tuple(name.split("/")): leaf for name, leaf in kept.items()})


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(the folder of an adapter, its model, its parameters)."""
    folder = tmp_path_factory.mktemp("adapter")
    model, params = tuned(BLOOM)
    write_adapter(model, params, folder, "bigscience/bloom-560m")
    return folder, model, params


def test_a_folder_says_what_it_is(written):
    config, tensors = json.loads((written[0] / CONFIG).read_text()), load_file(written[0] / WEIGHTS)
    assert config["base_model_name_or_path"] == "bigscience/bloom-560m"
    assert config["task_type"] == "SEQ_CLS"
    assert config["target_modules"] == ["dense_h_to_4h", "query_key_value"]
    assert config["modules_to_save"] == ["score"]
    ranks = {"query_key_value": 4, "dense_h_to_4h": 2}  # of two of the three fused kernels, and of one
    for name, tensor in tensors.items():
        module = name.split(".")[-3]
        if "lora" in name:
            assert tensor.shape[0 if "lora_A" in name else 1] == ranks[module]
            full = f"transformer.{name.split('transformer.')[1].partition('.lora')[0]}"
            alpha = config["alpha_pattern"].get(full, config["lora_alpha"])
            assert alpha / config["rank_pattern"].get(full, config["r"]) == LORA.scale
    assert tensors["base_model.model.score.weight"].shape == (3, 24)
    assert len(tensors) == 2 * 2 * 2 + 1


def test_there_and_back(written):
    folder, _, params = written
    base = plain_of(params)
    base["score"] = {"kernel": base["score"]["kernel"] * 0}
    again, read = read_adapter(BLOOM, base, folder)
    assert again.tuning.lora.dropout == 0.5
    ids = np.arange(2 * 5, dtype=np.int32).reshape(2, 5) + 5
    logits = [BLOOM.apply({"params": p}, input_ids=ids).logits for p in (params, read)]
    assert_close(logits[1], logits[0], 2e-6)
    np.testing.assert_array_equal(read["score"]["kernel"], params["score"]["kernel"])
    assert not np.any(base["score"]["kernel"])  # what was given stays


def test_what_no_adapter_can_hold(tmp_path):
    gptj = modelzoo.GPTJForCausalLM(tiny_gptj())
    with pytest.raises(ValueError, match="has no adapters to write"):
        write_adapter(gptj, random_params(gptj), tmp_path)
    model, params = tuned(
        gptj, modelzoo.Lora(rank=1, alpha=1.0, targets=".*fc_in/kernel", also=".*fc_in/bias")
    )
    with pytest.raises(
        ValueError, match=r"h.0.mlp.fc_in: it has an adapter, and its other parameters train too"
    ):
        write_adapter(model, params, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(peft_type="IA3"), "peft_type = 'IA3': LORA alone"),
        (dict(use_dora=True), "use_dora = True: plain LoRA alone"),
        (dict(bias="all"), "bias = 'all': 'none' alone"),
        (dict(r=0), "r = 0: it is a number above 0"),
    ],
)
def test_other_kinds_are_refused(written, tmp_path, change, message):
    (tmp_path / CONFIG).write_text(json.dumps(json.loads((written[0] / CONFIG).read_text()) | change))
    with pytest.raises(ValueError, match=message):
        read_adapter(BLOOM, plain_of(written[2]), tmp_path)


def test_an_adapter_of_another_model_is_refused(written, tmp_path):
    base = plain_of(written[2])
    with pytest.raises(OSError, match="no peft adapter, as it has no adapter_config.json"):
        read_adapter(BLOOM, base, tmp_path)
    (tmp_path / CONFIG).write_text((written[0] / CONFIG).read_text())
    with pytest.raises(OSError, match="cannot be read"):
        read_adapter(BLOOM, base, tmp_path)
    tensors = load_file(written[0] / WEIGHTS)
    save_file({name.replace("h.1.", "h.7."): value for name, value in tensors.items()}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"h\.7\..* belongs to no linear layer of the model"):
        read_adapter(BLOOM, base, tmp_path)
    cut = {name: value[:, :-1].copy() if "lora_A" in name else value for name, value in tensors.items()}
    save_file(cut, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="is adapted by"):
        read_adapter(BLOOM, base, tmp_path)
    save_file({"base_model.model.score.weight": tensors["base_model.model.score.weight"]}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="it adapts no layer"):
        read_adapter(BLOOM, base, tmp_path)
