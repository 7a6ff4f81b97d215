"""GPT-J's tensors in a Hugging Face checkpoint."""

from modelzoo.weights import Weight, WeightTable

WEIGHTS = WeightTable(
    prefix="transformer.",
    weights=(
        Weight("transformer.wte.weight", "embed.embedding", "v d -> v d"),
        Weight("transformer.h.{}.ln_1.weight", "layers.norm.scale", "d -> d"),
        Weight("transformer.h.{}.ln_1.bias", "layers.norm.bias", "d -> d"),
        Weight("transformer.h.{}.attn.q_proj.weight", "layers.attention.query.kernel", "(n h) d -> d n h"),
        Weight("transformer.h.{}.attn.k_proj.weight", "layers.attention.key.kernel", "(n h) d -> d n h"),
        Weight("transformer.h.{}.attn.v_proj.weight", "layers.attention.value.kernel", "(n h) d -> d n h"),
        Weight("transformer.h.{}.attn.out_proj.weight", "layers.attention.out.kernel", "d (n h) -> n h d"),
        Weight("transformer.h.{}.mlp.fc_in.weight", "layers.mlp.fc_in.kernel", "f d -> d f"),
        Weight("transformer.h.{}.mlp.fc_in.bias", "layers.mlp.fc_in.bias", "f -> f"),
        Weight("transformer.h.{}.mlp.fc_out.weight", "layers.mlp.fc_out.kernel", "d f -> f d"),
        Weight("transformer.h.{}.mlp.fc_out.bias", "layers.mlp.fc_out.bias", "d -> d"),
        Weight("transformer.ln_f.weight", "final_norm.scale", "d -> d"),
        Weight("transformer.ln_f.bias", "final_norm.bias", "d -> d"),
        Weight("lm_head.weight", "lm_head.kernel", "v d -> d v"),
        Weight("lm_head.bias", "lm_head.bias", "v -> v"),
        Weight("score.weight", "score.kernel", "c d -> d c"),
        Weight("qa_outputs.weight", "qa_outputs.kernel", "c d -> d c"),
        Weight("qa_outputs.bias", "qa_outputs.bias", "c -> c"),
    ),
    # Causal masks, their fill value and sine tables: buffers that older transformers versions saved.
    ignored=(r"(^|\.)h\.\d+\.attn\.(bias|masked_bias|embed_positions)$",),
)
