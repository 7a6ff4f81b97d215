"""MegatronBERT: wiring only. References: Shoeybi et al., 2019, arXiv:1909.08053, and transformers 4.57.6.

BERT with its norms moved to before attention and MLP, so that deep models train, and a final norm in their place; the
embeddings have none.
"""

from modelzoo import bert, tasks


class MegatronBertBlock(bert.BertBlock):
    """One layer; attention, cross-attention and MLP each as x + f(norm(x)).

    Cross-attention has relative positions too: the distance from a token's place to an encoder's.
    """

    crosses_relatively = True


class MegatronBertModel(bert.BertTrunk):
    """The trunk: embed, a stack of blocks, a final norm, a pooler unless `add_pooling_layer` is False."""

    block_class = MegatronBertBlock


class MegatronBertForMaskedLM(bert.LMTask, tasks.MaskedLM):
    """MegatronBERT that fills in masked tokens."""

    trunk_class = MegatronBertModel


class MegatronBertForCausalLM(bert.LMTask, tasks.CausalLM):
    """MegatronBERT that scores the next token; `is_decoder` makes its attention causal."""

    trunk_class = MegatronBertModel


class MegatronBertForNextSentencePrediction(tasks.NextSentencePrediction):
    """MegatronBERT that tells whether a sentence follows another."""

    trunk_class = MegatronBertModel


class MegatronBertForPreTraining(bert.LMTask, tasks.PreTraining):
    """MegatronBERT with the two heads that it was trained with: masked tokens and the next sentence."""

    trunk_class = MegatronBertModel


class MegatronBertForSequenceClassification(tasks.PooledClassification):
    """MegatronBERT that classifies a sequence, by its pooler."""

    trunk_class = MegatronBertModel


class MegatronBertForMultipleChoice(tasks.MultipleChoice):
    """MegatronBERT that chooses among sequences."""

    trunk_class = MegatronBertModel


class MegatronBertForTokenClassification(tasks.TokenClassification):
    """MegatronBERT that classifies every token."""

    trunk_class = MegatronBertModel


class MegatronBertForQuestionAnswering(tasks.QuestionAnswering):
    """MegatronBERT that marks an answer in its text."""

    trunk_class = MegatronBertModel


__all__ = [
    "MegatronBertModel",
    "MegatronBertForMaskedLM",
    "MegatronBertForCausalLM",
    "MegatronBertForNextSentencePrediction",
    "MegatronBertForPreTraining",
    "MegatronBertForSequenceClassification",
    "MegatronBertForMultipleChoice",
    "MegatronBertForTokenClassification",
    "MegatronBertForQuestionAnswering",
]
