"""Task heads: what stands on a trunk's hidden states. `modelzoo.tasks` puts them on trunks."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from modelzoo.axes import constrain
from modelzoo.layers.embed import mask_padded_vocab
from modelzoo.layers.linear import (
    Initializer,
    Linear,
    add_adapter,
    add_bias,
    dropout_layer,
    parameter,
    product,
)
from modelzoo.layers.mlp import get_activation
from modelzoo.layers.norm import make_norm
from modelzoo.layers.quantized import is_quantized


class LMHead(nn.Module):
    """Scores over the vocabulary: [dense, activation, norm,] projection [, bias].

    Attributes:
        features: D.
        vocab_size: V, the true number of columns; parameters that a mesh padded give more, at minus infinity.
        use_bias: a bias [V].
        tied: the projection is the embedding table, passed in at each call. A parameter `kernel` [D, V] may still be
            passed to `apply`, a transposed copy of the table: see `untie`.
        transform: activation of a dense layer [D, D] and a norm before the projection; None has neither.
        norm, norm_epsilon: of that norm (`layers.norm.make_norm`).
    """

    features: int
    vocab_size: int
    use_bias: bool = False
    tied: bool = False
    transform: str | None = None
    norm: str = "layer"
    norm_epsilon: float = 1e-5
    kernel_init: Initializer = nn.initializers.normal(0.02)
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array, embedding_VD: jax.Array) -> jax.Array:
        """Scores hidden states.

        Args:
            x_BTD: [B, T, D].
            embedding_VD: the table of the trunk's embedding; read where the head is tied to it.

        Returns:
            [B, T, V], columns that padding added at minus infinity.
        """
        dtypes, width = dict(dtype=self.dtype, param_dtype=self.param_dtype), (self.features,)
        if self.transform is not None:
            dense = Linear(
                width, width, ("embed", None), kernel_init=self.kernel_init, name="dense", **dtypes
            )
            x_BTD = get_activation(self.transform)(dense(x_BTD))
            x_BTD = make_norm(self.norm, self.features, self.norm_epsilon, name="norm", **dtypes)(x_BTD)
        x_BTD = constrain(x_BTD, "act_batch", "act_length", "act_embed")
        if self.tied and not self.has_variable("params", "kernel"):
            kernel_DV = embedding_VD.T if is_quantized(embedding_VD) else embedding_VD.astype(self.dtype).T
        else:
            shape, axes = (self.features, self.vocab_size), ("embed", "vocab")
            kernel_DV = parameter(self, "kernel", self.kernel_init, shape, axes, self.param_dtype, self.dtype)
        x_BTD = x_BTD.astype(self.dtype)
        sizes = (self.features,), (self.vocab_size,), ("embed", "vocab")
        logits = add_adapter(self, x_BTD, product(x_BTD, kernel_DV, 1), *sizes)
        if self.use_bias:
            zeros, shape = nn.initializers.zeros, (self.vocab_size,)
            logits = add_bias(
                logits, parameter(self, "bias", zeros, shape, ("vocab",), self.param_dtype, self.dtype)
            )
        return mask_padded_vocab(constrain(logits, "act_batch", "act_length", "act_vocab"), self.vocab_size)


class Pooler(nn.Module):
    """The first token's state through a dense layer and tanh: [B, T, D] -> [B, D]."""

    features: int
    kernel_init: Initializer = nn.initializers.normal(0.02)
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        dtypes, width = dict(dtype=self.dtype, param_dtype=self.param_dtype), (self.features,)
        dense = Linear(width, width, ("embed", None), kernel_init=self.kernel_init, name="dense", **dtypes)
        return jnp.tanh(dense(x_BTD[:, 0]))


class ClassificationHead(nn.Module):
    """Dropout, dense, tanh, dropout, projection onto the classes: [B, D] -> [B, C].

    Attributes:
        features: D.
        num_labels: C.
        dropout: probability, of both.
    """

    features: int
    num_labels: int
    dropout: float = 0.0
    kernel_init: Initializer = nn.initializers.normal(0.02)
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BD: jax.Array, deterministic: bool = True) -> jax.Array:
        width, classes = (self.features,), (self.num_labels,)
        shared: dict[str, Any] = dict(
            kernel_init=self.kernel_init, dtype=self.dtype, param_dtype=self.param_dtype
        )
        x_BD = dropout_layer(self.dropout)(x_BD, deterministic=deterministic)
        x_BD = jnp.tanh(Linear(width, width, ("embed", None), name="dense", **shared)(x_BD))
        x_BD = dropout_layer(self.dropout)(x_BD, deterministic=deterministic)
        return Linear(width, classes, ("embed", None), name="out", **shared)(x_BD)


def classifier(model: Any, num_labels: int, use_bias: bool = True) -> Linear:
    """A projection [..., D] -> [..., C] onto classes, never sharded by class, with `model`'s dtypes."""
    c, axes = model.config, ("embed", None)
    init = nn.initializers.normal(c.initializer_std)
    return Linear((c.hidden_size,), (num_labels,), axes, use_bias, init, model.dtype, model.param_dtype)


def summarize(x_BTD: jax.Array, how: str, places_B: jax.Array | None = None) -> jax.Array:
    """One state for each sequence: [B, T, D] -> [B, D].

    Args:
        x_BTD: [B, T, D].
        how: "first", "last", "mean", or "cls_index": the token at `places_B`, without them the last one.
        places_B: int [B].
    """
    if how == "mean":
        return x_BTD.mean(axis=1)
    if how == "cls_index" and places_B is not None:
        return jnp.take_along_axis(x_BTD, places_B[:, None, None], axis=1)[:, 0]
    return x_BTD[:, 0 if how == "first" else -1]


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


def untie(params: Any, table_path: tuple[str, ...]) -> Any:
    """Gives a tied head a transposed copy of its table, for decoding on a CPU.

    There the product of one token's state with the table runs at the memory's bandwidth only where the kernel lies
    [D, V]. The result is for `apply` alone: it is not the canonical tree.

    Args:
        params: parameters of a model with a tied `lm_head`.
        table_path: where the table stands in its trunk (`Trunk.table_path`).
    """
    embedding_VD = functools.reduce(lambda tree, name: tree[name], table_path, params["trunk"])
    kernel_DV = jax.tree.map(
        lambda array: jnp.asarray(array).T, embedding_VD
    )  # a quantized table is two arrays
    return dict(params, lm_head=dict(params.get("lm_head", {}), kernel=kernel_DV))
