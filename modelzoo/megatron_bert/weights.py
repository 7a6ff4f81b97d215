"""MegatronBERT's tensors in a Hugging Face checkpoint."""

from modelzoo.bert import linear_weights, norm_weights, trunk_weights
from modelzoo.weights import Weight, WeightTable

_LM = "cls.predictions."
_BIAS = f"{_LM}decoder.bias"

WEIGHTS = WeightTable(
    prefix="bert.",
    weights=(
        *trunk_weights("bert.", decoder=f"{_LM}decoder.weight"),
        *norm_weights("bert.encoder.layer.{}.attention.ln", "layers.attention_norm"),
        *norm_weights("bert.encoder.layer.{}.crossattention.ln", "layers.cross_attention_norm"),
        *norm_weights("bert.encoder.layer.{}.ln", "layers.mlp_norm"),
        *norm_weights("bert.encoder.ln", "final_norm"),
        *linear_weights(f"{_LM}transform.dense", "lm_head.dense"),
        *norm_weights(f"{_LM}transform.LayerNorm", "lm_head.norm"),
        Weight(f"{_LM}decoder.weight", "lm_head.kernel", "v d -> d v"),
        # transformers 5 reads an untied head's bias under the second name.
        Weight(f"{_LM}bias", "lm_head.bias", "v -> v", also=(_BIAS,), untied=(_BIAS,)),
        *linear_weights("cls.seq_relationship", "seq_relationship"),
        *linear_weights("classifier", "classifier"),
        *linear_weights("qa_outputs", "qa_outputs"),
    ),
    ignored=(r"(^|\.)embeddings\.position_ids$",),  # a buffer that counts up, which older versions saved
    renames=((r"\.gamma$", ".weight"), (r"\.beta$", ".bias")),
)
