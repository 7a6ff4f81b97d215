"""What callers of MVP pass, made into what the model reads."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from modelzoo.mvp.config import MvpConfig
from modelzoo.outputs import BaseModelOutput

IGNORED = -100
"""The label that is not learned from."""


def shift_right(ids: jax.Array | np.ndarray, config: MvpConfig) -> jax.Array:
    """A decoder's input for the target `ids`: the start token, then all of them but the last.

    Args:
        ids: [B, T], labels (-100 becomes padding) or input ids.
        config: names the start and padding tokens.

    Raises:
        ValueError: it does not.
    """
    start, pad = config.decoder_start_token_id, config.pad_token_id
    if start is None or pad is None:
        field = "decoder_start_token_id" if start is None else "pad_token_id"
        raise ValueError(f"MvpConfig.{field} is None: set it, or pass decoder_input_ids")
    ids = jnp.asarray(ids, jnp.int32)
    shifted = jnp.concatenate([jnp.full_like(ids[:, :1], start), ids[:, :-1]], axis=1)
    return jnp.where(shifted == IGNORED, pad, shifted)


def last_end_token(input_ids: jax.Array, eos_token_id: int | None) -> tuple[jax.Array, jax.Array]:
    """Where every row's last end token stands.

    Args:
        input_ids: [B, T].
        eos_token_id: the end token; None is no token.

    Returns:
        (place int32 [B], bool []: whether the rows hold the same number of them, at least one).

    Raises:
        ValueError: they do not, and `input_ids` are numbers that can be looked at rather than traced.
    """

    end = -1 if eos_token_id is None else eos_token_id
    if not isinstance(input_ids, Tracer):
        counts = sorted(set((np.asarray(input_ids) == end).sum(axis=1).tolist()))
        if len(counts) > 1 or 0 in counts:
            raise ValueError(
                f"rows of input_ids hold {' or '.join(map(str, counts))} end tokens (eos_token_id = {eos_token_id}): "
                "every row must hold the same number, at least one"
            )
    is_end_BT = jnp.asarray(input_ids) == end
    count_B = is_end_BT.sum(axis=1)
    place_BT = jnp.where(is_end_BT, jnp.arange(is_end_BT.shape[1], dtype=jnp.int32), -1)
    return place_BT.argmax(axis=1), ((count_B == count_B[0]) & (count_B > 0)).all()


def as_encoder_output(value: Any) -> BaseModelOutput:
    """What callers may pass as encoder_outputs, as one type.

    Args:
        value: the states [B, S, D]; a sequence of them, the hidden states and the attentions; or anything with the
            attribute last_hidden_state, such as an encoder's output.
    """
    if isinstance(value, Sequence):
        value = BaseModelOutput(value[0], hidden_states=(*value, None)[1], attentions=(*value, None, None)[2])
    elif not hasattr(value, "last_hidden_state"):
        value = BaseModelOutput(value)
    rest = {name: getattr(value, name, None) for name in ("hidden_states", "attentions")}
    return BaseModelOutput(value.last_hidden_state, **rest)
