"""The decode loop's calls of a model: prompts into a new cache, tokens after them, and rows of a cache.

Nothing here knows an architecture: a model takes token ids and a cache, an encoder-decoder its encoder's ids besides.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import modelzoo


def prefill(
    model: modelzoo.Model,
    params: Any,
    input_ids: jax.Array,
    attention_mask: jax.Array,
    num_slots: int,
    all_logits: bool = False,
) -> tuple[jax.Array, jax.Array, modelzoo.Cache]:
    """Reads the prompts into a new cache.

    Args:
        model, params: of the generation, layers unstacked.
        input_ids: int32 [B, T], every row ending at the last slot.
        attention_mask: bool [B, T].
        num_slots: S.
        all_logits: return those of every position, rather than the last's.

    Returns:
        (logits [B, V] of the next token, or [B, T, V]; the next token's position [B]; the cache).
    """
    count_BT = jnp.cumsum(attention_mask, axis=1, dtype=jnp.int32)
    with jax.named_scope("prefill"):
        out: Any = model.apply(
            {"params": params},
            input_ids=input_ids,
            attention_mask=attention_mask,
            # transformers gives padding position 1
            **_positions(model, jnp.where(attention_mask, count_BT - 1, 1)),
            cache=new_cache(model, input_ids.shape[0], num_slots),
            logits_to_keep=0 if all_logits else 1,
        )
    return out.logits if all_logits else out.logits[:, -1], count_BT[:, -1], out.cache


def encode(
    model: modelzoo.Model,
    params: Any,
    source_ids: jax.Array,
    source_mask: jax.Array,
    start_ids: jax.Array,
    num_slots: int,
) -> tuple[jax.Array, jax.Array, modelzoo.Cache]:
    """Runs the encoder, and the decoder on its first tokens: an encoder-decoder's `prefill`.

    Args:
        model, params: of the generation, layers unstacked.
        source_ids: int32 [B, P], the encoder's input.
        source_mask: bool [B, P].
        start_ids: int32 [B, T], what the output begins with, without padding.
        num_slots: S, of the decoder's cache.

    Returns:
        As `prefill`; the cache also holds what cross-attention reads of the encoder.
    """
    with jax.named_scope("prefill"):
        out: Any = model.apply(
            {"params": params},
            input_ids=source_ids,
            attention_mask=source_mask,
            decoder_input_ids=start_ids,
            cache=new_cache(model, start_ids.shape[0], num_slots),
        )
    num_rows, num_start = start_ids.shape
    return out.logits[:, -1], jnp.full((num_rows,), num_start, jnp.int32), out.cache


def decode_step(
    model: modelzoo.Model,
    params: Any,
    token_B: jax.Array,
    positions_B: jax.Array,
    cache: modelzoo.Cache,
    source_mask: jax.Array | None = None,
) -> tuple[jax.Array, modelzoo.Cache]:
    """Reads one token of each row.

    Args:
        model, params: of the generation, layers unstacked.
        token_B: int32 [B].
        positions_B: int32 [B].
        cache: of all tokens before.
        source_mask: bool [B, P], of an encoder-decoder's encoder.

    Returns:
        (logits [B, V] of the next token, the cache).
    """
    with jax.named_scope("decode_step"):
        logits, cache = read_tokens(model, params, token_B[:, None], positions_B[:, None], cache, source_mask)
    return logits[:, -1], cache


def read_tokens(
    model: modelzoo.Model,
    params: Any,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    cache: modelzoo.Cache,
    source_mask: jax.Array | None = None,
) -> tuple[jax.Array, modelzoo.Cache]:
    """Reads T tokens of each row; see `decode_step`.

    Returns:
        (logits [B, T, V], the cache).
    """
    inputs: dict[str, Any]
    if source_mask is not None:
        inputs = dict(decoder_input_ids=tokens_BT, attention_mask=source_mask)
    else:
        inputs = dict(input_ids=tokens_BT, **_positions(model, positions_BT))
    out: Any = model.apply({"params": params}, **inputs, cache=cache)
    return out.logits, out.cache


def new_cache(model: modelzoo.Model, num_rows: int, num_slots: int) -> modelzoo.Cache:
    """An empty cache as decoding wants it, one of each layer."""
    return modelzoo.unstack_layers(model.init_cache(num_rows, num_slots))


def _positions(model: modelzoo.Model, positions_BT: jax.Array) -> dict[str, Any]:
    """position_ids, for a model that takes them: ALiBi counts for itself."""
    return {"position_ids": positions_BT} if "position_ids" in modelzoo.input_names(model) else {}


def map_rows(cache: modelzoo.Cache, change: Callable[[jax.Array], jax.Array]) -> modelzoo.Cache:
    """A cache with `change` applied to every array that has a row for each row of the batch."""
    layers, cross, mask = jax.tree.map(change, (cache.layers, cache.cross, cache.mask))
    return dataclasses.replace(cache, layers=layers, cross=cross, mask=mask)


@functools.cache
def few_rows_options() -> dict[str, Any] | None:
    """Compiler options for programs that multiply a few rows with large kernels, for `jax.jit(compiler_options=...)`.

    On a CPU, XLA hands products to YNNPACK, which takes 1.25 times as long as its own for 4 rows and 1.5 for 16.
    """
    if jax.default_backend() != "cpu":
        return None
    options = {"xla_cpu_experimental_ynn_fusion_type": ""}
    try:
        jax.jit(jnp.negative, compiler_options=options)(jnp.float32(0))
    except Exception:  # an XLA without the option; jaxlib raises several types
        return None
    return options


def carried(cache: modelzoo.Cache) -> modelzoo.Cache:
    """A cache as the loop carries it: one of a single row without its batch dimension.

    XLA drops a dimension of 1 before it multiplies. While the loop carries it all the same, XLA on a CPU copies the
    whole cache four times in every step; `LayerCache.write` has its part in this.
    """
    if cache.mask.shape[0] > 1:
        return cache
    return dataclasses.replace(cache, layers=jax.tree.map(lambda slots: slots[0], cache.layers))


def loaded(cache: modelzoo.Cache) -> modelzoo.Cache:
    """The inverse of `carried`."""
    if cache.mask.shape[0] > 1:
        return cache
    return dataclasses.replace(cache, layers=jax.tree.map(lambda slots: slots[None], cache.layers))
