"""MVP's configs and inputs."""

from typing import Any

import numpy as np

from tests.parity.cases import Cases, Grid
from tests.parity.inputs import Draw

BASE = dict(vocab_size=211, max_position_embeddings=24, d_model=30, num_labels=3)
BASE |= dict(encoder_layers=3, encoder_attention_heads=5, encoder_ffn_dim=37)
BASE |= dict(decoder_layers=2, decoder_attention_heads=3, decoder_ffn_dim=41)
PROMPTS = dict(use_prompt=True, prompt_length=4, prompt_mid_dim=11)
TRUNK, LM, LONE = ("MvpModel",), ("MvpForConditionalGeneration",), ("MvpForCausalLM",)
CLASSIFIER, SPANS = ("MvpForSequenceClassification",), ("MvpForQuestionAnswering",)
ALL_HEAD_MASKS = "layer head mask + decoder head mask + cross head mask"
"""Rich inputs: padding and head masks on every side."""
RICH = f"left + right + inside + decoder left + decoder right + {ALL_HEAD_MASKS}"
RICH_LONE = "left + right + inside + encoder + encoder mask + layer head mask + cross head mask"


def _same_length(draw: Draw, inputs: dict[str, Any]) -> None:
    """A decoder input of its own as long as the encoder's, which a classifier needs; padded on the left."""
    mask = draw.mask(draw.length, left=True, right=False)
    ids = np.where(mask, draw.ids(draw.length), draw.config.pad_token_id)
    inputs["decoder_input_ids"] = ids.astype(np.int32)
    inputs["decoder_attention_mask"] = mask


def _same_length_embeds(draw: Draw, inputs: dict[str, Any]) -> None:
    inputs["decoder_inputs_embeds"] = draw.floats(draw.rows, draw.length, draw.config.d_model)


def _unread_embeds(draw: Draw, inputs: dict[str, Any]) -> None:
    """inputs_embeds beside encoder_outputs, which make them needless."""
    inputs["inputs_embeds"] = draw.floats(draw.rows, draw.length, draw.config.d_model)


def _two_ends(draw: Draw, inputs: dict[str, Any]) -> None:
    """A second end token in every row."""
    inputs["input_ids"][:, 4] = draw.config.eos_token_id


def _decoder_4d_mask(draw: Draw, inputs: dict[str, Any]) -> None:
    """Ones and zeros for every pair of a query and a key, ahead of it too."""
    length = inputs["decoder_input_ids"].shape[1]
    seen = draw.random.uniform(size=(draw.rows, 1, length, length)) < 0.6
    inputs["decoder_attention_mask"] = seen.astype(np.float32)


def _encoder_layers(draw: Draw, inputs: dict[str, Any]) -> None:
    """encoder_outputs with hidden states and attentions, which come back."""
    (states,) = inputs["encoder_outputs"]
    inputs["encoder_outputs"] = (states, (states + 1, states + 2), (draw.floats(2, 3), draw.floats(4)))


CASES = Cases(
    configs={
        "five and three heads": BASE,
        "prompts": BASE | PROMPTS,
        "prompts, scaled, untied": BASE
        | dict(PROMPTS, scale_embedding=True, tie_word_embeddings=False, activation_function="gelu_new")
        | dict(prompt_length=1, encoder_attention_heads=6, num_labels=1),
        # (Of a lone decoder with more layers than the encoder torch makes a cache of too few layers: so none here.)
        "other tokens": BASE
        | dict(pad_token_id=0, bos_token_id=1, eos_token_id=7, decoder_start_token_id=9, use_cache=False)
        | dict(activation_function="relu", decoder_layers=3, encoder_layers=1, decoder_attention_heads=10),
        "one head, scaled": BASE
        | dict(vocab_size=97, d_model=13, encoder_attention_heads=1, decoder_attention_heads=1)
        | dict(scale_embedding=True, activation_function="silu"),
        "tiny": BASE | dict(PROMPTS, vocab_size=37, max_position_embeddings=16, encoder_layers=2, d_model=15),
    },
    grids=(
        Grid(
            ("prompts",),
            (
                *(
                    "plain",
                    "mask",
                    "left + right + inside",
                    "no mask + left",
                    "embeds + decoder embeds",
                ),
                *(
                    "decoder",
                    "decoder left + decoder right",
                    "decoder + decoder 4d mask",
                    ALL_HEAD_MASKS,
                    RICH,
                ),
                *("encoder outputs", "right + encoder outputs + encoder layers + no ids + decoder"),
                *("embeds + left + decoder + decoder embeds + decoder mask", "one row + one token"),
            ),
            TRUNK,
        ),
        Grid(
            ("five and three heads",),
            (
                "plain",
                f"{RICH} + embeds + decoder embeds",
                f"right + {ALL_HEAD_MASKS} + encoder outputs + decoder",
            ),
            (*TRUNK, *LM, *SPANS),
        ),
        Grid(
            ("five and three heads", "prompts"),
            (
                *("plain", "two ends", f"left + right + inside + same length + {ALL_HEAD_MASKS}"),
                "right + encoder outputs + unread embeds + same length embeds",
            ),
            CLASSIFIER,
        ),
        Grid(
            ("five and three heads",),
            ("plain", "left + right", "embeds + encoder + inside", "encoder + encoder mask", RICH_LONE),
            LONE,
        ),
        Grid(
            ("prompts", "prompts, scaled, untied", "other tokens", "one head, scaled"),
            (RICH,),
            (*TRUNK, *LM, *SPANS),
        ),
        Grid(
            ("prompts, scaled, untied", "other tokens", "one head, scaled"),
            (f"left + right + inside + {ALL_HEAD_MASKS}",),
            CLASSIFIER,
        ),
        Grid(("prompts", "prompts, scaled, untied", "other tokens", "one head, scaled"), (RICH_LONE,), LONE),
    ),
    cached=(
        Grid(
            ("five and three heads", "prompts"),
            ("decoder", f"left + right + decoder left + {ALL_HEAD_MASKS}"),
            (*TRUNK, *LM),
        ),
        Grid(("prompts",), ("encoder outputs + decoder",), TRUNK),
        Grid(
            ("five and three heads",),
            ("plain", "left", "left + encoder + encoder mask + cross head mask"),
            LONE,
        ),
    ),
    fixtures=(
        Grid(("tiny",), ("plain", RICH), (*TRUNK, *SPANS)),
        Grid(("tiny",), ("decoder", RICH), LM),
        Grid(("tiny",), ("plain", f"left + right + {ALL_HEAD_MASKS}"), CLASSIFIER),
        Grid(("tiny",), ("plain", RICH_LONE), LONE),
    ),
    losses={
        "MvpForConditionalGeneration": ("prompts", "right + decoder right"),
        "MvpForSequenceClassification": ("prompts", "right"),
        "MvpForQuestionAnswering": ("other tokens", "right + decoder"),
        "MvpForCausalLM": ("five and three heads", "right + encoder + encoder mask"),
    },
    options={
        "same length": _same_length,
        "same length embeds": _same_length_embeds,
        "unread embeds": _unread_embeds,
        "two ends": _two_ends,
        "decoder 4d mask": _decoder_4d_mask,
        "encoder layers": _encoder_layers,
    },
)
