"""GPT-2: wiring only. References: Radford et al., 2019 (Language models are unsupervised multitask learners), and
transformers 4.57.6.

Learned positions; blocks that norm before attention, before cross-attention where the config has it, and before the
MLP; an LM head that is the embedding table. transformers hides what lies ahead twice: under a mask of four dimensions
too, as here; and a query that a mask leaves nothing to see (padding on the left) attends evenly over the keys that are
not ahead of it. Departure: here it does so over all keys, as in every family.
"""

from typing import Any, Unpack

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from modelzoo import tasks
from modelzoo.gpt2.config import GPT2Config
from modelzoo.layers import stack
from modelzoo.layers.attention import Attention, AttentionInputs
from modelzoo.layers.bias import Bias
from modelzoo.layers.cache import Cache, LayerCache, begin
from modelzoo.layers.embed import Embed, check_length, embed_inputs
from modelzoo.layers.linear import dropout_layer
from modelzoo.layers.masks import causal_bias, check_segments
from modelzoo.layers.mlp import Mlp
from modelzoo.layers.norm import LayerNorm
from modelzoo.layers.position import segment_positions
from modelzoo.model import StackOptions
from modelzoo.outputs import BaseModelOutput
from modelzoo.trunk import Block, Trunk


class GPT2Block(Block):
    """One layer: x = x + attention(norm(x)), the same to an encoder's states if it has any, then x + mlp(norm(x))."""

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        root: jax.Array | None = None,
        source_BSD: jax.Array | None = None,
        source_bias: Bias | None = None,
        cross_cache: LayerCache | None = None,
        output_attentions: bool = False,
        deterministic: bool = True,
        **attending: Unpack[AttentionInputs],
    ) -> tuple[jax.Array, stack.LayerOutput]:
        c: GPT2Config = self.config
        onto: dict[str, Any] = dict(out_init=nn.initializers.normal(c.residual_std))
        scaled = None if root is None else lambda x_BTNH: x_BTNH * root.astype(x_BTNH.dtype)

        def norm(name: str) -> jax.Array:
            return LayerNorm(c.n_embd, c.layer_norm_epsilon, name=f"{name}_norm", **self.dtypes)(x_BTD)

        def attend(name: str, **inputs: Any) -> tuple[jax.Array, jax.Array, LayerCache | None]:
            options: dict[str, Any] = dict(onto, dropout=c.attn_pdrop, name=name, **self.projections)
            attention = Attention(c.n_embd, *c.cache_heads, **options)
            y_BTD, probs, written = attention(
                norm(name), rotary=scaled, deterministic=deterministic, **inputs
            )
            y_BTD = dropout_layer(c.resid_pdrop)(y_BTD, deterministic=deterministic)
            return x_BTD + y_BTD, probs, written

        x_BTD, probs, cache = attend("attention", **attending)
        cross_probs = projected = None
        if c.add_cross_attention and self.is_initializing():
            source_BSD = x_BTD
        if source_BSD is not None or cross_cache is not None:
            inputs = dict(head_mask=attending.get("head_mask"), bias=source_bias, projected=cross_cache)
            x_BTD, cross_probs, projected = attend("cross_attention", source_BSD=source_BSD, **inputs)
        mlp = Mlp(
            c.n_embd, c.mlp_dim, c.activation_function, c.resid_pdrop, name="mlp", **onto, **self.projections
        )
        x_BTD = x_BTD + mlp(norm("mlp"), deterministic)

        asked = (probs, cross_probs) if output_attentions else (None, None)
        return x_BTD, stack.LayerOutput(cache, asked[0], None if cache is None else projected, asked[1])


class GPT2Model(Trunk):
    """The trunk: embed tokens and positions, a stack of blocks, a final norm."""

    block_class = GPT2Block

    def setup(self) -> None:
        c = self.config
        dtypes: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        tables = dict(dtypes, embedding_init=nn.initializers.normal(c.initializer_range))
        self.embed = Embed(c.vocab_size, c.n_embd, **tables)
        self.embed_positions = Embed(c.n_positions, c.n_embd, row_axis=None, **tables)
        self.embed_dropout = dropout_layer(c.embd_pdrop)
        self.layers = stack.parameters(self, "layers", self.block(), c.n_layer, c.n_embd)
        self.final_norm = LayerNorm(c.n_embd, c.layer_norm_epsilon, **dtypes)

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        cache: Cache | None = None,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        head_mask: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        encoder_hidden_states: jax.Array | None = None,
        encoder_attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        **options: Unpack[StackOptions],
    ) -> BaseModelOutput:
        """Runs the trunk; arguments as `GPTJModel`'s of the same names, and an encoder's as `BertTrunk`'s.

        Raises:
            ValueError: more tokens than positions; encoder_hidden_states without add_cross_attention.
        """
        c = self.config
        crosses = encoder_hidden_states is not None or (cache is not None and cache.cross is not None)
        if crosses and not c.add_cross_attention:
            raise ValueError(
                "encoder_hidden_states need cross-attention: set add_cross_attention in the config"
            )
        x_BTD = embed_inputs(self.embed, input_ids, inputs_embeds)
        length = x_BTD.shape[1]
        check_length(x_BTD, c.n_positions, "n_positions")
        check_segments(segment_ids, length, cache)
        slots_T, mask_BS, num_keys, cache = begin(cache, attention_mask, length)
        if mask_BS is not None and mask_BS.ndim == 4:
            mask_BS = mask_BS + causal_bias(None, slots_T, num_keys)
        if position_ids is None:
            of_slots = slots_T.reshape(-1, length)
            position_ids = of_slots if segment_ids is None else segment_positions(segment_ids)
        x_BTD = x_BTD + self.embed_positions(position_ids)
        if token_type_ids is not None:
            x_BTD = x_BTD + self.embed(token_type_ids)  # types share the token table, as in transformers
        x_BTD = self.embed_dropout(x_BTD, deterministic=options.get("deterministic", True))

        shared: dict[str, Any] = dict(bias=Bias(mask_BS, slots_T, None, segment_ids, segment_ids))
        if crosses:
            shared |= dict(source_BSD=encoder_hidden_states, source_bias=Bias(encoder_attention_mask))
        return self.run(x_BTD, shared, cache, head_mask, self._roots(), **options)

    def _roots(self) -> dict[str, jax.Array]:
        """What queries and keys of each layer are multiplied by, where scores are scaled in another way than usual."""
        c, scale_L = self.config, np.ones(self.config.n_layer, np.float32)
        if not c.scale_attn_weights:
            scale_L = scale_L * np.float32(c.cache_heads[1] ** 0.5)
        if c.scale_attn_by_inverse_layer_idx:
            scale_L = scale_L / np.arange(1, c.n_layer + 1, dtype=np.float32)
        return {} if (scale_L == 1).all() else dict(root=jnp.asarray(np.sqrt(scale_L)))


class GPT2LMHeadModel(tasks.CausalLM):
    """GPT-2 with a language-modelling head, its embedding table."""

    trunk_class = GPT2Model


class GPT2DoubleHeadsModel(tasks.DoubleHeads):
    """GPT-2 that scores the next token and, by one token of each, choices between texts."""

    trunk_class = GPT2Model


class GPT2ForSequenceClassification(tasks.LastTokenClassification):
    """GPT-2 that classifies a sequence by its last token."""

    trunk_class = GPT2Model


class GPT2ForTokenClassification(tasks.TokenClassification):
    """GPT-2 that classifies every token."""

    trunk_class = GPT2Model


class GPT2ForQuestionAnswering(tasks.QuestionAnswering):
    """GPT-2 that marks an answer in its text."""

    trunk_class = GPT2Model


__all__ = [
    "GPT2Model",
    "GPT2LMHeadModel",
    "GPT2DoubleHeadsModel",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2ForQuestionAnswering",
]
