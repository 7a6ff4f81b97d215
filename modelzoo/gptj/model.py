"""GPT-J: wiring only. Reference: mesh-transformer-jax (Wang and Komatsuzaki, 2021) and transformers 4.57.6.

One layer norm feeds attention and MLP side by side, x + attention(h) + mlp(h); the first `rotary_dim` features of
every head rotate in neighbouring pairs; the attention's projections have no bias, the LM head has one. Other positions,
norms and blocks are the config's to choose (`modelzoo.knobs`).
"""

from typing import Unpack

import jax

from modelzoo import tasks
from modelzoo.decoder import DecoderBlock, DecoderTrunk
from modelzoo.heads import LMHead
from modelzoo.layers.cache import Cache
from modelzoo.layers.embed import embed_inputs
from modelzoo.layers.linear import dropout_layer
from modelzoo.model import StackOptions
from modelzoo.outputs import BaseModelOutput


class GPTJBlock(DecoderBlock):
    """One layer: x + attention(norm(x)) + mlp(norm(x)), both from the same norm."""

    attention_biases = False


class GPTJModel(DecoderTrunk):
    """The trunk: embed, a stack of blocks, a final norm."""

    block_class = GPTJBlock

    def setup(self) -> None:
        super().setup()
        self.embed_dropout = dropout_layer(self.config.embd_pdrop)

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        head_mask: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        cache: Cache | None = None,
        segment_ids: jax.Array | None = None,
        **options: Unpack[StackOptions],
    ) -> BaseModelOutput:
        """Runs the trunk.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], non-zero where a token is real; with a cache it may be longer and then covers the
                slots from the first. A float [B, 1 or N, T, S] is an additive bias, used as it is.
            token_type_ids: [B, T], embedded by the table of tokens.
            position_ids: [B or 1, T]; by default counted from 0, or from the cache's next slot; in each segment anew.
            head_mask: [N] or [L, N], multiplied into the attention probabilities.
            inputs_embeds: [B, T, D] in place of input_ids.
            cache: from `init_cache` or an earlier call.
            segment_ids: [B, T], which document of a packed row a token belongs to; tokens see their own alone.
            options: see `StackOptions`.
        """
        x_BTD = embed_inputs(self.embed, input_ids, inputs_embeds)
        if token_type_ids is not None:
            x_BTD = x_BTD + self.embed(token_type_ids)  # types share the token table, as in transformers
        x_BTD, shared, cache = self.locate(x_BTD, attention_mask, cache, segment_ids, position_ids)
        x_BTD = self.embed_dropout(x_BTD, deterministic=options.get("deterministic", True))
        return self.run(x_BTD, shared, cache, head_mask, **options)


class GPTJForCausalLM(tasks.CausalLM):
    """GPT-J with a language-modelling head that has a bias."""

    trunk_class = GPTJModel

    def make_lm_head(self) -> LMHead:
        return super().make_lm_head(use_bias=True)


class GPTJForSequenceClassification(tasks.LastTokenClassification):
    """GPT-J that classifies a sequence by its last token."""

    trunk_class = GPTJModel


class GPTJForQuestionAnswering(tasks.QuestionAnswering):
    """GPT-J that marks an answer in its text."""

    trunk_class = GPTJModel


__all__ = [
    "GPTJModel",
    "GPTJForCausalLM",
    "GPTJForSequenceClassification",
    "GPTJForQuestionAnswering",
]
