"""Outputs are pytrees with the field names that transformers documents."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from modelzoo import outputs

STATES = ["hidden_states", "attentions"]
SEQ2SEQ = [
    "cache",
    "decoder_hidden_states",
    "decoder_attentions",
    "cross_attentions",
    "encoder_last_hidden_state",
    "encoder_hidden_states",
    "encoder_attentions",
]
ALL = [
    (outputs.BaseModelOutput, ["last_hidden_state", "pooler_output", "cache", *STATES, "cross_attentions"]),
    (outputs.CausalLMOutput, ["logits", "cache", *STATES, "cross_attentions"]),
    (outputs.MaskedLMOutput, ["logits", *STATES]),
    (outputs.SequenceClassifierOutput, ["logits", "cache", *STATES]),
    (outputs.TokenClassifierOutput, ["logits", *STATES]),
    (outputs.QuestionAnsweringOutput, ["start_logits", "end_logits", *STATES]),
    (outputs.MultipleChoiceOutput, ["logits", *STATES]),
    (outputs.DoubleHeadsOutput, ["logits", "mc_logits", "cache", *STATES]),
    (outputs.NextSentencePredictorOutput, ["logits", *STATES]),
    (outputs.PreTrainingOutput, ["prediction_logits", "seq_relationship_logits", *STATES]),
    (outputs.Seq2SeqModelOutput, [*SEQ2SEQ, "last_hidden_state"]),
    (outputs.Seq2SeqLMOutput, [*SEQ2SEQ, "logits"]),
    (outputs.Seq2SeqSequenceClassifierOutput, [*SEQ2SEQ, "logits"]),
    (outputs.Seq2SeqQuestionAnsweringOutput, [*SEQ2SEQ, "start_logits", "end_logits"]),
]


def test_every_output_is_listed_here():
    defined = {value for value in vars(outputs).values() if dataclasses.is_dataclass(value)}
    defined = {
        cls for cls in defined if cls.__module__ == outputs.__name__ and not cls.__name__.startswith("_")
    }
    assert defined == {cls for cls, _ in ALL}


@pytest.mark.parametrize(("cls", "names"), ALL)
def test_field_names(cls, names):
    assert [field.name for field in dataclasses.fields(cls)] == names


@pytest.mark.parametrize(("cls", "names"), ALL)
def test_what_was_not_asked_for_is_none_and_no_leaf(cls, names):
    required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
    value = cls(**{name: jnp.ones(3) for name in required})
    assert len(jax.tree.leaves(value)) == len(required)
    assert all(getattr(value, name) is None for name in set(names) - set(required))


@pytest.mark.parametrize(("cls", "names"), ALL)
def test_outputs_pass_through_jit(cls, names):
    value = cls(**{name: jnp.full(2, i) for i, name in enumerate(names)})
    doubled = jax.jit(lambda v: jax.tree.map(lambda x: 2 * x, v))(value)
    assert type(doubled) is cls
    assert [int(getattr(doubled, name)[0]) for name in names] == [2 * i for i in range(len(names))]


def test_outputs_are_immutable():
    value = outputs.CausalLMOutput(logits=jnp.ones(2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        value.__setattr__("logits", None)
