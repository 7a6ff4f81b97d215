"""What a model writes while it is trained: the likeliest token at a time, through a cache, in one compiled loop.

This is for evaluation; `inference` has sampling, beams and prompts of all kinds.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import modelzoo
import parallel


class Writer:
    """(params, ids, mask) -> tokens; compiled once for each length of the input.

    Args:
        model: a causal language model, or an encoder-decoder with a language-model head.
        rules: of the mesh that the parameters lie on, or None.
        max_new: tokens to write at most.
    """

    def __init__(self, model: modelzoo.Model, rules: parallel.Rules | None, max_new: int):
        self._rules = rules
        write = _write_target if model.task == "seq2seq_lm" else _write_on

        def run(params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
            return write(model, params, ids, mask, max_new)

        self._run = jax.jit(run)

    def __call__(self, params: Any, ids: Any, mask: Any) -> jax.Array:
        """Writes.

        Args:
            params: of the model.
            ids, mask: int32 [B, T]; a causal model's rows end at the last place, an encoder's are padded anywhere.

        Returns:
            int32 [B, max_new]; after an end token comes padding.
        """
        with parallel.use(self._rules):
            return self._run(params, ids, mask)


def _write_target(model: Any, params: Any, ids: jax.Array, mask: jax.Array, max_new: int) -> jax.Array:
    config = model.config
    start = jnp.full((ids.shape[0], 1), config.decoder_start_token_id, jnp.int32)
    cache = model.init_cache(ids.shape[0], max_new)
    out = model.apply(
        {"params": params}, input_ids=ids, attention_mask=mask, decoder_input_ids=start, cache=cache
    )

    def read(token: jax.Array, cache: Any, at: jax.Array) -> Any:
        return model.apply({"params": params}, decoder_input_ids=token, attention_mask=mask, cache=cache)

    return _loop(read, out, config, max_new)


def _write_on(model: Any, params: Any, ids: jax.Array, mask: jax.Array, max_new: int) -> jax.Array:
    placed = "position_ids" in modelzoo.input_names(model)
    count = jnp.cumsum(mask, axis=1, dtype=jnp.int32)
    cache = model.init_cache(ids.shape[0], ids.shape[1] + max_new)
    positions = {"position_ids": jnp.where(mask > 0, count - 1, 0)} if placed else {}
    out = model.apply(
        {"params": params}, input_ids=ids, attention_mask=mask, cache=cache, logits_to_keep=1, **positions
    )

    def read(token: jax.Array, cache: Any, at: jax.Array) -> Any:
        positions = {"position_ids": count[:, -1:] + at} if placed else {}
        return model.apply({"params": params}, input_ids=token, cache=cache, **positions)

    return _loop(read, out, model.config, max_new)


def _loop(read: Any, out: Any, config: Any, max_new: int) -> jax.Array:
    """Writes on from the outputs of what was read first."""
    end = -1 if config.eos_token_id is None else config.eos_token_id
    fill = config.pad_token_id or 0
    vocab = config.vocab_size

    def likeliest(logits: jax.Array) -> jax.Array:
        return (
            logits[:, -1, :vocab].argmax(axis=-1).astype(jnp.int32)
        )  # a mesh may have padded the vocabulary

    token = likeliest(out.logits)
    tokens = jnp.full((token.shape[0], max_new), fill, jnp.int32).at[:, 0].set(token)

    def body(carry: Any) -> Any:
        at, token, done, cache, tokens = carry
        out = read(token[:, None], cache, at)
        done = done | (token == end)
        token = jnp.where(done, fill, likeliest(out.logits))
        tokens = lax.dynamic_update_slice(tokens, token[:, None], (0, at + 1))
        return at + 1, token, done, out.cache, tokens

    def goes_on(carry: Any) -> jax.Array:
        at, token, done, *_ = carry
        return (at < max_new - 1) & ~(done | (token == end)).all()

    start = (jnp.int32(0), token, jnp.zeros(token.shape, bool), out.cache, tokens)
    return lax.while_loop(goes_on, body, start)[-1]
