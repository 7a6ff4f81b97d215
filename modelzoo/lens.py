"""The logit lens: what a language model would say if it stopped after each layer.

Reference: nostalgebraist, 2020, "interpreting GPT: the logit lens"; every layer's state goes through the model's own
final norm and head.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from modelzoo.model import LM_TASKS, Model


def logit_lens(model: Model, params: Any, hidden_states: Sequence[jax.Array]) -> jax.Array:
    """Scores of the vocabulary by the states of every layer.

    Args:
        model: a language model with one stack, such as GPTJForCausalLM.
        params: of it.
        hidden_states: L + 1 arrays [B, T, D], as `output_hidden_states=True` returns them: the last is normed already.

    Returns:
        [L + 1, B, T, V]: by the embeddings, then by each layer; the last are the model's own logits.

    Raises:
        ValueError: the model has no LM head, or two stacks.
    """
    if model.task not in LM_TASKS - {"double_heads", "seq2seq_lm"}:
        raise ValueError(
            f"{type(model).__name__} has no logit lens: pass a language model with one stack, such as GPTJForCausalLM"
        )

    def read(bound: Any, *states: jax.Array) -> jax.Array:
        trunk, (*inner, last) = bound.trunk, states
        normed = [trunk.final_norm(state) for state in inner] if hasattr(trunk, "final_norm") else inner
        return jnp.stack([bound.lm_head(state, trunk.embedding_table()) for state in (*normed, last)])

    return model.apply({"params": params}, *hidden_states, method=read)  # pyright: ignore[reportReturnType]
