"""Inputs by name: `make_inputs("left + types + head mask", ...)` draws what the options ask for.

    plain               input_ids alone
    mask                attention_mask of ones
    left right inside   padding of some rows, in the ids and in the mask
    empty               a row of nothing but padding
    no mask             ids are padded, the mask is not passed
    3d mask             attention_mask [B, T, T]
    bias                attention_mask float [B, 1, T, T]: added to the scores, as it is
    types               token_type_ids
    positions           position_ids, the last one among them
    shared positions    position_ids [1, T] for all rows
    head mask           head_mask [N]
    layer head mask     head_mask [L, N]
    embeds              inputs_embeds in place of input_ids
    one row, one token  a smaller batch
    encoder             encoder_hidden_states, of another length
    encoder mask        encoder_attention_mask, padded left and right
    cross head mask     cross_attn_head_mask [L, N]
    encoder outputs     encoder_outputs beside input_ids; with "no ids", in their place
    decoder             decoder_input_ids, of another length; "decoder left", "decoder right" pad them too
    decoder mask        decoder_attention_mask of ones
    decoder embeds      decoder_inputs_embeds in place of decoder_input_ids
    decoder head mask   decoder_head_mask [L, N]

Multiple choice gets [B, choices, T]. A family's own options (`Cases.options`) come last.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

LENGTH, ENCODER_LENGTH, DECODER_LENGTH, CHOICES = 9, 6, 7, 3
LOWEST = np.finfo(np.float32).min
KNOWN = {
    *(
        "plain",
        "mask",
        "left",
        "right",
        "inside",
        "empty",
        "no mask",
        "3d mask",
        "bias",
        "types",
        "positions",
    ),
    *("shared positions", "head mask", "layer head mask", "embeds", "one row", "one token"),
    *("encoder", "encoder mask", "cross head mask", "encoder outputs", "no ids", "decoder", "decoder left"),
    *("decoder right", "decoder mask", "decoder embeds", "decoder head mask"),
}


@dataclasses.dataclass
class Draw:
    """What options draw from.

    Attributes:
        config: transformers' config.
        random: the generator.
        lead: the dimensions before the length, (B,) or (B, choices).
        length: T.
    """

    config: Any
    random: np.random.Generator
    lead: tuple[int, ...]
    length: int

    @property
    def rows(self) -> int:
        """B, choices included."""
        return int(np.prod(self.lead))

    @property
    def layers_and_heads(self) -> tuple[int, int]:
        """[L, N] of the stack that `head_mask` is for; a lone decoder of an encoder-decoder family has its own."""
        c = self.config
        if hasattr(c, "decoder_layers") and not c.is_encoder_decoder:
            return c.decoder_layers, c.decoder_attention_heads
        return c.num_hidden_layers, c.num_attention_heads

    @property
    def decoder_layers_and_heads(self) -> tuple[int, int]:
        """[L, N] of the stack that has the cross-attention."""
        c = self.config
        if hasattr(c, "decoder_layers"):
            return c.decoder_layers, c.decoder_attention_heads
        return c.num_hidden_layers, c.num_attention_heads

    def ids(self, length: int, high: int | None = None) -> np.ndarray:
        """[rows, length] ids; of the vocabulary, those that are not special."""
        c = self.config
        special = {c.pad_token_id, c.bos_token_id, c.eos_token_id, 0} if high is None else set()
        usual = np.array([i for i in range(high or c.vocab_size) if i not in special])
        return self.random.choice(usual, (self.rows, length)).astype(np.int32)

    def floats(self, *shape: int) -> np.ndarray:
        """A standard normal."""
        return self.random.normal(size=shape).astype(np.float32)

    def shaped(self, array: np.ndarray) -> np.ndarray:
        """[rows, ...] -> [*lead, ...]."""
        return array.reshape(*self.lead, *array.shape[1:])

    def mask(self, length: int, left: bool, right: bool, inside: bool = False, empty: bool = False):
        """[rows, length], zero where there is padding."""
        mask = np.ones((self.rows, length), np.int32)
        if left:
            mask[0, :3] = mask[1, : length - 1] = 0
        if right:
            mask[2, length // 2 + 1 :] = 0
        if inside:
            mask[3, 2:4] = 0
        if empty:
            mask[1] = 0
        return mask


def make_inputs(
    names: str,
    config: Any,
    choices: int | None = None,
    own: Mapping[str, Callable[[Draw, dict[str, Any]], None]] | None = None,
    seed: int = 0,
    length: int = LENGTH,
) -> dict[str, Any]:
    """Numpy inputs of one model.

    Args:
        names: options joined by " + ".
        config: transformers' config.
        choices: of each row, for multiple choice.
        own: the family's own options.
        seed: of everything.
        length: T.
    """
    options = names.split(" + ")
    own = own or {}
    assert set(options) <= KNOWN | own.keys(), f"unknown options {sorted(set(options) - KNOWN - own.keys())}"
    rows = (1,) if "one row" in options else (2, choices) if choices else (4,)
    draw = Draw(config, np.random.default_rng(seed), rows, 1 if "one token" in options else length)
    inputs = _tokens(draw, options) | _encoder(draw, options) | _decoder(draw, options)
    for name in options:
        if name in own:
            own[name](draw, inputs)
    return inputs


def _tokens(draw: Draw, options: list[str]) -> dict[str, Any]:
    c, random, T = draw.config, draw.random, draw.length
    ids, pads = draw.ids(T), {"left", "right", "inside", "empty"} & set(options)
    mask = draw.mask(T, *(name in options for name in ("left", "right", "inside", "empty")))
    if c.is_encoder_decoder:  # whose classifier looks for the last end token, as many in each row
        last = T - 1 - np.argmax(mask[:, ::-1], axis=1)
        ids[np.arange(draw.rows), last] = c.eos_token_id
    inputs: dict[str, Any] = {"input_ids": draw.shaped(np.where(mask, ids, c.pad_token_id or 0))}
    inputs["input_ids"] = inputs["input_ids"].astype(np.int32)
    if (pads or "mask" in options) and "no mask" not in options:
        inputs["attention_mask"] = draw.shaped(mask)
    if "3d mask" in options:
        seen = random.uniform(size=(draw.rows, T, T)) < 0.6
        inputs["attention_mask"] = draw.shaped((seen | np.eye(T, dtype=bool)).astype(np.int32))
    if "bias" in options:  # it also lets some keys through that lie ahead
        hidden = random.uniform(size=(draw.rows, 1, T, T)) < 0.4
        inputs["attention_mask"] = np.where(hidden, LOWEST, draw.floats(draw.rows, 1, T, T))
    if "types" in options:
        kinds = getattr(c, "type_vocab_size", None) or c.vocab_size
        inputs["token_type_ids"] = draw.shaped(draw.ids(T, kinds))
    if "positions" in options:
        positions = draw.ids(T, c.max_position_embeddings)
        positions[0, 0] = c.max_position_embeddings - 1
        inputs["position_ids"] = draw.shaped(positions)
    if "shared positions" in options:
        inputs["position_ids"] = np.arange(3, 3 + T, dtype=np.int32)[None]
    layers, heads = draw.layers_and_heads
    if "head mask" in options:
        inputs["head_mask"] = random.uniform(0, 1.5, heads).astype(np.float32)
    if "layer head mask" in options:
        inputs["head_mask"] = random.uniform(0, 1.5, (layers, heads)).astype(np.float32)
    if "embeds" in options:
        del inputs["input_ids"]
        inputs["inputs_embeds"] = draw.shaped(draw.floats(draw.rows, T, c.hidden_size))
    if "no ids" in options:
        del inputs["input_ids"]
    return inputs


def _encoder(draw: Draw, options: list[str]) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    if "encoder" in options:
        states = draw.floats(draw.rows, ENCODER_LENGTH, draw.config.hidden_size)
        inputs["encoder_hidden_states"] = states
    if "encoder mask" in options:
        inputs["encoder_attention_mask"] = draw.mask(ENCODER_LENGTH, True, True)
    if "encoder outputs" in options:
        inputs["encoder_outputs"] = (draw.floats(draw.rows, draw.length, draw.config.hidden_size),)
    if "cross head mask" in options:
        shape = draw.decoder_layers_and_heads
        inputs["cross_attn_head_mask"] = draw.random.uniform(0, 1.5, shape).astype(np.float32)
    return inputs


def _decoder(draw: Draw, options: list[str]) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    pads = {"decoder left", "decoder right"} & set(options)
    if pads or "decoder" in options:
        mask = draw.mask(DECODER_LENGTH, "decoder left" in options, "decoder right" in options)
        ids = np.where(mask, draw.ids(DECODER_LENGTH), draw.config.pad_token_id)
        inputs["decoder_input_ids"] = ids.astype(np.int32)
        if pads or "decoder mask" in options:
            inputs["decoder_attention_mask"] = mask
    if "decoder embeds" in options:
        inputs.pop("decoder_input_ids", None)
        inputs["decoder_inputs_embeds"] = draw.floats(draw.rows, DECODER_LENGTH, draw.config.hidden_size)
    if "decoder head mask" in options:
        shape = draw.decoder_layers_and_heads
        inputs["decoder_head_mask"] = draw.random.uniform(0, 1.5, shape).astype(np.float32)
    return inputs
