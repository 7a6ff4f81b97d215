"""What the models return: typed pytrees whose fields carry the names that transformers documents.

Every field is an array (or a tuple of arrays, one per layer) or None where it was not asked for.
"""

import jax
from flax import struct

from modelzoo.layers.cache import Cache

Arrays = tuple[jax.Array, ...]


@struct.dataclass
class BaseModelOutput:
    """A trunk's result.

    Attributes:
        last_hidden_state: [B, T, D], after the final norm.
        cache: the filled cache, when one was passed in.
        hidden_states: L + 1 arrays [B, T, D]: the embeddings, then each layer; the last one is normed.
        attentions: L arrays [B, N, T, S] of probabilities.
    """

    last_hidden_state: jax.Array
    cache: Cache | None = None
    hidden_states: Arrays | None = None
    attentions: Arrays | None = None


@struct.dataclass
class CausalLMOutput:
    """Next-token scores: logits [B, T, V]; columns past the true vocabulary are minus infinity."""

    logits: jax.Array
    cache: Cache | None = None
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
class QuestionAnsweringOutput:
    """Scores of an answer's first and last token: start_logits and end_logits [B, T]."""

    start_logits: jax.Array
    end_logits: jax.Array
    hidden_states: Arrays | None = None
    attentions: Arrays | None = None
