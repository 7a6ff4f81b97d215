"""GPT-2's configs and inputs.

Padding on the left, whose queries see nothing and attend evenly over other keys in transformers, is compared where
tokens are real: through a cache.
"""

from typing import Any

import numpy as np

from tests.parity.cases import Cases, Grid
from tests.parity.inputs import Draw

BASE = dict(vocab_size=211, n_positions=32, n_embd=48, n_layer=2, n_head=3, n_inner=31)
BASE |= dict(bos_token_id=1, eos_token_id=2, pad_token_id=0, num_labels=3)
CROSSING = dict(add_cross_attention=True)
LANGUAGE = ("GPT2Model", "GPT2LMHeadModel")
CHOOSING = ("GPT2DoubleHeadsModel",)
HEADS = (
    *("GPT2LMHeadModel", "GPT2ForSequenceClassification", "GPT2ForTokenClassification"),
    "GPT2ForQuestionAnswering",
)


def _two_logits(draw: Draw, inputs: dict[str, Any]) -> None:
    """Scores of two positions alone."""
    inputs["logits_to_keep"] = np.array([5, 2], np.int32)


def _chosen(draw: Draw, inputs: dict[str, Any]) -> None:
    """A choice is scored by any of its tokens."""
    inputs["mc_token_ids"] = draw.random.integers(0, draw.length, draw.lead).astype(np.int32)


def _apart(draw: Draw, inputs: dict[str, Any]) -> None:
    """Every choice is a row of its own: the form of embeddings and of positions that transformers takes."""
    for name in (
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "position_ids",
        "inputs_embeds",
        "mc_token_ids",
    ):
        if name in inputs and inputs[name].shape[: len(draw.lead)] == draw.lead:
            inputs[name] = inputs[name].reshape(draw.rows, *inputs[name].shape[len(draw.lead) :])


CASES = Cases(
    configs={
        "three heads": BASE,
        "five heads": BASE | dict(vocab_size=257, n_embd=50, n_head=5, n_inner=77, n_layer=3),
        "one head, rough": BASE | dict(n_head=1, n_inner=None, layer_norm_epsilon=0.1, n_layer=1),
        "another activation, untied": BASE
        | dict(activation_function="relu", num_labels=1, tie_word_embeddings=False),
        "scaled by layer": BASE | dict(scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True),
        "not scaled": BASE | dict(scale_attn_weights=False, n_layer=1),
        "crossing": BASE | CROSSING,
        "crossing, scaled by layer": BASE | CROSSING | dict(scale_attn_by_inverse_layer_idx=True),
        "another summary": BASE | dict(summary_type="mean", summary_activation="tanh", n_layer=1),
        "first summary": BASE | dict(summary_type="first", n_layer=1),
        "last summary": BASE | dict(summary_type="last", n_layer=1),
        "tiny": BASE | dict(vocab_size=37, n_positions=16, n_embd=24),
        "tiny, crossing": BASE | CROSSING | dict(vocab_size=37, n_positions=16, n_embd=24),
    },
    grids=(
        Grid(
            ("three heads",),
            (
                *("plain", "mask", "right", "right + inside", "right + no mask", "types", "positions"),
                *("shared positions", "head mask", "layer head mask", "embeds + inside", "bias"),
                "embeds + bias + types + positions + head mask",
                "one row + one token",
            ),
            ("GPT2Model",),
        ),
        Grid(("three heads",), ("right", "embeds + right"), ("GPT2ForSequenceClassification",)),
        Grid(("three heads",), ("plain", "embeds + head mask"), HEADS),
        Grid(("three heads",), ("right + two logits",), ("GPT2LMHeadModel",)),
        Grid(
            ("three heads", "five heads", "one head, rough", "another activation, untied"),
            ("right + inside + types + positions + layer head mask",),
            ("GPT2Model", *HEADS),
        ),
        Grid(
            ("three heads", "five heads", "one head, rough", "another activation, untied"),
            ("right + inside + types + shared positions + layer head mask + chosen", "plain"),
            CHOOSING,
        ),
        Grid(
            ("three heads",),
            (
                *(
                    "chosen",
                    "bias + head mask",
                    "one row + one token",
                    "types + positions + right + chosen + apart",
                ),
                "embeds + bias + chosen + apart",
            ),
            CHOOSING,
        ),
        # Given choices, transformers takes the first, the last or the mean of these and not of a choice's tokens.
        Grid(("another summary", "first summary", "last summary"), ("right + apart",), CHOOSING),
        Grid(("scaled by layer", "not scaled"), ("right + types", "plain"), LANGUAGE),
        Grid(
            ("crossing", "crossing, scaled by layer"),
            (
                "right + inside + encoder + encoder mask",
                "encoder + layer head mask + types + positions",
            ),
            LANGUAGE,
        ),
    ),
    cached=(
        Grid(
            ("three heads",),
            ("plain", "left", "left + positions + types"),
            (*LANGUAGE, "GPT2ForSequenceClassification"),
        ),
        Grid(("three heads",), ("apart", "left + positions + types + apart"), CHOOSING),
        Grid(("scaled by layer",), ("plain",), LANGUAGE),
        Grid(("crossing",), ("plain + encoder", "left + encoder + encoder mask"), LANGUAGE),
    ),
    losses={"GPT2DoubleHeadsModel": ("three heads", "right + chosen")},
    options={"two logits": _two_logits, "chosen": _chosen, "apart": _apart},
    fixtures=(
        Grid(
            ("tiny",),
            ("plain", "right + inside + types + positions + layer head mask"),
            ("GPT2Model", *HEADS),
        ),
        Grid(("tiny",), ("plain", "right + inside + types + layer head mask + chosen"), CHOOSING),
        Grid(("tiny, crossing",), ("inside + encoder + encoder mask + layer head mask",), LANGUAGE),
    ),
)
