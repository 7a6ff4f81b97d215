"""Tasks: a trunk with a head, written once for all families.

A family's class names its trunk and what its head has in particular:

    class GPTJForCausalLM(tasks.CausalLM):
        trunk_class = GPTJModel

        def make_lm_head(self): ...

Every class takes its trunk's keyword arguments (`modelzoo.input_names`) and hands them on.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax

from modelzoo import heads
from modelzoo.layers.linear import dropout_layer
from modelzoo.layers.mlp import get_activation
from modelzoo.model import Model
from modelzoo.outputs import (
    CausalLMOutput,
    DoubleHeadsOutput,
    MaskedLMOutput,
    MultipleChoiceOutput,
    NextSentencePredictorOutput,
    PreTrainingOutput,
    QuestionAnsweringOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)


class Task(Model):
    """Base of the tasks: owns the trunk."""

    trunk_class: ClassVar[type[Model]]
    pooled: ClassVar[bool] = False
    """Whether the head reads the trunk's pooler."""

    def setup(self) -> None:
        has_choice = hasattr(self.trunk_class, "add_pooling_layer")
        self.trunk = self.build(
            self.trunk_class, **({"add_pooling_layer": self.pooled} if has_choice else {})
        )
        self.dropout = dropout_layer(self.head_dropout)

    @property
    def head_dropout(self) -> float:
        """Probability of dropping an element of what the head reads."""
        return self.config.head_dropout

    def make_lm_head(self, **options: Any) -> heads.LMHead:
        """A language-modelling head with this model's sizes and dtypes; tied where the config says so."""
        c = self.config
        init = nn.initializers.normal(c.initializer_std)
        return heads.LMHead(
            c.hidden_size,
            c.vocab_size,
            tied=c.tie_word_embeddings,
            kernel_init=init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            **options,
        )


class CausalLM(Task):
    """Scores the next token at every position, or at those that `logits_to_keep` names."""

    task: ClassVar[str] = "causal_lm"

    def setup(self) -> None:
        super().setup()
        self.lm_head = self.make_lm_head()

    def __call__(
        self, input_ids: jax.Array | None = None, logits_to_keep: int | jax.Array = 0, **inputs: Any
    ) -> CausalLMOutput:
        """Runs trunk and head; `inputs` are the trunk's, `logits_to_keep` is `heads.keep_last`'s."""
        out = self.trunk(input_ids, **inputs)
        x_BTD = heads.keep_last(out.last_hidden_state, logits_to_keep)
        logits = self.lm_head(x_BTD, self.trunk.embedding_table())
        return CausalLMOutput(logits, out.cache, out.hidden_states, out.attentions, out.cross_attentions)


class MaskedLM(Task):
    """Scores the token that stands, or stood before it was masked, at every position."""

    task: ClassVar[str] = "masked_lm"

    def setup(self) -> None:
        super().setup()
        self.lm_head = self.make_lm_head()

    def __call__(self, input_ids: jax.Array | None = None, **inputs: Any) -> MaskedLMOutput:
        """Runs trunk and head; `inputs` are the trunk's."""
        out = self.trunk(input_ids, **inputs)
        logits = self.lm_head(out.last_hidden_state, self.trunk.embedding_table())
        return MaskedLMOutput(logits, out.hidden_states, out.attentions)


class LastTokenClassification(Task):
    """Classifies a sequence by its last token that is not padding: how causal models do it."""

    task: ClassVar[str] = "sequence_classification"

    def setup(self) -> None:
        super().setup()
        self.score = heads.classifier(self, self.config.num_labels, use_bias=False)

    def __call__(self, input_ids: jax.Array | None = None, **inputs: Any) -> SequenceClassifierOutput:
        """Runs trunk and head; `inputs` are the trunk's."""
        out = self.trunk(input_ids, **inputs)
        logits = heads.last_token(self.score(out.last_hidden_state), input_ids, self.config.pad_token_id)
        return SequenceClassifierOutput(logits, out.cache, out.hidden_states, out.attentions)


class FirstTokenClassification(Task):
    """Classifies a sequence by its first token's state, through a head with a layer of its own."""

    task: ClassVar[str] = "sequence_classification"

    def setup(self) -> None:
        super().setup()
        c = self.config
        init = nn.initializers.normal(c.initializer_std)
        self.classifier = heads.ClassificationHead(
            c.hidden_size, c.num_labels, self.head_dropout, init, self.dtype, self.param_dtype
        )

    def __call__(
        self, input_ids: jax.Array | None = None, deterministic: bool = True, **inputs: Any
    ) -> SequenceClassifierOutput:
        """Runs trunk and head; `inputs` are the trunk's."""
        out = self.trunk(input_ids, deterministic=deterministic, **inputs)
        logits = self.classifier(out.last_hidden_state[:, 0], deterministic)
        return SequenceClassifierOutput(logits, None, out.hidden_states, out.attentions)


class PooledClassification(Task):
    """Classifies a sequence by the trunk's pooler."""

    task: ClassVar[str] = "sequence_classification"
    pooled: ClassVar[bool] = True

    def setup(self) -> None:
        super().setup()
        self.classifier = heads.classifier(self, self.config.num_labels)

    def __call__(
        self, input_ids: jax.Array | None = None, deterministic: bool = True, **inputs: Any
    ) -> SequenceClassifierOutput:
        """Runs trunk and head; `inputs` are the trunk's."""
        out = self.trunk(input_ids, deterministic=deterministic, **inputs)
        logits = self.classifier(self.dropout(out.pooler_output, deterministic=deterministic))
        return SequenceClassifierOutput(logits, None, out.hidden_states, out.attentions)


class TokenClassification(Task):
    """Classifies every token."""

    task: ClassVar[str] = "token_classification"

    def setup(self) -> None:
        super().setup()
        self.classifier = heads.classifier(self, self.config.num_labels)

    def __call__(
        self, input_ids: jax.Array | None = None, deterministic: bool = True, **inputs: Any
    ) -> TokenClassifierOutput:
        """Runs trunk and head; `inputs` are the trunk's."""
        out = self.trunk(input_ids, deterministic=deterministic, **inputs)
        logits = self.classifier(self.dropout(out.last_hidden_state, deterministic=deterministic))
        return TokenClassifierOutput(logits, out.hidden_states, out.attentions)


class QuestionAnswering(Task):
    """Scores every token as an answer's first and last."""

    task: ClassVar[str] = "question_answering"

    def setup(self) -> None:
        super().setup()
        self.qa_outputs = heads.classifier(self, 2)

    def __call__(self, input_ids: jax.Array | None = None, **inputs: Any) -> QuestionAnsweringOutput:
        """Runs trunk and head; `inputs` are the trunk's."""
        out = self.trunk(input_ids, **inputs)
        start, end = heads.span_logits(self.qa_outputs(out.last_hidden_state))
        return QuestionAnsweringOutput(start, end, out.hidden_states, out.attentions)


class MultipleChoice(Task):
    """Scores C choices, each a sequence of its own, by the trunk's pooler.

    input_ids, attention_mask, token_type_ids and position_ids are [B, C, T], inputs_embeds [B, C, T, D].
    """

    task: ClassVar[str] = "multiple_choice"
    pooled: ClassVar[bool] = True

    def setup(self) -> None:
        super().setup()
        self.classifier = heads.classifier(self, 1)

    def __call__(
        self, input_ids: jax.Array | None = None, deterministic: bool = True, **inputs: Any
    ) -> MultipleChoiceOutput:
        """Runs every choice as a row of its own; `inputs` are the trunk's, with a dimension of choices."""
        rows, lead = _by_row(dict(inputs, input_ids=input_ids))
        out = self.trunk(deterministic=deterministic, **rows)
        scores = self.classifier(self.dropout(out.pooler_output, deterministic=deterministic))
        return MultipleChoiceOutput(scores.reshape(lead), out.hidden_states, out.attentions)


class DoubleHeads(Task):
    """Scores the next token at every position, and C choices, each a sequence of its own, by one token's state.

    input_ids, attention_mask, token_type_ids and position_ids are [B, C, T], inputs_embeds [B, C, T, D]; without the
    dimension C, each row is scored by itself. The config's summary_type, summary_activation and summary_first_dropout
    say how the choices are scored. Departure: a summary_type other than "cls_index" is of a choice's tokens here, where
    transformers takes it of the choices, unless each is a row.
    """

    task: ClassVar[str] = "double_heads"

    def setup(self) -> None:
        super().setup()
        self.lm_head = self.make_lm_head()
        self.choice_head = heads.classifier(self, 1)

    @property
    def head_dropout(self) -> float:
        return self.config.summary_first_dropout

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        mc_token_ids: jax.Array | None = None,
        deterministic: bool = True,
        **inputs: Any,
    ) -> DoubleHeadsOutput:
        """Runs every choice as a row of its own.

        Args:
            input_ids: [B, C, T] or [B, T].
            mc_token_ids: int [B, C] or [B], the place of the token that a choice is scored by; None is the last one.
            deterministic: no dropout.
            inputs: the trunk's.
        """
        c = self.config
        rows, lead = _by_row(dict(inputs, input_ids=input_ids))
        out = self.trunk(deterministic=deterministic, **rows)
        x_RTD = out.last_hidden_state
        logits = self.lm_head(x_RTD, self.trunk.embedding_table())
        places_R = None if mc_token_ids is None else mc_token_ids.reshape(-1)
        state_RD = heads.summarize(x_RTD, c.summary_type, places_R)
        scores = self.choice_head(self.dropout(state_RD, deterministic=deterministic))
        if c.summary_activation is not None:
            scores = get_activation(c.summary_activation)(scores)

        def by_choice(x: jax.Array) -> jax.Array:
            return x.reshape(*lead, *x.shape[1:])

        hidden_states = out.hidden_states
        if hidden_states is not None:
            hidden_states = (*hidden_states[:-1], by_choice(hidden_states[-1]))
        return DoubleHeadsOutput(
            by_choice(logits), scores.reshape(lead), out.cache, hidden_states, out.attentions
        )


_RANKS = {"input_ids": 1, "attention_mask": 1, "token_type_ids": 1, "position_ids": 1, "inputs_embeds": 2}
"""Dimensions that one choice has, of inputs that have one of choices besides."""


def _by_row(inputs: dict[str, Any]) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Inputs with every choice as a row of its own, and what the rows were: (B, C), or (B,) without choices."""
    given = next((name for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None), None)
    if given is None:
        raise ValueError("pass exactly one of input_ids and inputs_embeds")
    lead = inputs[given].shape[: inputs[given].ndim - _RANKS[given]]
    for name, rank in _RANKS.items():
        x = inputs.get(name)
        if x is not None and x.ndim < 4 + (rank > 1):  # a mask [rows, 1, T, S] is by row already
            inputs[name] = x.reshape(-1, *x.shape[x.ndim - rank :])
    return inputs, lead


class NextSentencePrediction(Task):
    """Scores, by the trunk's pooler, whether the second sentence follows the first (0) or is random (1)."""

    task: ClassVar[str] = "next_sentence"
    pooled: ClassVar[bool] = True

    def setup(self) -> None:
        super().setup()
        self.seq_relationship = heads.classifier(self, 2)

    def __call__(self, input_ids: jax.Array | None = None, **inputs: Any) -> NextSentencePredictorOutput:
        """Runs trunk and head; `inputs` are the trunk's."""
        out = self.trunk(input_ids, **inputs)
        logits = self.seq_relationship(out.pooler_output)
        return NextSentencePredictorOutput(logits, out.hidden_states, out.attentions)


class PreTraining(Task):
    """BERT's two pretraining tasks at once: masked tokens and the next sentence."""

    task: ClassVar[str] = "pretraining"
    pooled: ClassVar[bool] = True

    def setup(self) -> None:
        super().setup()
        self.lm_head = self.make_lm_head()
        self.seq_relationship = heads.classifier(self, 2)

    def __call__(self, input_ids: jax.Array | None = None, **inputs: Any) -> PreTrainingOutput:
        """Runs trunk and heads; `inputs` are the trunk's."""
        out = self.trunk(input_ids, **inputs)
        logits = self.lm_head(out.last_hidden_state, self.trunk.embedding_table())
        return PreTrainingOutput(
            logits, self.seq_relationship(out.pooler_output), out.hidden_states, out.attentions
        )
