"""GPT-2's tensors in a Hugging Face checkpoint. Its layers are Conv1D: kernels lie [in, out], and query, key and value
are fused, one after the other.
"""

from modelzoo.bert import linear_weights, norm_weights
from modelzoo.weights import Weight, WeightTable

_BLOCK, _CROSS = "transformer.h.{}.", "transformer.h.{}.crossattention."


def _of(part: str, *names: str) -> tuple[str, ...]:
    """Parameters of one kind, of several layers of an attention."""
    return tuple(f"layers.{name}.{part}" for name in names)


_QKV = ("attention.query", "attention.key", "attention.value")
_CROSS_KV = ("cross_attention.key", "cross_attention.value")

WEIGHTS = WeightTable(
    prefix="transformer.",
    weights=(
        Weight("transformer.wte.weight", "embed.embedding", "v d -> v d", also=("lm_head.weight",)),
        Weight("transformer.wpe.weight", "embed_positions.embedding", "p d -> p d"),
        *norm_weights(f"{_BLOCK}ln_1", "layers.attention_norm"),
        Weight(f"{_BLOCK}attn.c_attn.weight", _of("kernel", *_QKV), "d (c n h) -> c d n h"),
        Weight(f"{_BLOCK}attn.c_attn.bias", _of("bias", *_QKV), "(c n h) -> c n h"),
        Weight(f"{_BLOCK}attn.c_proj.weight", "layers.attention.out.kernel", "(n h) d -> n h d"),
        Weight(f"{_BLOCK}attn.c_proj.bias", "layers.attention.out.bias", "d -> d"),
        *norm_weights(f"{_BLOCK}ln_cross_attn", "layers.cross_attention_norm"),
        Weight(f"{_CROSS}q_attn.weight", "layers.cross_attention.query.kernel", "d (n h) -> d n h"),
        Weight(f"{_CROSS}q_attn.bias", "layers.cross_attention.query.bias", "(n h) -> n h"),
        Weight(f"{_CROSS}c_attn.weight", _of("kernel", *_CROSS_KV), "d (c n h) -> c d n h"),
        Weight(f"{_CROSS}c_attn.bias", _of("bias", *_CROSS_KV), "(c n h) -> c n h"),
        Weight(f"{_CROSS}c_proj.weight", "layers.cross_attention.out.kernel", "(n h) d -> n h d"),
        Weight(f"{_CROSS}c_proj.bias", "layers.cross_attention.out.bias", "d -> d"),
        *norm_weights(f"{_BLOCK}ln_2", "layers.mlp_norm"),
        Weight(f"{_BLOCK}mlp.c_fc.weight", "layers.mlp.fc_in.kernel", "d f -> d f"),
        Weight(f"{_BLOCK}mlp.c_fc.bias", "layers.mlp.fc_in.bias", "f -> f"),
        Weight(f"{_BLOCK}mlp.c_proj.weight", "layers.mlp.fc_out.kernel", "f d -> f d"),
        Weight(f"{_BLOCK}mlp.c_proj.bias", "layers.mlp.fc_out.bias", "d -> d"),
        *norm_weights("transformer.ln_f", "final_norm"),
        Weight("lm_head.weight", "lm_head.kernel", "v d -> d v"),
        Weight("score.weight", "score.kernel", "c d -> d c"),
        *linear_weights("classifier", "classifier"),
        *linear_weights("qa_outputs", "qa_outputs"),
        *linear_weights("multiple_choice_head.summary", "choice_head"),
    ),
    # Causal masks and their fill value, buffers that older versions saved.
    ignored=(r"(^|\.)h\.\d+\.(attn|crossattention)\.(bias|masked_bias)$",),
)
