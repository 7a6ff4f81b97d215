"""MegatronBERT's hyper-parameters, named as in transformers."""

import dataclasses
from typing import ClassVar

from modelzoo import bert


@dataclasses.dataclass(frozen=True, kw_only=True)
class MegatronBertConfig(bert.BertConfig):
    """The defaults are those of NVIDIA's cased model of 345M parameters; for fields see `modelzoo.bert.BertConfig`."""

    model_type: ClassVar[str] = "megatron-bert"

    vocab_size: int = 29056
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096


PRESETS = {
    "megatron-bert-345m": MegatronBertConfig(),
    "tiny-megatron-bert": MegatronBertConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=256,
        max_position_embeddings=64,
        num_attention_heads=4,
        num_hidden_layers=2,
    ),
}
