"""BLOOM: wiring only. References: BigScience, 2022, arXiv:2211.05100, and transformers 4.57.6.

A norm on the embeddings; blocks that norm before attention and before the MLP; ALiBi, so that no position is embedded;
an LM head that is the embedding table. Other positions, norms and blocks are the config's to choose
(`modelzoo.knobs`). Departure from transformers: a 4-D attention mask is taken, and ALiBi then
counts every slot.
"""

from typing import Unpack

import jax
import jax.numpy as jnp

from modelzoo import tasks
from modelzoo.decoder import DecoderBlock, DecoderTrunk
from modelzoo.layers.cache import Cache
from modelzoo.layers.embed import embed_inputs
from modelzoo.layers.position import count_in_segments
from modelzoo.model import StackOptions
from modelzoo.outputs import BaseModelOutput


class BloomBlock(DecoderBlock):
    """One layer: x = x + attention(norm(x)), then x + mlp(norm(x))."""


class BloomModel(DecoderTrunk):
    """The trunk: embed and norm, a stack of blocks, a final norm."""

    block_class = BloomBlock

    def setup(self) -> None:
        super().setup()
        self.embed_norm = self.norm()

    def default_positions(
        self, slots_T: jax.Array, mask_BS: jax.Array | None, segment_ids: jax.Array | None
    ) -> jax.Array:
        """Counted over the real tokens of a row or of a segment, as ALiBi counts them, since no call passes any."""
        if mask_BS is None or mask_BS.ndim > 2:
            return super().default_positions(slots_T, mask_BS, segment_ids)
        counts_BS = count_in_segments(mask_BS.astype(bool), segment_ids)
        slots_BT = jnp.broadcast_to(slots_T, (counts_BS.shape[0], slots_T.shape[-1]))
        return jnp.maximum(jnp.take_along_axis(counts_BS, slots_BT, axis=1) - 1, 0)

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        head_mask: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
        **options: Unpack[StackOptions],
    ) -> BaseModelOutput:
        """Runs the trunk; arguments as `GPTJModel`'s of the same names."""
        x_BTD = embed_inputs(self.embed, input_ids, inputs_embeds)
        x_BTD, shared, cache = self.locate(x_BTD, attention_mask, cache, segment_ids)
        return self.run(self.embed_norm(x_BTD), shared, cache, head_mask, **options)


class BloomForCausalLM(tasks.CausalLM):
    """BLOOM with a language-modelling head, its embedding table."""

    trunk_class = BloomModel


class BloomForSequenceClassification(tasks.LastTokenClassification):
    """BLOOM that classifies a sequence by its last token."""

    trunk_class = BloomModel


class BloomForTokenClassification(tasks.TokenClassification):
    """BLOOM that classifies every token."""

    trunk_class = BloomModel


class BloomForQuestionAnswering(tasks.QuestionAnswering):
    """BLOOM that marks an answer in its text."""

    trunk_class = BloomModel


__all__ = [
    "BloomModel",
    "BloomForCausalLM",
    "BloomForSequenceClassification",
    "BloomForTokenClassification",
    "BloomForQuestionAnswering",
]
