"""BLOOM's configs and inputs."""

from tests.parity.cases import Cases, Grid

BASE = dict(vocab_size=211, hidden_size=24, n_layer=2, n_head=3)
BASE |= dict(bos_token_id=1, eos_token_id=2, pad_token_id=0, num_labels=3)
HEADS = (
    "BloomForCausalLM",
    "BloomForSequenceClassification",
    "BloomForTokenClassification",
    "BloomForQuestionAnswering",
)

CASES = Cases(
    configs={
        "three heads": BASE,
        "five heads, residual after the norm": BASE
        | dict(
            vocab_size=257,
            hidden_size=50,
            n_head=5,
            n_layer=3,
            apply_residual_connection_post_layernorm=True,
        ),
        "one head, rough": BASE | dict(n_head=1, layer_norm_epsilon=0.1, n_layer=1),
        "eleven heads": BASE | dict(hidden_size=44, n_head=11, num_labels=1),
        "four heads, untied": BASE | dict(n_head=4, tie_word_embeddings=False),
        "tiny": BASE | dict(vocab_size=37),
    },
    grids=(
        Grid(
            ("three heads",),
            (
                *("plain", "mask", "left", "right", "left + right + inside + empty", "no mask"),
                *("head mask", "layer head mask", "embeds + left", "one row + one token"),
            ),
            ("BloomModel",),
        ),
        Grid(("three heads",), ("right", "embeds + right"), ("BloomForSequenceClassification",)),
        Grid(("three heads",), ("plain", "embeds + head mask"), HEADS),
        Grid(
            (
                *("three heads", "five heads, residual after the norm", "one head, rough", "eleven heads"),
                "four heads, untied",
            ),
            ("left + right + layer head mask",),
        ),
    ),
    cached=(
        Grid(
            ("three heads", "eleven heads"),
            ("plain", "left"),
            ("BloomModel", "BloomForCausalLM", "BloomForSequenceClassification"),
        ),
    ),
    fixtures=(Grid(("tiny",), ("plain", "left + right + layer head mask")),),
)
