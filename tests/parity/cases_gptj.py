"""GPT-J's configs and inputs."""

from tests.parity.cases import Cases, Grid

BASE = dict(vocab_size=211, n_positions=32, n_embd=24, n_layer=2, n_head=3, rotary_dim=4, n_inner=31)
BASE |= dict(bos_token_id=1, eos_token_id=2, pad_token_id=0, num_labels=3)

CASES = Cases(
    configs={
        "three heads": BASE,
        "five heads": BASE | dict(vocab_size=257, n_embd=50, n_head=5, rotary_dim=10, n_inner=77, n_layer=3),
        "one head, all of it rotary": BASE | dict(n_embd=12, n_head=1, rotary_dim=12, n_inner=None),
        "little rotary, rough": BASE
        | dict(n_embd=48, n_head=2, rotary_dim=2, n_layer=1, layer_norm_epsilon=0.1),
        "another activation": BASE | dict(activation_function="quick_gelu", rotary_dim=6, num_labels=1),
        "tiny": BASE | dict(vocab_size=37, n_positions=16),
    },
    grids=(
        Grid(
            ("three heads",),
            (
                *("plain", "mask", "left", "right", "left + right + inside + empty", "types", "positions"),
                *("shared positions", "head mask", "layer head mask", "embeds + left", "bias"),
                "embeds + bias + types + positions + head mask",
                "one row + one token",
            ),
            ("GPTJModel",),
        ),
        Grid(("three heads",), ("right", "embeds + right"), ("GPTJForSequenceClassification",)),
        Grid(
            ("three heads",),
            ("plain", "embeds + head mask"),
            ("GPTJForCausalLM", "GPTJForSequenceClassification", "GPTJForQuestionAnswering"),
        ),
        Grid(
            (
                *("three heads", "five heads", "one head, all of it rotary", "little rotary, rough"),
                "another activation",
            ),
            ("left + right + types + positions + layer head mask",),
        ),
    ),
    cached=(
        Grid(
            ("three heads",),
            ("plain", "left", "left + positions + types"),
            ("GPTJModel", "GPTJForCausalLM", "GPTJForSequenceClassification"),
        ),
    ),
    fixtures=(Grid(("tiny",), ("plain", "left + right + types + positions + layer head mask")),),
)
