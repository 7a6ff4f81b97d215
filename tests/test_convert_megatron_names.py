"""Megatron's spellings of all versions become one, and its heads tell the class."""

import numpy as np
import pytest

from modelzoo import registry
from modelzoo.convert import megatron_names as names
from modelzoo.tensor_files import TensorRef

REF = TensorRef(__file__, 0, np.dtype(np.float32), (1,), (1,))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("spelling", "one"),
    [
        ("language_model.encoder.layers.1.self_attention.dense.bias", "layers.1.attention.dense.bias"),
        ("language_model.transformer.layers.1.attention.dense.bias", "layers.1.attention.dense.bias"),
        ("decoder.layers.1.self_attention.linear_proj.bias", "layers.1.attention.dense.bias"),
        ("decoder.layers.0.mlp.linear_fc1.layer_norm_bias", "layers.0.post_attention_layernorm.bias"),
        ("decoder.layers.0.mlp.linear_fc1.bias", "layers.0.mlp.dense_h_to_4h.bias"),
        ("language_model.encoder.layers.0.layernorm_mlp.fc2_weight", "layers.0.mlp.dense_4h_to_h.weight"),
        ("decoder.layers.0.pre_mlp_layernorm.weight", "layers.0.post_attention_layernorm.weight"),
        ("language_model.encoder.final_norm.weight", "final_layernorm.weight"),
    ],
)
def test_one_spelling(spelling, one):
    nested: dict = {}
    *parents, last = spelling.split(".", 1)
    nested[parents[0]] = {last: REF}
    assert list(names.flat_names(nested)) == [f"transformer.{one}"]


def test_what_carries_nothing():
    model = {
        "decoder": {"layers.0.self_attention._extra_state": REF, "a": REF},
        "word_embeddings_for_head": {"weight": REF},
    }
    assert list(names.flat_names(model | {"state": None})) == ["transformer.a"]


def test_encoder_decoders_are_refused():
    with pytest.raises(ValueError, match="an encoder and a decoder"):
        names.flat_names({"language_model": {"encoder": {"a": REF}, "decoder": {"b": REF}}})


@pytest.mark.parametrize("name", names.BERT_CLASSES)
def test_heads_tell_the_class(name):
    sources = [layer.source + ".weight" for layer in names.BERT_CLASSES[name]]
    assert names.bert_class(sources) == name
    assert name in {cls.__name__ for cls in registry.get_family("megatron-bert").classes}


def test_every_layer_names_its_dimensions():
    for layer in (
        *names.layers_of(True, "MegatronBertForPreTraining"),
        *names.layers_of(False, "", tied=False),
    ):
        tensors = list(layer.tensors())
        assert tensors
        assert layer.source.count("{}") == layer.target.count("{}")
        assert all(set(letters) <= set("vdptfc12") for _, letters, _ in tensors)
        assert layer.split is None or all(split in (None, 0, 1) for _, _, split in tensors)
