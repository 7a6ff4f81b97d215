"""GPT-J: wiring only. Reference: mesh-transformer-jax (Wang and Komatsuzaki, 2021) and transformers 4.57.6.

One layer norm feeds attention and MLP side by side, x + attention(h) + mlp(h); the first `rotary_dim` features of
every head rotate in neighbouring pairs; the attention's projections have no bias, the LM head has one.
"""

from functools import partial
from typing import Unpack

import flax.linen as nn
import jax

from modelzoo import tasks
from modelzoo.gptj.config import GPTJConfig
from modelzoo.heads import LMHead
from modelzoo.layers import stack
from modelzoo.layers.attention import Attention, AttentionInputs
from modelzoo.layers.bias import Bias
from modelzoo.layers.cache import Cache, begin
from modelzoo.layers.embed import Embed, check_length, embed_inputs
from modelzoo.layers.linear import dropout_layer
from modelzoo.layers.masks import check_segments
from modelzoo.layers.mlp import Mlp
from modelzoo.layers.norm import LayerNorm
from modelzoo.layers.position import rotary_tables, rotate, segment_positions
from modelzoo.model import StackOptions
from modelzoo.outputs import BaseModelOutput
from modelzoo.trunk import Block, Trunk


class GPTJBlock(Block):
    """One layer: x + attention(norm(x)) + mlp(norm(x)), both from the same norm."""

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        rotary: tuple[jax.Array, jax.Array] | None = None,
        output_attentions: bool = False,
        deterministic: bool = True,
        **attending: Unpack[AttentionInputs],
    ) -> tuple[jax.Array, stack.LayerOutput]:
        c: GPTJConfig = self.config
        turn = None if rotary is None else partial(rotate, sin_BTR=rotary[0], cos_BTR=rotary[1])
        attention = Attention(
            c.n_embd, c.n_head, c.head_dim, False, False, c.attn_pdrop, name="attention", **self.projections
        )
        mlp = Mlp(c.n_embd, c.mlp_dim, c.activation_function, c.resid_pdrop, name="mlp", **self.projections)

        h_BTD = LayerNorm(c.n_embd, c.layer_norm_epsilon, name="norm", **self.dtypes)(x_BTD)
        attended_BTD, probs, cache = attention(h_BTD, rotary=turn, deterministic=deterministic, **attending)
        attended_BTD = dropout_layer(c.resid_pdrop)(attended_BTD, deterministic=deterministic)
        y_BTD = attended_BTD + mlp(h_BTD, deterministic) + x_BTD
        return y_BTD, stack.LayerOutput(cache, probs if output_attentions else None)


class GPTJModel(Trunk):
    """The trunk: embed, a stack of blocks, a final norm."""

    block_class = GPTJBlock

    def setup(self) -> None:
        c, dtypes = self.config, dict(dtype=self.dtype, param_dtype=self.param_dtype)
        init = nn.initializers.normal(c.initializer_range)
        self.embed = Embed(c.vocab_size, c.n_embd, embedding_init=init, **dtypes)
        self.embed_dropout = dropout_layer(c.embd_pdrop)
        self.layers = stack.parameters(self, "layers", self.block(), c.n_layer, c.n_embd)
        self.final_norm = LayerNorm(c.n_embd, c.layer_norm_epsilon, **dtypes)

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
        c = self.config
        x_BTD = embed_inputs(self.embed, input_ids, inputs_embeds)
        if token_type_ids is not None:
            x_BTD = x_BTD + self.embed(token_type_ids)  # types share the token table, as in transformers
        x_BTD = self.embed_dropout(x_BTD, deterministic=options.get("deterministic", True))
        check_length(x_BTD, c.n_positions, "n_positions")

        check_segments(segment_ids, x_BTD.shape[1], cache)
        slots_T, mask_BS, _, cache = begin(cache, attention_mask, x_BTD.shape[1])
        if position_ids is None and segment_ids is not None:
            position_ids = segment_positions(segment_ids)
        elif position_ids is None:
            position_ids = slots_T.reshape(-1, x_BTD.shape[1])
        shared = dict(
            bias=Bias(mask_BS, slots_T, None, segment_ids, segment_ids),
            rotary=rotary_tables(position_ids, c.rotary_dim or c.head_dim),
        )
        return self.run(x_BTD, shared, cache, head_mask, **options)


class GPTJForCausalLM(tasks.CausalLM):
    """GPT-J with a language-modelling head that has a bias and is not tied."""

    trunk_class = GPTJModel

    def make_lm_head(self) -> LMHead:
        return super().make_lm_head(use_bias=True)


class GPTJForSequenceClassification(tasks.LastTokenClassification):
    """GPT-J that classifies a sequence by its last token."""

    trunk_class = GPTJModel


class GPTJForQuestionAnswering(tasks.QuestionAnswering):
    """GPT-J that marks an answer in its text."""

    trunk_class = GPTJModel


CLASSES = (GPTJModel, GPTJForCausalLM, GPTJForSequenceClassification, GPTJForQuestionAnswering)
