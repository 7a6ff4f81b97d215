"""RoBERTa and MegatronBERT against transformers in what not every family has: poolers, generation by a decoder."""

import tempfile
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import inference
import modelzoo
from tests.parity.pairs import (
    ask,
    check_within,
    differences,
    forward,
    make_pair,
    our_fields,
    their_fields,
    torch_model,
)

SIZES: dict[str, Any] = dict(
    vocab_size=41,
    hidden_size=36,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=31,
    max_position_embeddings=24,
    bos_token_id=0,
    eos_token_id=2,
    pad_token_id=1,
)
both_families = pytest.mark.parametrize("family", ["Roberta", "MegatronBert"])
IDS = np.random.default_rng(0).integers(3, 41, (3, 8)).astype(np.int32)


def check_outputs(theirs: Any, ours: Any, params: Any) -> None:
    flags = dict(output_attentions=True, output_hidden_states=True)
    expected = their_fields(ask(theirs, {"input_ids": IDS}, **flags))
    check_within(differences(our_fields(forward(ours, params, {"input_ids": IDS})), expected), 2e-5)


@both_families
def test_a_trunk_without_a_pooler(family, tmp_path):
    """There and back."""
    model_class = getattr(transformers, f"{family}Model")
    theirs = model_class(torch_model(f"{family}Model", SIZES).config, add_pooling_layer=False).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours, params = modelzoo.from_hf(tmp_path / "theirs")
    assert forward(ours, params, {"input_ids": IDS}).pooler_output is None
    check_outputs(theirs, ours, params)
    assert modelzoo.num_params(ours) == theirs.num_parameters()
    modelzoo.to_hf(ours, params, tmp_path / "ours")
    again, report = model_class.from_pretrained(
        tmp_path / "ours", add_pooling_layer=False, output_loading_info=True
    )
    assert not any(report.values()), report
    check_outputs(again.eval(), ours, params)


@both_families
def test_a_trunk_out_of_a_language_model(family):
    """As transformers with add_pooling_layer=False."""
    theirs = torch_model(f"{family}ForMaskedLM", SIZES)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours, params = modelzoo.from_hf(folder, f"{family}Model")
    check_outputs(theirs.base_model, ours, params)


@both_families
@pytest.mark.parametrize("padding", [0, 3])
def test_generation(family, padding):
    """Greedy, token for token. Both count positions from 0 here, as transformers does for every model."""
    both = make_pair(f"{family}ForCausalLM", SIZES | dict(is_decoder=True))
    ids, mask = IDS.copy(), np.ones_like(IDS)
    ids[0, :padding], mask[0, :padding] = 1, 0
    given = dict(input_ids=torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask).long())
    expected = both.theirs.generate(**given, max_new_tokens=6, do_sample=False)
    config = inference.GenerationConfig(max_new_tokens=6, pad_token_id=1, eos_token_id=2)
    have = inference.generate(both.ours, both.params, ids, mask, config=config).sequences
    np.testing.assert_array_equal(np.asarray(have), expected.numpy())
