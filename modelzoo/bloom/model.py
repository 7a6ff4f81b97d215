"""BLOOM: wiring only. References: BigScience, 2022, arXiv:2211.05100, and transformers 4.57.6.

A norm on the embeddings; blocks that norm before attention and before the MLP; ALiBi, so that no position is embedded;
an LM head that is the embedding table. Departure from transformers: a 4-D attention mask is taken, and ALiBi then
counts every slot.
"""

from typing import Unpack

import flax.linen as nn
import jax
import jax.numpy as jnp

from modelzoo import tasks
from modelzoo.bloom.config import BloomConfig
from modelzoo.layers import stack
from modelzoo.layers.attention import Attention, AttentionInputs
from modelzoo.layers.bias import Bias
from modelzoo.layers.cache import Cache, begin
from modelzoo.layers.embed import Embed, embed_inputs
from modelzoo.layers.linear import dropout_layer
from modelzoo.layers.masks import check_segments
from modelzoo.layers.mlp import Mlp
from modelzoo.layers.norm import LayerNorm
from modelzoo.layers.position import alibi_bias
from modelzoo.model import StackOptions
from modelzoo.outputs import BaseModelOutput
from modelzoo.trunk import Block, Trunk


class BloomBlock(Block):
    """One layer: x = x + attention(norm(x)), then x + mlp(norm(x))."""

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        deterministic: bool = True,
        output_attentions: bool = False,
        **attending: Unpack[AttentionInputs],
    ) -> tuple[jax.Array, stack.LayerOutput]:
        c: BloomConfig = self.config
        width, drop = c.hidden_size, dropout_layer(c.hidden_dropout)
        attention = Attention(
            width, *c.cache_heads, dropout=c.attention_dropout, name="attention", **self.projections
        )
        mlp = Mlp(width, 4 * width, "gelu_pytorch_tanh", c.hidden_dropout, name="mlp", **self.projections)

        h_BTD = LayerNorm(width, c.layer_norm_epsilon, name="attention_norm", **self.dtypes)(x_BTD)
        residual_BTD = h_BTD if c.apply_residual_connection_post_layernorm else x_BTD
        h_BTD, probs, cache = attention(h_BTD, deterministic=deterministic, **attending)
        x_BTD = residual_BTD + drop(h_BTD, deterministic=deterministic)

        h_BTD = LayerNorm(width, c.layer_norm_epsilon, name="mlp_norm", **self.dtypes)(x_BTD)
        residual_BTD = h_BTD if c.apply_residual_connection_post_layernorm else x_BTD
        y_BTD = residual_BTD + mlp(h_BTD, deterministic)
        return y_BTD, stack.LayerOutput(cache, probs if output_attentions else None)


class BloomModel(Trunk):
    """The trunk: embed and norm, a stack of blocks, a final norm."""

    block_class = BloomBlock

    def setup(self) -> None:
        c = self.config
        width, dtypes = c.hidden_size, dict(dtype=self.dtype, param_dtype=self.param_dtype)
        init = nn.initializers.normal(c.initializer_range)
        self.embed = Embed(c.vocab_size, width, embedding_init=init, **dtypes)
        self.embed_norm = LayerNorm(width, c.layer_norm_epsilon, **dtypes)
        self.layers = stack.parameters(self, "layers", self.block(), c.n_layer, width)
        self.final_norm = LayerNorm(width, c.layer_norm_epsilon, **dtypes)

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
        x_BTD = self.embed_norm(embed_inputs(self.embed, input_ids, inputs_embeds))
        check_segments(segment_ids, x_BTD.shape[1], cache)
        slots_T, mask_BS, num_keys, cache = begin(cache, attention_mask, x_BTD.shape[1])
        if mask_BS is None or mask_BS.ndim > 2:
            real_BS = jnp.ones((1, num_keys), bool)
        else:
            real_BS = mask_BS
        alibi = alibi_bias(real_BS, self.config.n_head, segment_ids)
        shared = dict(bias=Bias(mask_BS, slots_T, alibi, segment_ids, segment_ids))
        return self.run(x_BTD, shared, cache, head_mask, **options)


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


CLASSES = (
    BloomModel,
    BloomForCausalLM,
    BloomForSequenceClassification,
    BloomForTokenClassification,
    BloomForQuestionAnswering,
)
