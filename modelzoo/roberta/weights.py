"""RoBERTa's tensors in a Hugging Face checkpoint."""

from modelzoo.bert import linear_weights, norm_weights, trunk_weights
from modelzoo.weights import Weight, WeightTable

_BIAS = ("lm_head.decoder.bias",)

WEIGHTS = WeightTable(
    prefix="roberta.",
    weights=(
        *trunk_weights("roberta.", decoder="lm_head.decoder.weight"),
        *norm_weights("roberta.embeddings.LayerNorm", "embed_norm"),
        *norm_weights("roberta.encoder.layer.{}.attention.output.LayerNorm", "layers.attention_norm"),
        *norm_weights(
            "roberta.encoder.layer.{}.crossattention.output.LayerNorm", "layers.cross_attention_norm"
        ),
        *norm_weights("roberta.encoder.layer.{}.output.LayerNorm", "layers.mlp_norm"),
        *linear_weights("lm_head.dense", "lm_head.dense"),
        *norm_weights("lm_head.layer_norm", "lm_head.norm"),
        Weight("lm_head.decoder.weight", "lm_head.kernel", "v d -> d v"),
        # transformers 5 reads an untied head's bias under the second name.
        Weight("lm_head.bias", "lm_head.bias", "v -> v", _BIAS, untied=_BIAS),
        *linear_weights("classifier.dense", "classifier.dense"),
        *linear_weights("classifier.out_proj", "classifier.out"),
        *linear_weights("classifier", "classifier"),
        *linear_weights("qa_outputs", "qa_outputs"),
    ),
    # Buffers that count up or hold zeros, which older versions saved.
    ignored=(r"(^|\.)embeddings\.(position_ids|token_type_ids)$",),
    # What TensorFlow calls a norm's two vectors.
    renames=((r"\.gamma$", ".weight"), (r"\.beta$", ".bias")),
)
