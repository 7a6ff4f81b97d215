"""Through a cache, in chunks: the same as at once, and the same as transformers' past_key_values."""

import inspect
import typing
from typing import Any

import numpy as np
import transformers

from tests.parity import cases
from tests.parity.pairs import ask, forward, our_fields, pair, their_fields

CHUNKS = (4, 1, 1, 1)
SPARE = 2
"""Slots of the cache that stay empty."""
ALONG_TIME = ("input_ids", "token_type_ids", "position_ids", "inputs_embeds")
OF_AN_ENCODER = ("encoder_hidden_states", "encoder_outputs", "input_ids", "inputs_embeds", "head_mask")
PREFIX = "decoder_"


class Decoding:
    """A class's inputs, cut into chunks along the decoder's time.

    Attributes:
        both: the models.
        inputs: as long as all chunks.
        real: bool [B, T], where the decoder's tokens are no padding.
    """

    def __init__(self, name: str, title: str, options: str) -> None:
        self.both = pair(name, title)
        self.two_stacks = self.both.theirs.config.is_encoder_decoder
        prefix, length = PREFIX if self.two_stacks else "", sum(CHUNKS)
        self.mask = prefix + "attention_mask"
        self.along = {prefix + key for key in ALONG_TIME}
        inputs = self.both.inputs(options)
        for key in (self.along | {self.mask}) & inputs.keys():
            inputs[key] = inputs[key][:, :length]
        self.inputs = inputs
        tokens = inputs[next(key for key in inputs if key in self.along)]
        self.real = inputs.get(self.mask, np.ones(tokens.shape[:2])).astype(bool)

    def chunk(self, start: int, end: int) -> dict[str, Any]:
        """The inputs of one call; the mask covers what came before."""
        inputs = dict(self.inputs)
        for key in self.along & inputs.keys():
            inputs[key] = inputs[key][:, start:end]
        if self.mask in inputs:
            inputs[self.mask] = inputs[self.mask][:, :end]
        return inputs

    def ours(self, inputs: dict[str, Any], start: int, cache: Any) -> Any:
        """Our call; after the first the cache holds what the encoder said."""
        if start:
            of_encoder = OF_AN_ENCODER if self.two_stacks else OF_AN_ENCODER[:1]
            inputs = {key: value for key, value in inputs.items() if key not in of_encoder}
        return forward(self.both.ours, self.both.params, inputs | {"cache": cache})

    def theirs(self, inputs: dict[str, Any], start: int, past: Any) -> Any:
        """transformers' call, for which the encoder's states are passed again."""
        flags = dict(output_attentions=True, output_hidden_states=True, use_cache=True)
        return ask(self.both.theirs, inputs | {"past_key_values": past}, **flags)

    def by_token(self, fields: dict[str, Any], real: np.ndarray) -> dict[str, np.ndarray]:
        """What belongs to the decoder's tokens that are no padding, [tokens, ...]."""
        found = {}
        for name, value in fields.items():
            of_sequences = name == "mc_logits" or (name == "logits" and value.ndim == 2)
            if name == "pooler_output" or name.startswith("encoder_") or of_sequences:
                continue
            every = value if isinstance(value, tuple) else (value,)
            for i, array in enumerate(map(np.asarray, every)):
                array = array.swapaxes(1, 2) if "attentions" in name else array
                found[f"{name}[{i}]"] = array[real]
        return found


def check_same(have: dict[str, np.ndarray], want: dict[str, np.ndarray], tolerance: float) -> None:
    """Field by field; keys that only ours has, in empty slots, have no weight."""
    assert have.keys() == want.keys()
    for name, value in want.items():
        mine = have[name]
        if "attentions" in name:
            assert (mine[..., value.shape[-1] :] == 0).all(), f"{name}: an empty slot has weight"
            mine = mine[..., : value.shape[-1]]
        scale = 1.0 if "attentions" in name else max(1.0, np.abs(value).max())
        apart = np.abs(mine - value).max()
        assert apart <= tolerance * scale, f"{name}: {apart:.3g} apart"


@cases.every_cell("cached")
def test_chunks(name, title, options):
    """Every token's states, logits and attentions."""
    decoding = Decoding(name, title, options)
    both, past = decoding.both, None
    cache = both.ours.init_cache(len(decoding.real), sum(CHUNKS) + SPARE)
    start, parts = 0, []
    for size in CHUNKS:
        end = start + size
        inputs, real = decoding.chunk(start, end), decoding.real[:, start:end]
        theirs = decoding.theirs(inputs, start, past)
        ours = decoding.ours(inputs, start, cache)
        part = decoding.by_token(our_fields(ours), real)
        check_same(part, decoding.by_token(their_fields(theirs), real), 2e-5)
        parts.append((real, part))
        cache, past, start = ours.cache, theirs.past_key_values, end
    assert int(cache.index) == start

    whole = our_fields(forward(both.ours, both.params, decoding.inputs))
    for end, (real, part) in zip(np.cumsum(CHUNKS), parts, strict=True):
        now = np.zeros_like(decoding.real)
        now[:, end - real.shape[1] : end] = real
        want = decoding.by_token(whole, now)
        trimmed = {key: value[..., : want[key].shape[-1]] for key, value in part.items()}
        check_same(trimmed, want, 2e-6)


@cases.every_class()
def test_classes_with_a_cache_are_covered(name):
    """Those that take one and return one in transformers."""
    signature = inspect.signature(getattr(transformers, name).forward)
    returned = typing.get_args(signature.return_annotation)[1]
    has_cache = "past_key_values" in signature.parameters.keys() & returned.__dataclass_fields__.keys()
    assert bool(cases.cells("cached", name)) == has_cache
