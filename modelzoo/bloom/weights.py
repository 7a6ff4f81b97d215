"""BLOOM's tensors in a Hugging Face checkpoint. Query, key and value are fused, head by head."""

from modelzoo.weights import Weight, WeightTable

_QKV = ("layers.attention.query", "layers.attention.key", "layers.attention.value")


def _fused(name: str) -> tuple[str, ...]:
    return tuple(f"{target}.{name}" for target in _QKV)


WEIGHTS = WeightTable(
    prefix="transformer.",
    weights=(
        Weight(
            "transformer.word_embeddings.weight", "embed.embedding", "v d -> v d", also=("lm_head.weight",)
        ),
        Weight("transformer.word_embeddings_layernorm.weight", "embed_norm.scale", "d -> d"),
        Weight("transformer.word_embeddings_layernorm.bias", "embed_norm.bias", "d -> d"),
        Weight("transformer.h.{}.input_layernorm.weight", "layers.attention_norm.scale", "d -> d"),
        Weight("transformer.h.{}.input_layernorm.bias", "layers.attention_norm.bias", "d -> d"),
        Weight(
            "transformer.h.{}.self_attention.query_key_value.weight", _fused("kernel"), "(n c h) d -> c d n h"
        ),
        Weight("transformer.h.{}.self_attention.query_key_value.bias", _fused("bias"), "(n c h) -> c n h"),
        Weight(
            "transformer.h.{}.self_attention.dense.weight", "layers.attention.out.kernel", "d (n h) -> n h d"
        ),
        Weight("transformer.h.{}.self_attention.dense.bias", "layers.attention.out.bias", "d -> d"),
        Weight("transformer.h.{}.post_attention_layernorm.weight", "layers.mlp_norm.scale", "d -> d"),
        Weight("transformer.h.{}.post_attention_layernorm.bias", "layers.mlp_norm.bias", "d -> d"),
        Weight("transformer.h.{}.mlp.dense_h_to_4h.weight", "layers.mlp.fc_in.kernel", "f d -> d f"),
        Weight("transformer.h.{}.mlp.dense_h_to_4h.bias", "layers.mlp.fc_in.bias", "f -> f"),
        Weight("transformer.h.{}.mlp.dense_4h_to_h.weight", "layers.mlp.fc_out.kernel", "d f -> f d"),
        Weight("transformer.h.{}.mlp.dense_4h_to_h.bias", "layers.mlp.fc_out.bias", "d -> d"),
        Weight("transformer.ln_f.weight", "final_norm.scale", "d -> d"),
        Weight("transformer.ln_f.bias", "final_norm.bias", "d -> d"),
        Weight("lm_head.weight", "lm_head.kernel", "v d -> d v"),
        Weight("score.weight", "score.kernel", "c d -> d c"),
        Weight("classifier.weight", "classifier.kernel", "c d -> d c"),
        Weight("classifier.bias", "classifier.bias", "c -> c"),
        Weight("qa_outputs.weight", "qa_outputs.kernel", "c d -> d c"),
        Weight("qa_outputs.bias", "qa_outputs.bias", "c -> c"),
    ),
)
