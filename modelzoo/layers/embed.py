"""Embedding tables, with a vocabulary that a mesh may have padded."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from modelzoo.axes import constrain
from modelzoo.layers.linear import Initializer, parameter
from modelzoo.layers.quantized import take_rows


class Embed(nn.Module):
    """Rows of a table by id.

    Attributes:
        num_embeddings: V, the true number of rows. The table passed to `apply` may have more when `row_axis`
            is "vocab"; no id reaches those.
        features: D.
        row_axis: logical name of the rows: "vocab", or None for a table that is never sharded by row.
        padding_idx: a row that starts as zeros and that no lookup trains (a head tied to the table may), or None.
    """

    num_embeddings: int
    features: int
    row_axis: str | None = "vocab"
    padding_idx: int | None = None
    embedding_init: Initializer = nn.initializers.normal(0.02)
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        shape, axes = (self.num_embeddings, self.features), (self.row_axis, "embed")
        self.embedding = parameter(self, "embedding", self._init, shape, axes, self.param_dtype)

    @nn.nowrap
    def _init(self, rng: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        table = self.embedding_init(rng, shape, dtype)
        return table if self.padding_idx is None else table.at[self.padding_idx].set(0.0)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Looks ids up: [...] int -> [..., D]. An id outside the table gives NaN, so that it cannot pass unseen."""
        # Past the table's end goes what indexing would take for a row: negative ids, and rows that only pad the table.
        ids = jnp.asarray(ids, jnp.int32)
        ids = jnp.where((ids >= 0) & (ids < self.num_embeddings), ids, self.embedding.shape[0])
        x = take_rows(self.embedding, ids).astype(self.dtype)
        if self.row_axis is not None and ids.ndim == 2:
            # The lookup itself is not split finer by length: its ids would have to be gathered again.
            x = constrain(x, "act_batch", "act_length", "act_embed")
        if self.padding_idx is None:
            return x
        return jnp.where((ids == self.padding_idx)[..., None], jax.lax.stop_gradient(x), x)


def mask_padded_vocab(logits: jax.Array, vocab_size: int) -> jax.Array:
    """Sets the columns [..., vocab_size:] that padding added to minus infinity."""
    if logits.shape[-1] == vocab_size:
        return logits
    column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.where(column < vocab_size, logits, jnp.asarray(-jnp.inf, logits.dtype))


def embed_inputs(embed: Embed, input_ids: jax.Array | None, inputs_embeds: jax.Array | None) -> jax.Array:
    """Token embeddings [B, T, D] from ids, or as they were passed.

    Raises:
        ValueError: neither or both were passed.
    """
    if input_ids is not None and inputs_embeds is None:
        x_BTD = embed(input_ids)
    elif inputs_embeds is not None and input_ids is None:
        x_BTD = inputs_embeds.astype(embed.dtype)
    else:
        raise ValueError("pass exactly one of input_ids and inputs_embeds")
    return constrain(x_BTD, "act_batch", "act_stream", "act_embed")


def check_length(x_BTD: jax.Array, limit: int | None, field: str) -> None:
    """Refuses more tokens than the positions of a model.

    Args:
        x_BTD: embedded tokens.
        limit: the longest sequence, or None.
        field: the config's name for it.

    Raises:
        ValueError: T is past the limit.
    """
    if limit is not None and x_BTD.shape[1] > limit:
        raise ValueError(f"{x_BTD.shape[1]} tokens are more than the model's {field} = {limit}")
