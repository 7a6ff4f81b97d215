"""Adapters against the peft library: what it opens of ours, and what we read of its."""

import copy

import jax
import numpy as np
import peft
import pytest

import modelzoo
from modelzoo import tuning
from modelzoo import weights as tables
from modelzoo.peft import read_adapter, write_adapter
from tests.parity import cases
from tests.parity.pairs import ask, check_within, differences, forward, our_fields, pair, their_fields

TOLERANCE = 2e-5
EVERYTHING = (r".*layers/.*kernel",)
CLASSES = {
    "GPTJForCausalLM": (*EVERYTHING, "lm_head/kernel"),
    "GPTJForSequenceClassification": EVERYTHING,
    "BloomForCausalLM": (".*attention/(query|value)/kernel", ".*mlp/fc_in/kernel"),
    "BloomForTokenClassification": (".*attention/(query|key|value)/kernel",),
    "RobertaForMaskedLM": EVERYTHING,
    "RobertaForSequenceClassification": EVERYTHING,
    "MegatronBertForMultipleChoice": EVERYTHING,
    "MegatronBertForQuestionAnswering": EVERYTHING,
    "MvpForConditionalGeneration": (r".*kernel",),
    "MvpForSequenceClassification": EVERYTHING,
}
"""Class -> targets, between them every kind of kernel."""


def adapted(both, targets, seed=0):
    """Our model with adapters that show, and a head that has trained."""
    model = modelzoo.tuned(both.ours, modelzoo.Tuning(lora=modelzoo.Lora(rank=3, alpha=4.0, targets=targets)))
    random, trains = np.random.default_rng(seed), tables.flatten(modelzoo.trainable(model))
    leaves = tables.flatten(both.params)
    for path, shape in tables.flatten(modelzoo.abstract_params(model)).items():
        drawn = random.normal(0, 0.15, shape.shape).astype(np.float32)
        if trains[path]:
            leaves[path] = drawn
        elif tuning.is_adapter(path):
            leaves[path] = np.full(shape.shape, model.tuning.lora.scale, np.float32)
    return model, tables.unflatten(jax.tree.map(jax.numpy.asarray, leaves))


def fields(out):
    return {name: value for name, value in out.items() if "attentions" not in name}


@pytest.mark.parametrize("name", CLASSES)
def test_peft_opens_what_we_write(name, tmp_path):
    both = pair(name, cases.titles(name)[0])
    model, params = adapted(both, CLASSES[name])
    write_adapter(model, params, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(both.theirs), tmp_path).eval()
    inputs = both.inputs(cases.cells("grids", name)[0][1])
    flags = dict(output_attentions=True, output_hidden_states=True)
    expected = fields(their_fields(ask(theirs, inputs, **flags)))
    out = fields(our_fields(forward(both.ours, params, inputs)))
    check_within(differences(out, expected), TOLERANCE)
    plain = fields(our_fields(forward(both.ours, both.params, inputs)))
    assert max(differences(out, plain).values()) > 1e-2
    merged = fields(our_fields(forward(both.ours, tuning.merge(params), inputs)))
    check_within(differences(merged, expected), TOLERANCE)
    again, read = read_adapter(both.ours, both.params, tmp_path)
    assert again.tuning.lora.rank >= 3
    check_within(differences(fields(our_fields(forward(both.ours, read, inputs))), expected), TOLERANCE)


THEIRS = {
    "GPTJForCausalLM": dict(target_modules=["q_proj", "fc_out"], rank_pattern={"fc_out": 2}),
    "BloomForSequenceClassification": dict(
        target_modules=["query_key_value", "dense"], layers_to_transform=[1], use_rslora=True
    ),
    "RobertaForSequenceClassification": dict(
        target_modules="all-linear", modules_to_save=["classifier"], alpha_pattern={"query": 3}
    ),
    "MvpForConditionalGeneration": dict(target_modules=["q_proj", "v_proj", "fc1"]),
}


@pytest.mark.parametrize("name", THEIRS)
def test_we_read_what_peft_writes(name, tmp_path):
    both = pair(name, cases.titles(name)[0])
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **THEIRS[name])
    theirs = peft.get_peft_model(copy.deepcopy(both.theirs), config).eval()
    theirs.save_pretrained(tmp_path)
    model, params = read_adapter(both.ours, both.params, tmp_path)
    assert model.tuning.lora.rank == 4
    inputs = both.inputs(cases.cells("grids", name)[0][1])
    expected = fields(their_fields(ask(theirs, inputs)))
    out = fields(
        our_fields(forward(both.ours, params, inputs, output_attentions=False, output_hidden_states=False))
    )
    check_within(differences(out, expected), TOLERANCE)


def test_peft_refuses_nothing_silently(tmp_path):
    both = pair("RobertaForMaskedLM", cases.titles("RobertaForMaskedLM")[0])
    config = peft.IA3Config(target_modules=["key"], feedforward_modules=[])
    peft.get_peft_model(copy.deepcopy(both.theirs), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="peft_type = 'IA3'"):
        read_adapter(both.ours, both.params, tmp_path)
