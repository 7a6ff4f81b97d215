"""MegatronBERT's configs and inputs; every activation that transformers documents."""

from tests.parity.cases import Cases, Grid

BASE = dict(vocab_size=223, hidden_size=45, num_hidden_layers=2, num_attention_heads=3, intermediate_size=37)
BASE |= dict(max_position_embeddings=17, type_vocab_size=2, num_labels=5, bos_token_id=1, eos_token_id=2)
DECODER = BASE | dict(is_decoder=True, add_cross_attention=True)
# Why there is no cache: see cases_roberta.py.
RELATIVE = dict(use_cache=False, position_embedding_type="relative_key")
BOTH_WAYS = RELATIVE | dict(position_embedding_type="relative_key_query")
ACTIVATIONS = (
    *("gelu_10", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "gelu_python_tanh"),
    *("gelu_accurate", "laplace", "leaky_relu", "linear", "mish", "quick_gelu", "relu", "relu2", "relu6"),
    *("sigmoid", "silu", "swish", "tanh"),
)

POOLED = (
    *("MegatronBertForNextSentencePrediction", "MegatronBertForPreTraining"),
    *("MegatronBertForSequenceClassification", "MegatronBertForMultipleChoice"),
)
OF_TOKENS = ("MegatronBertForTokenClassification", "MegatronBertForQuestionAnswering")
DECODERS = ("MegatronBertModel", "MegatronBertForCausalLM", "MegatronBertForMaskedLM")

CASES = Cases(
    configs={
        "three heads": BASE,
        "seven heads, padding 5": BASE
        | dict(
            vocab_size=263, hidden_size=42, num_attention_heads=7, num_hidden_layers=3, intermediate_size=23
        )
        | dict(pad_token_id=5, type_vocab_size=4, num_labels=1),
        "one head, no padding, rough": BASE
        | dict(
            hidden_size=10, num_attention_heads=1, pad_token_id=None, layer_norm_eps=0.1, num_hidden_layers=1
        ),
        "untied": BASE | dict(tie_word_embeddings=False),
        "relative key": BASE | RELATIVE,
        "relative key and query": BASE | BOTH_WAYS,
        "decoder": DECODER,
        "decoder alone": BASE | dict(is_decoder=True),
        "decoder, relative key": DECODER | RELATIVE,
        "decoder, relative key and query": DECODER | BOTH_WAYS,
        **{name: BASE | dict(hidden_act=name, num_hidden_layers=1) for name in ACTIVATIONS},
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
            ("MegatronBertModel",),
        ),
        Grid(
            ("three heads",),
            ("plain", "embeds + head mask", "left + right + types + positions + layer head mask"),
            (*DECODERS[1:], *POOLED, *OF_TOKENS),
        ),
        Grid(
            ("seven heads, padding 5", "one head, no padding, rough", "untied"),
            ("left + right + inside + types",),
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
        Grid(ACTIVATIONS, ("left + right",), ("MegatronBertForPreTraining",)),
    ),
    cached=(
        Grid(
            ("decoder",),
            ("plain + encoder", "left + positions + types + encoder + encoder mask"),
            DECODERS[:2],
        ),
        Grid(("decoder alone",), ("plain", "left", "left + positions"), DECODERS[:2]),
    ),
    fixtures=(
        Grid(("tiny",), ("left + right + types",)),
        Grid(("tiny decoder",), ("left + encoder + encoder mask + layer head mask",), DECODERS),
    ),
    losses={"MegatronBertForCausalLM": ("decoder", "left + right + encoder + encoder mask")},
)
