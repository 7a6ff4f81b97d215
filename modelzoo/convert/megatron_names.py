"""What Megatron-LM calls its tensors, how it splits them over ranks, and what transformers calls them.

Reference: https://github.com/NVIDIA/Megatron-LM, megatron/model/language_model.py, bert_model.py, gpt_model.py.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from modelzoo.tensor_files import TensorRef

RENAMES = tuple(
    (re.compile(old), new)
    for old, new in (
        (r"^language_model\.", ""),
        (r"^(encoder|decoder)\.", "transformer."),
        (r"\.self_attention\.", ".attention."),
        # Transformer Engine's fused layers, and Megatron-Core's names.
        (r"\.attention\.(layernorm_qkv|linear_qkv)\.layer_norm_", ".input_layernorm."),
        (r"\.attention\.(layernorm_qkv|linear_qkv)\.", ".attention.query_key_value."),
        (r"\.attention\.(proj|linear_proj)\.", ".attention.dense."),
        (r"\.(layernorm_mlp|mlp\.linear_fc1)\.layer_norm_", ".post_attention_layernorm."),
        (r"\.pre_mlp_layernorm\.", ".post_attention_layernorm."),
        (r"\.layernorm_mlp\.fc1[._]", ".mlp.dense_h_to_4h."),
        (r"\.layernorm_mlp\.fc2[._]", ".mlp.dense_4h_to_h."),
        (r"\.mlp\.linear_fc1\.", ".mlp.dense_h_to_4h."),
        (r"\.mlp\.linear_fc2\.", ".mlp.dense_4h_to_h."),
        (r"^transformer\.final_norm\.", "transformer.final_layernorm."),
    )
)
"""Every version's spelling becomes that of the first."""
NOTHING = re.compile(r"(^|\.)(_extra_state|rotary_pos_emb\.inv_freq)$|^word_embeddings_for_head\.")
"""Buffers, and the last pipeline stage's copy of the word embeddings."""
QKV = "transformer.layers.{}.attention.query_key_value"


@dataclasses.dataclass(frozen=True)
class Layer:
    """A module of Megatron's with a weight and perhaps a bias.

    Attributes:
        source: Megatron's name, as RENAMES makes it; `{}` is the layer's number.
        target: transformers' name.
        weight: the weight's dimensions in Megatron's order, as letters of a size table.
        bias: likewise; empty where there is none.
        split: the dimension of the weight that is split over ranks, if any. A bias is split where the
            weight's first dimension is.
        flipped: transformers stores the weight transposed.
    """

    source: str
    target: str
    weight: str
    bias: str = ""
    split: int | None = None
    flipped: bool = False

    def tensors(self) -> Iterator[tuple[str, str, int | None]]:
        """(suffix, dimensions, dimension that is split) of the weight and the bias."""
        if self.weight:
            yield ".weight", self.weight, self.split
        if self.bias:
            yield ".bias", self.bias, 0 if self.split == 0 else None


BERT = (
    Layer("embedding.word_embeddings", "bert.embeddings.word_embeddings", "vd", split=0),
    Layer("embedding.position_embeddings", "bert.embeddings.position_embeddings", "pd"),
    Layer("embedding.tokentype_embeddings", "bert.embeddings.token_type_embeddings", "td"),
    Layer("transformer.layers.{}.input_layernorm", "bert.encoder.layer.{}.attention.ln", "d", "d"),
    Layer(
        "transformer.layers.{}.attention.dense",
        "bert.encoder.layer.{}.attention.output.dense",
        *("dd", "d", 1),
    ),
    Layer("transformer.layers.{}.post_attention_layernorm", "bert.encoder.layer.{}.ln", "d", "d"),
    Layer(
        "transformer.layers.{}.mlp.dense_h_to_4h", "bert.encoder.layer.{}.intermediate.dense", "fd", "f", 0
    ),
    Layer("transformer.layers.{}.mlp.dense_4h_to_h", "bert.encoder.layer.{}.output.dense", "df", "d", 1),
    Layer("transformer.final_layernorm", "bert.encoder.ln", "d", "d"),
)
POOLER = (Layer("pooler.dense", "bert.pooler.dense", "dd", "d"),)
LM_HEAD = (
    Layer("lm_head.dense", "cls.predictions.transform.dense", "dd", "d"),
    Layer("lm_head.layernorm", "cls.predictions.transform.LayerNorm", "d", "d"),
    Layer("lm_head", "cls.predictions", "", "v", split=0),
)
BINARY_HEAD = (Layer("binary_head", "cls.seq_relationship", "2d", "2"),)
BERT_CLASSES = {
    "MegatronBertForPreTraining": (*BERT, *POOLER, *LM_HEAD, *BINARY_HEAD),
    "MegatronBertForMaskedLM": (*BERT, *LM_HEAD),
    "MegatronBertForNextSentencePrediction": (*BERT, *POOLER, *BINARY_HEAD),
    "MegatronBertForSequenceClassification": (
        *(*BERT, *POOLER),
        Layer("classification_head", "classifier", "cd", "c"),
    ),
    "MegatronBertForMultipleChoice": (*BERT, *POOLER, Layer("multichoice_head", "classifier", "1d", "1")),
    "MegatronBertModel": (*BERT, *POOLER),
}
"""What each of transformers' classes consists of; a checkpoint is of the first of which it has every head."""
GPT2 = (
    Layer("embedding.word_embeddings", "transformer.wte", "vd", split=0),
    Layer("embedding.position_embeddings", "transformer.wpe", "pd"),
    Layer("transformer.layers.{}.input_layernorm", "transformer.h.{}.ln_1", "d", "d"),
    Layer("transformer.layers.{}.attention.dense", "transformer.h.{}.attn.c_proj", "dd", "d", 1, True),
    Layer("transformer.layers.{}.post_attention_layernorm", "transformer.h.{}.ln_2", "d", "d"),
    Layer("transformer.layers.{}.mlp.dense_h_to_4h", "transformer.h.{}.mlp.c_fc", "fd", "f", 0, True),
    Layer("transformer.layers.{}.mlp.dense_4h_to_h", "transformer.h.{}.mlp.c_proj", "df", "d", 1, True),
    Layer("transformer.final_layernorm", "transformer.ln_f", "d", "d"),
)
GPT2_HEAD = (Layer("output_layer", "lm_head", "vd", split=0),)
BERT_HEADS = ("lm_head", "binary_head", "classification_head", "multichoice_head")
BERT_ONLY = ("embedding.tokentype_embeddings.", "pooler.", *(f"{head}." for head in BERT_HEADS))
"""What tells a BERT from a GPT."""


def bert_class(found: Iterable[str]) -> str:
    """The class that has the heads of these tensors."""
    heads = {name.split(".")[0] for name in found}
    for name, layers in BERT_CLASSES.items():
        if {layer.source.split(".")[0] for layer in layers if layer.source.startswith(BERT_HEADS)} <= heads:
            return name
    raise AssertionError("the last class has no head")


def layers_of(is_bert: bool, architecture: str, tied: bool = True) -> tuple[Layer, ...]:
    """What a class consists of, but for the fused queries, keys and values."""
    return BERT_CLASSES[architecture] if is_bert else GPT2 if tied else (*GPT2, *GPT2_HEAD)


def qkv_targets(is_bert: bool) -> tuple[str, ...]:
    """transformers' names of what QKV holds."""
    if is_bert:
        return tuple(f"bert.encoder.layer.{{}}.attention.self.{part}" for part in ("query", "key", "value"))
    return ("transformer.h.{}.attn.c_attn",)


def flat_names(model: Mapping[Any, Any], before: str = "") -> dict[str, TensorRef]:
    """The tensors of a rank's `model`, whose dicts nest in some versions and not in others, by one spelling.

    Raises:
        ValueError: it has an encoder and a decoder.
    """
    found: dict[str, TensorRef] = {}
    for key, value in model.items():
        name = f"{before}.{key}" if before else str(key)
        if isinstance(value, Mapping):
            found |= flat_names(value, name)
        elif isinstance(value, TensorRef):
            found[name] = value
    if before:
        return found
    bare = {name.removeprefix("language_model.").split(".")[0] for name in found}
    if "decoder" in bare and bare & {"encoder", "transformer"}:
        raise ValueError("it has an encoder and a decoder; only BERT and GPT are read")
    return {_spelling(name): ref for name, ref in found.items() if not NOTHING.search(name)}


def _spelling(name: str) -> str:
    for old, new in RENAMES:
        name = old.sub(new, name)
    return name
