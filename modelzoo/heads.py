"""Task heads: what stands on a trunk's hidden states."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from modelzoo.axes import constrain
from modelzoo.layers.embed import mask_padded_vocab
from modelzoo.layers.linear import Initializer, Linear


def lm_head(model: Any, features: int, vocab_size: int, use_bias: bool, kernel_init: Initializer) -> Linear:
    """The projection onto the vocabulary, with `model`'s dtypes; its result goes through `lm_logits`."""
    axes = ("embed", "vocab")
    return Linear((features,), (vocab_size,), axes, use_bias, kernel_init, model.dtype, model.param_dtype)


def lm_logits(logits: jax.Array, vocab_size: int) -> jax.Array:
    """Lays logits [B, T, V] on the mesh and sets the columns that padding added to minus infinity."""
    return mask_padded_vocab(constrain(logits, "act_batch", "act_length", "act_vocab"), vocab_size)


def classifier(
    model: Any, features: int, num_labels: int, use_bias: bool, kernel_init: Initializer
) -> Linear:
    """A projection onto classes, never sharded by class."""
    axes = ("embed", None)
    return Linear((features,), (num_labels,), axes, use_bias, kernel_init, model.dtype, model.param_dtype)


def span_logits(logits_BT2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Splits an answer head's scores into (start_logits, end_logits), each [B, T]."""
    return logits_BT2[..., 0], logits_BT2[..., 1]


def keep_last(x_BTD: jax.Array, logits_to_keep: int | jax.Array) -> jax.Array:
    """The positions whose logits are wanted.

    Args:
        x_BTD: hidden states.
        logits_to_keep: 0 keeps all, n the last n, an int array [K] those positions.
    """
    if isinstance(logits_to_keep, (int, np.integer)):
        return x_BTD[:, -logits_to_keep:] if logits_to_keep else x_BTD
    return jnp.take(x_BTD, logits_to_keep, axis=1)


def last_token(values_BTC: jax.Array, input_ids: jax.Array | None, pad_token_id: int | None) -> jax.Array:
    """The values at each row's last token that is not padding: how a causal model classifies a sequence.

    Without input_ids (embeddings were passed) or without a padding token it is the last position.

    Args:
        values_BTC: [B, T, C].
        input_ids: [B, T].
        pad_token_id: the padding token.

    Returns:
        [B, C].

    Raises:
        ValueError: more than one row and no padding token, so that rows could not differ in length.
    """
    batch, length = values_BTC.shape[:2]
    if pad_token_id is None and batch != 1:
        raise ValueError(
            f"cannot classify a batch of {batch} sequences without a padding token: set pad_token_id in the config"
        )
    if pad_token_id is None or input_ids is None:
        return values_BTC[:, -1]
    position = jnp.arange(length, dtype=jnp.int32)
    last = jnp.argmax(jnp.where(input_ids != pad_token_id, position, 0), axis=-1)
    return jnp.take_along_axis(values_BTC, last[:, None, None], axis=1)[:, 0]
