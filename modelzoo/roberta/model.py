"""RoBERTa: wiring only. References: Liu et al., 2019, arXiv:1907.11692, and transformers 4.57.6.

BERT with its norms after attention and MLP, and a norm on the embeddings. Positions are counted from pad_token_id:
padding stands at that position, a row's tokens at the next ones. Departure from transformers: with a cache they go on
from the tokens that a row has so far, so that decoding equals the whole sequence at once; transformers counts padding
too there, and for embeddings begins anew.
"""

import jax
import jax.numpy as jnp

from modelzoo import bert, tasks
from modelzoo.layers.cache import Cache
from modelzoo.layers.position import count_in_segments, segment_positions


class RobertaBlock(bert.BertBlock):
    """One layer; attention, cross-attention and MLP each as norm(x + f(x)). Cross-attention has absolute positions."""


class RobertaModel(bert.BertTrunk):
    """The trunk: embed and norm, a stack of blocks, a pooler unless `add_pooling_layer` is False."""

    block_class = RobertaBlock
    pads_positions = True

    def setup(self) -> None:
        super().setup()
        self.embed_norm = self.norm()

    def default_positions(
        self,
        input_ids: jax.Array | None,
        slots_T: jax.Array,
        cache: Cache | None,
        segment_ids: jax.Array | None,
    ) -> jax.Array:
        """Each row's tokens counted from after pad_token_id, its padding at pad_token_id; of embeddings all count."""
        if input_ids is None:
            places = jnp.atleast_2d(slots_T) if segment_ids is None else segment_positions(segment_ids)
            return self.config.first_position + places
        real_BT = input_ids != self.config.pad_token_id
        count_BT = count_in_segments(real_BT, segment_ids)
        if cache is not None:
            earlier_BS = cache.mask & (jnp.arange(cache.mask.shape[1]) < jnp.atleast_2d(slots_T)[:, :1])
            count_BT = count_BT + jnp.sum(earlier_BS, axis=1, keepdims=True, dtype=jnp.int32)
        return self.config.pad_token_id + jnp.where(real_BT, count_BT, 0)


class RobertaForCausalLM(bert.LMTask, tasks.CausalLM):
    """RoBERTa that scores the next token; `is_decoder` makes its attention causal."""

    trunk_class = RobertaModel


class RobertaForMaskedLM(bert.LMTask, tasks.MaskedLM):
    """RoBERTa that fills in masked tokens, what it was trained for."""

    trunk_class = RobertaModel


class RobertaForSequenceClassification(tasks.FirstTokenClassification):
    """RoBERTa that classifies a sequence, by its first token."""

    trunk_class = RobertaModel


class RobertaForTokenClassification(tasks.TokenClassification):
    """RoBERTa that classifies every token."""

    trunk_class = RobertaModel


class RobertaForQuestionAnswering(tasks.QuestionAnswering):
    """RoBERTa that marks an answer in its text."""

    trunk_class = RobertaModel


class RobertaForMultipleChoice(tasks.MultipleChoice):
    """RoBERTa that chooses among sequences. Its dropout is the trunk's, not `classifier_dropout`."""

    trunk_class = RobertaModel

    @property
    def head_dropout(self) -> float:
        return self.config.hidden_dropout_prob


__all__ = [
    "RobertaModel",
    "RobertaForCausalLM",
    "RobertaForMaskedLM",
    "RobertaForSequenceClassification",
    "RobertaForTokenClassification",
    "RobertaForQuestionAnswering",
    "RobertaForMultipleChoice",
]
