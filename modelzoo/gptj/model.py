"""GPT-J: wiring only. Reference: mesh-transformer-jax (Wang and Komatsuzaki, 2021) and transformers 4.57.6.

One layer norm feeds attention and MLP side by side, x + attention(h) + mlp(h); the first `rotary_dim` features of
every head rotate in neighbouring pairs; the attention's projections have no bias, the LM head has one.
"""

from functools import partial
from typing import Any, ClassVar, Unpack

import flax.linen as nn
import jax
import jax.numpy as jnp

from modelzoo import heads
from modelzoo.gptj.config import GPTJConfig
from modelzoo.layers import stack
from modelzoo.layers.attention import Attention
from modelzoo.layers.cache import Cache, LayerCache, begin
from modelzoo.layers.embed import Embed, embed_inputs
from modelzoo.layers.linear import dropout_layer
from modelzoo.layers.masks import causal_bias, layer_head_mask
from modelzoo.layers.mlp import Mlp
from modelzoo.layers.norm import LayerNorm
from modelzoo.layers.position import rotary_tables, rotate
from modelzoo.model import DecoderInputs, Model
from modelzoo.outputs import (
    BaseModelOutput,
    CausalLMOutput,
    QuestionAnsweringOutput,
    SequenceClassifierOutput,
)


class GPTJBlock(nn.Module):
    """One layer: x + attention(norm(x)) + mlp(norm(x)), both from the same norm."""

    config: GPTJConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        bias: jax.Array | None = None,
        rotary: tuple[jax.Array, jax.Array] | None = None,
        cache: LayerCache | None = None,
        cache_index: jax.Array | None = None,
        head_mask: jax.Array | None = None,
        output_attentions: bool = False,
        deterministic: bool = True,
    ) -> tuple[jax.Array, stack.LayerOutput]:
        c, dtypes = self.config, dict(dtype=self.dtype, param_dtype=self.param_dtype)
        init = nn.initializers.normal(c.initializer_range)
        h_BTD = LayerNorm(c.n_embd, c.layer_norm_epsilon, name="norm", **dtypes)(x_BTD)
        attended_BTD, probs, cache = Attention(
            c.n_embd, c.n_head, c.head_dim, False, False, c.attn_pdrop, init, name="attention", **dtypes
        )(
            h_BTD,
            bias=bias,
            rotary=None if rotary is None else partial(rotate, sin_BTR=rotary[0], cos_BTR=rotary[1]),
            cache=cache,
            cache_index=cache_index,
            head_mask=head_mask,
            deterministic=deterministic,
        )
        attended_BTD = dropout_layer(c.resid_pdrop)(attended_BTD, deterministic=deterministic)
        mlp = Mlp(c.n_embd, c.mlp_dim, c.activation_function, c.resid_pdrop, init, name="mlp", **dtypes)
        y_BTD = attended_BTD + mlp(h_BTD, deterministic) + x_BTD
        return y_BTD, stack.LayerOutput(cache, probs if output_attentions else None)


class GPTJModel(Model):
    """The trunk: embed, a stack of blocks, a final norm."""

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.embed = Embed(c.vocab_size, c.n_embd, embedding_init=init, **dtypes)
        self.embed_dropout = dropout_layer(c.embd_pdrop)
        self.layers = stack.parameters(self, "layers", self.block(), c.n_layer, c.n_embd)
        self.final_norm = LayerNorm(c.n_embd, c.layer_norm_epsilon, **dtypes)

    def block(self) -> GPTJBlock:
        """The block that every layer is, unbound."""
        return GPTJBlock(self.config, self.dtype, self.param_dtype, parent=None)

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        head_mask: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        cache: Cache | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        deterministic: bool = True,
    ) -> BaseModelOutput:
        """Runs the trunk; arguments as in `DecoderInputs`."""
        c = self.config
        x_BTD = embed_inputs(self.embed, input_ids, inputs_embeds)
        if token_type_ids is not None:
            x_BTD = x_BTD + self.embed(token_type_ids)  # types share the token table, as in transformers
        x_BTD = self.embed_dropout(x_BTD, deterministic=deterministic)

        if x_BTD.shape[1] > c.n_positions:
            raise ValueError(
                f"{x_BTD.shape[1]} tokens are more than the model's n_positions = {c.n_positions}"
            )
        slots_T, mask_BS, num_keys, cache = begin(cache, attention_mask, x_BTD.shape[1])
        position_ids = slots_T[None] if position_ids is None else position_ids
        x_BTD, hidden_states, layer = stack.run(
            self.block(),
            self.layers,
            x_BTD,
            shared=dict(
                bias=causal_bias(mask_BS, slots_T, num_keys),
                rotary=rotary_tables(position_ids, c.rotary_dim or c.head_dim),
                cache_index=None if cache is None else slots_T[0],
            ),
            per_layer=dict(
                cache=None if cache is None else cache.layers, head_mask=layer_head_mask(head_mask, c.n_layer)
            ),
            dropout_rng=None if deterministic else self.make_rng("dropout"),
            remat=self.remat,
            scan=self.scan_layers,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            deterministic=deterministic,
        )
        x_BTD = self.final_norm(x_BTD)
        return BaseModelOutput(
            last_hidden_state=x_BTD,
            cache=None if cache is None else cache.advance(layer.cache, x_BTD.shape[1]),
            hidden_states=None if hidden_states is None else (*hidden_states, x_BTD),
            attentions=layer.attentions,
        )


class GPTJForCausalLM(Model):
    """GPT-J with a biased language-modelling head."""

    task: ClassVar[str] = "causal_lm"

    def setup(self) -> None:
        c = self.config
        self.trunk = self.build(GPTJModel)
        self.lm_head = heads.lm_head(
            self, c.n_embd, c.vocab_size, True, nn.initializers.normal(c.initializer_range)
        )

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        logits_to_keep: int | jax.Array = 0,
        **inputs: Unpack[DecoderInputs],
    ) -> CausalLMOutput:
        """Scores the next token at every position, or at those that `logits_to_keep` names."""
        out = self.trunk(input_ids, **inputs)
        logits = self.lm_head(heads.keep_last(out.last_hidden_state, logits_to_keep))
        logits = heads.lm_logits(logits, self.config.vocab_size)
        return CausalLMOutput(logits, out.cache, out.hidden_states, out.attentions)


class GPTJForSequenceClassification(Model):
    """GPT-J with an unbiased classifier on each row's last token that is not padding."""

    task: ClassVar[str] = "sequence_classification"

    def setup(self) -> None:
        c = self.config
        self.trunk = self.build(GPTJModel)
        self.score = heads.classifier(
            self, c.n_embd, c.num_labels, False, nn.initializers.normal(c.initializer_range)
        )

    def __call__(
        self, input_ids: jax.Array | None = None, **inputs: Unpack[DecoderInputs]
    ) -> SequenceClassifierOutput:
        """Scores every row's class."""
        out = self.trunk(input_ids, **inputs)
        logits = heads.last_token(self.score(out.last_hidden_state), input_ids, self.config.pad_token_id)
        return SequenceClassifierOutput(logits, out.cache, out.hidden_states, out.attentions)


class GPTJForQuestionAnswering(Model):
    """GPT-J with a head that scores every token as an answer's first and last."""

    task: ClassVar[str] = "question_answering"

    def setup(self) -> None:
        c = self.config
        self.trunk = self.build(GPTJModel)
        self.qa_outputs = heads.classifier(
            self, c.n_embd, 2, True, nn.initializers.normal(c.initializer_range)
        )

    def __call__(
        self, input_ids: jax.Array | None = None, **inputs: Unpack[DecoderInputs]
    ) -> QuestionAnsweringOutput:
        """Scores every position as the start and the end of an answer."""
        out = self.trunk(input_ids, **inputs)
        start, end = heads.span_logits(self.qa_outputs(out.last_hidden_state))
        return QuestionAnsweringOutput(start, end, out.hidden_states, out.attentions)
