"""MVP's tensors in a Hugging Face checkpoint.

Encoder and decoder read one embedding table, which files may hold up to four times; of the decoder alone it is a tensor
of the decoder. The buffer `final_logits_bias` is a tensor like any other.
"""

from modelzoo.weights import Weight, WeightTable


def _tables(*names: str) -> tuple[str, ...]:
    """The names of copies of the embedding table, in files with and without the prefix."""
    return (*(prefix + name for name in names for prefix in ("model.", "")), "lm_head.weight")


def _affine(source: str, target: str) -> tuple[Weight, ...]:
    """A layer norm."""
    return Weight(f"{source}.weight", f"{target}.scale", "d -> d"), Weight(
        f"{source}.bias", f"{target}.bias", "d -> d"
    )


def _dense(source: str, target: str, kernel: str, bias: str) -> tuple[Weight, ...]:
    """A linear layer."""
    return Weight(f"{source}.weight", f"{target}.kernel", kernel), Weight(
        f"{source}.bias", f"{target}.bias", bias
    )


def _attention(source: str, target: str) -> tuple[Weight, ...]:
    """Four projections."""
    rows = _dense(f"{source}.out_proj", f"{target}.out", "d (n h) -> n h d", "d -> d")
    for short, name in (("q", "query"), ("k", "key"), ("v", "value")):
        rows += _dense(f"{source}.{short}_proj", f"{target}.{name}", "(n h) d -> d n h", "(n h) -> n h")
    return rows


def _prompt(source: str, target: str) -> tuple[Weight, ...]:
    """A prompt: its vectors, and the MLP that makes every layer's keys and values of them."""
    return (
        Weight(f"{source}.prompt_embedding.weight", f"{target}.embed.embedding", "p d -> p d"),
        *_dense(f"{source}.prompt_trans.0", f"{target}.fc_in", "f d -> d f", "f -> f"),
        *_dense(
            f"{source}.prompt_trans.2", f"{target}.fc_out", "(l c n h) f -> f l c n h", "(l c n h) -> l c n h"
        ),
    )


def _stack(side: str) -> tuple[Weight, ...]:
    """What encoder and decoder both have."""
    source = f"model.{side}.layers.{{}}"
    return (
        Weight(f"model.{side}.embed_positions.weight", f"{side}.positions.embedding", "p d -> p d"),
        *_affine(f"model.{side}.layernorm_embedding", f"{side}.embed_norm"),
        *_attention(f"{source}.self_attn", f"{side}.layers.attention"),
        *_affine(f"{source}.self_attn_layer_norm", f"{side}.layers.attention_norm"),
        *_dense(f"{source}.fc1", f"{side}.layers.mlp.fc_in", "f d -> d f", "f -> f"),
        *_dense(f"{source}.fc2", f"{side}.layers.mlp.fc_out", "d f -> f d", "d -> d"),
        *_affine(f"{source}.final_layer_norm", f"{side}.layers.mlp_norm"),
        *_prompt(f"model.{side}.self_attn_prompt", f"{side}.self_prompt"),
    )


_CROSS = "model.decoder.layers.{}.encoder_attn"

WEIGHTS = WeightTable(
    prefix="model.",
    weights=(
        Weight(
            "model.decoder.embed_tokens.weight",
            "embed.embedding",
            "v d -> v d",
            also=_tables("shared.weight", "encoder.embed_tokens.weight"),
            without="encoder",
        ),
        Weight(
            "model.shared.weight",
            "embed.embedding",
            "v d -> v d",
            also=_tables("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
            untied=("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"),
        ),
        *_stack("encoder"),
        *_stack("decoder"),
        *_attention(_CROSS, "decoder.layers.cross_attention"),
        *_affine(f"{_CROSS}_layer_norm", "decoder.layers.cross_attention_norm"),
        *_prompt("model.decoder.cross_attn_prompt", "decoder.cross_prompt"),
        Weight("lm_head.weight", "lm_head.kernel", "v d -> d v"),
        Weight("final_logits_bias", "final_logits_bias", "1 v -> v"),
        *_dense("classification_head.dense", "classifier.dense", "e d -> d e", "e -> e"),
        *_dense("classification_head.out_proj", "classifier.out", "c d -> d c", "c -> c"),
        *_dense("qa_outputs", "qa_outputs", "c d -> d c", "c -> c"),
    ),
)
