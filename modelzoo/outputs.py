"""What the models return: typed pytrees whose fields carry the names that transformers documents.

Every field is an array (or a tuple of arrays, one per layer) or None where it was not asked for or does not exist.

    last_hidden_state   [B, T, D], after the final norm
    logits              [B, T, V] over the vocabulary, columns past the true one minus infinity; [B, C] of sequences;
                        [B, T, C] of tokens
    cache               the filled cache, when one was passed in
    hidden_states       L + 1 arrays [B, T, D]: the embeddings, then each layer; the last one is normed
    attentions          L arrays [B, N, T, S] of probabilities
    cross_attentions    the same, S being the encoder's length
    encoder_..., decoder_...  those of an encoder-decoder's two stacks
"""

import jax
from flax import struct

from modelzoo.layers.cache import Cache

Arrays = tuple[jax.Array, ...]


@struct.dataclass
class BaseModelOutput:
    """A trunk's result; pooler_output [B, D] is the first token's state through a trained layer."""

    last_hidden_state: jax.Array
    pooler_output: jax.Array | None = None
    cache: Cache | None = None
    hidden_states: Arrays | None = None
    attentions: Arrays | None = None
    cross_attentions: Arrays | None = None


@struct.dataclass
class CausalLMOutput:
    """Next-token scores [B, T, V]."""

    logits: jax.Array
    cache: Cache | None = None
    hidden_states: Arrays | None = None
    attentions: Arrays | None = None
    cross_attentions: Arrays | None = None


@struct.dataclass
class MaskedLMOutput:
    """Scores of the token that stands, or stood, at each position: [B, T, V]."""

    logits: jax.Array
    hidden_states: Arrays | None = None
    attentions: Arrays | None = None


@struct.dataclass
class SequenceClassifierOutput:
    """Scores of whole sequences: logits [B, C]."""

    logits: jax.Array
    cache: Cache | None = None
    hidden_states: Arrays | None = None
    attentions: Arrays | None = None


@struct.dataclass
class TokenClassifierOutput:
    """Scores of every token's class: logits [B, T, C]."""

    logits: jax.Array
    hidden_states: Arrays | None = None
    attentions: Arrays | None = None


@struct.dataclass
class QuestionAnsweringOutput:
    """Scores of an answer's first and last token: start_logits and end_logits [B, T]."""

    start_logits: jax.Array
    end_logits: jax.Array
    hidden_states: Arrays | None = None
    attentions: Arrays | None = None


@struct.dataclass
class MultipleChoiceOutput:
    """Scores of the choices: logits [B, C]; hidden states and attentions are of B * C rows."""

    logits: jax.Array
    hidden_states: Arrays | None = None
    attentions: Arrays | None = None


@struct.dataclass
class DoubleHeadsOutput:
    """Next-token scores, logits [B, C, T, V], and scores of the choices, mc_logits [B, C].

    Attentions, and hidden states but for the last, are of B * C rows; the last is [B, C, T, D].
    """

    logits: jax.Array
    mc_logits: jax.Array
    cache: Cache | None = None
    hidden_states: Arrays | None = None
    attentions: Arrays | None = None


@struct.dataclass
class NextSentencePredictorOutput:
    """Scores of "B follows A" and "B is random": logits [B, 2]."""

    logits: jax.Array
    hidden_states: Arrays | None = None
    attentions: Arrays | None = None


@struct.dataclass
class PreTrainingOutput:
    """BERT's two tasks: prediction_logits [B, T, V] and seq_relationship_logits [B, 2]."""

    prediction_logits: jax.Array
    seq_relationship_logits: jax.Array
    hidden_states: Arrays | None = None
    attentions: Arrays | None = None


@struct.dataclass
class _Seq2Seq:
    """What an encoder-decoder returns beside its result."""

    cache: Cache | None = None
    decoder_hidden_states: Arrays | None = None
    decoder_attentions: Arrays | None = None
    cross_attentions: Arrays | None = None
    encoder_last_hidden_state: jax.Array | None = None
    encoder_hidden_states: Arrays | None = None
    encoder_attentions: Arrays | None = None


@struct.dataclass(kw_only=True)
class Seq2SeqModelOutput(_Seq2Seq):
    """An encoder-decoder trunk's result: the decoder's last_hidden_state [B, T, D]."""

    last_hidden_state: jax.Array


@struct.dataclass(kw_only=True)
class Seq2SeqLMOutput(_Seq2Seq):
    """Scores of every position's token of the target: logits [B, T, V]."""

    logits: jax.Array


@struct.dataclass(kw_only=True)
class Seq2SeqSequenceClassifierOutput(_Seq2Seq):
    """Scores of whole sequences: logits [B, C]."""

    logits: jax.Array


@struct.dataclass(kw_only=True)
class Seq2SeqQuestionAnsweringOutput(_Seq2Seq):
    """Scores of an answer's first and last token: start_logits and end_logits [B, T]."""

    start_logits: jax.Array
    end_logits: jax.Array
