"""A language model whose every token is known in advance."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

import modelzoo
from modelzoo.layers.cache import begin, init_cache
from modelzoo.outputs import CausalLMOutput

VOCAB = 50


@dataclasses.dataclass(frozen=True)
class FakeConfig:
    vocab_size: int = VOCAB
    max_positions: int = 128


class FakeLM(modelzoo.Model):
    """Its next token is (3 x the sum of all tokens so far + the last position) mod V.

    So it is wrong if the loop loses a token, shows padding, or miscounts positions.
    """

    config: Any = FakeConfig()
    task: ClassVar[str] = "causal_lm"

    def init_cache(self, batch_size, max_length, dtype=None):
        return init_cache(1, batch_size, max_length, 1, 1, jnp.float32)

    def __call__(self, input_ids, attention_mask=None, position_ids=None, cache=None, logits_to_keep=0):
        num_new = input_ids.shape[1]
        slots, mask, _, cache = begin(cache, attention_mask, num_new)
        assert cache is not None and mask is not None and position_ids is not None  # noqa: PT018
        (layer,) = cache.layers
        layer = layer.write(*[input_ids[:, None, :, None].astype(jnp.float32)] * 2, slots[0])
        total = jnp.sum(jnp.where(mask, layer.key[:, 0, :, 0], 0.0), axis=1).astype(jnp.int32)
        following = (3 * total + position_ids[:, -1]) % self.config.vocab_size
        distance = (jnp.arange(self.config.vocab_size) - following[:, None]) % self.config.vocab_size
        return CausalLMOutput(-distance[:, None].astype(jnp.float32), cache.advance((layer,), num_new))


def expected(prompt, num_new, vocab=VOCAB):
    tokens = list(prompt)
    for _ in range(num_new):
        tokens.append((3 * sum(tokens) + len(tokens) - 1) % vocab)
    return tokens[len(prompt) :]
