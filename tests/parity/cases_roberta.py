"""RoBERTa's configs and inputs."""

from tests.parity.cases import Cases, Grid

BASE = dict(vocab_size=211, hidden_size=36, num_hidden_layers=2, num_attention_heads=3, intermediate_size=31)
BASE |= dict(max_position_embeddings=24, type_vocab_size=3, layer_norm_eps=1e-5, num_labels=3)
DECODER = BASE | dict(is_decoder=True, add_cross_attention=True)
# With a cache, which a decoder keeps unless told not to, transformers takes every token of a call for its last one.
RELATIVE = dict(use_cache=False, position_embedding_type="relative_key")
BOTH_WAYS = RELATIVE | dict(position_embedding_type="relative_key_query")

LANGUAGE_MODELS = ("RobertaForCausalLM", "RobertaForMaskedLM")
HEADS = (
    *("RobertaForSequenceClassification", "RobertaForTokenClassification", "RobertaForQuestionAnswering"),
    "RobertaForMultipleChoice",
)
DECODERS = ("RobertaModel", *LANGUAGE_MODELS)

CASES = Cases(
    configs={
        "three heads": BASE,
        "five heads, padding 7": BASE
        | dict(
            vocab_size=257, hidden_size=50, num_attention_heads=5, intermediate_size=77, num_hidden_layers=3
        )
        | dict(pad_token_id=7, bos_token_id=3, eos_token_id=4, num_labels=1, type_vocab_size=1),
        "one head, padding 0, rough": BASE
        | dict(
            hidden_size=12, num_attention_heads=1, pad_token_id=0, layer_norm_eps=0.1, num_hidden_layers=1
        ),
        "untied, another activation": BASE | dict(tie_word_embeddings=False, hidden_act="relu"),
        "relative key": BASE | RELATIVE,
        "relative key and query": BASE | BOTH_WAYS,
        "decoder": DECODER,
        "decoder alone": BASE | dict(is_decoder=True, hidden_act="quick_gelu"),
        "decoder, relative key": DECODER | RELATIVE,
        "decoder, relative key and query": DECODER | BOTH_WAYS,
        "tiny": BASE | dict(vocab_size=37),
        "tiny decoder": DECODER | dict(vocab_size=37),
    },
    grids=(
        Grid(
            ("three heads",),
            (
                *(
                    "plain",
                    "mask",
                    "left",
                    "right",
                    "left + right + inside + empty",
                    "no mask + right",
                    "types",
                ),
                *("positions", "shared positions", "head mask", "layer head mask", "embeds", "embeds + left"),
                *("3d mask", "3d mask + embeds + types + positions + layer head mask", "one row + one token"),
            ),
            ("RobertaModel",),
        ),
        Grid(
            ("three heads",),
            ("plain", "embeds + head mask", "left + right + types + positions + layer head mask"),
            (*LANGUAGE_MODELS, *HEADS),
        ),
        Grid(
            ("five heads, padding 7", "one head, padding 0, rough", "untied, another activation"),
            ("left + right + inside",),
        ),
        Grid(("relative key", "relative key and query"), ("left + right + layer head mask",)),
        Grid(
            ("decoder",),
            (
                *("left + right + encoder + encoder mask", "encoder + layer head mask + types + positions"),
                "3d mask + encoder",
            ),
            DECODERS,
        ),
        Grid(("decoder alone",), ("left + right + inside", "embeds + positions"), DECODERS),
        Grid(
            ("decoder, relative key", "decoder, relative key and query"),
            ("left + right + encoder + encoder mask",),
            DECODERS,
        ),
    ),
    cached=(
        Grid(
            ("decoder",),
            ("plain + encoder", "left + positions + types + encoder + encoder mask"),
            ("RobertaModel", "RobertaForCausalLM"),
        ),
        Grid(("decoder alone",), ("plain", "left + positions"), ("RobertaModel", "RobertaForCausalLM")),
    ),
    fixtures=(
        Grid(("tiny",), ("left + right + types",)),
        Grid(("tiny decoder",), ("left + encoder + encoder mask + layer head mask",), DECODERS),
    ),
    losses={
        "RobertaForCausalLM": ("decoder", "left + right + encoder + encoder mask"),
        "RobertaModel": "three heads",
    },
)
