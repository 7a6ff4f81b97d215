"""MVP's encoder and decoder: one block, two stacks. Reference: BART (Lewis et al., 2020, arXiv:1910.13461).

Blocks norm after the residual; positions are learned; the embeddings are normed. Each stack takes embedded tokens,
since the table belongs to both.
"""

import dataclasses
from functools import partial
from typing import Any, ClassVar, Unpack

import flax.linen as nn
import jax

from modelzoo.layers import stack
from modelzoo.layers.attention import Attention, AttentionInputs
from modelzoo.layers.bias import Bias
from modelzoo.layers.cache import Cache, LayerCache, begin
from modelzoo.layers.embed import Embed, check_length
from modelzoo.layers.linear import dropout_layer
from modelzoo.layers.masks import check_segments, to_bias
from modelzoo.layers.mlp import Mlp
from modelzoo.layers.position import segment_positions
from modelzoo.model import StackOptions
from modelzoo.mvp.config import MvpConfig
from modelzoo.mvp.prompt import Prompt
from modelzoo.outputs import BaseModelOutput
from modelzoo.trunk import Block, Trunk

FIRST_POSITION = 2
"""The row of position 0; BART's tables begin with two rows that nothing reads."""


class MvpBlock(Block):
    """One layer: attention, in a decoder cross-attention, MLP, each as x = norm(x + it(x)).

    Cross-attention runs when there is something to attend to.
    """

    side: ClassVar[str]

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        self_prompt: jax.Array | None = None,
        cross_prompt: jax.Array | None = None,
        source_BSD: jax.Array | None = None,
        cross_bias: Bias | None = None,
        cross_head_mask: jax.Array | None = None,
        cross_cache: LayerCache | None = None,
        output_attentions: bool = False,
        deterministic: bool = True,
        **attending: Unpack[AttentionInputs],
    ) -> tuple[jax.Array, stack.LayerOutput]:
        c: MvpConfig = self.config
        _, num_heads, mlp_dim = c.sizes(self.side)
        heads = dict(num_heads=num_heads, head_dim=c.d_model // num_heads, dropout=c.attention_dropout)
        attention = partial(Attention, c.d_model, qk_norm=c.qk_norm, **heads, **self.projections)
        drop = partial(dropout_layer(c.dropout), deterministic=deterministic)

        h_BTD, probs, written = attention(name="attention")(
            x_BTD, prefix=_pair(self_prompt), deterministic=deterministic, **attending
        )
        x_BTD = self.norm("attention_norm")(x_BTD + drop(h_BTD))

        cross_probs, seen = None, None
        has_source = source_BSD is not None or cross_cache is not None
        if self.side == "decoder" and (has_source or self.is_initializing()):
            h_BTD, cross_probs, seen = attention(name="cross_attention")(
                x_BTD,
                source_BSD=source_BSD,
                projected=cross_cache,
                bias=cross_bias,
                prefix=_pair(cross_prompt),
                head_mask=cross_head_mask,
                deterministic=deterministic,
            )
            x_BTD = self.norm("cross_attention_norm")(x_BTD + drop(h_BTD))

        rates = dict(dropout=c.dropout, activation_dropout=c.activation_dropout)
        mlp = Mlp(c.d_model, mlp_dim, c.activation_function, name="mlp", **rates, **self.projections)
        y_BTD = self.norm("mlp_norm")(x_BTD + mlp(x_BTD, deterministic))
        if not output_attentions:
            probs, cross_probs = None, None
        return y_BTD, stack.LayerOutput(written, probs, None if written is None else seen, cross_probs)


def _pair(prompt_2NPH: jax.Array | None) -> tuple[jax.Array, jax.Array] | None:
    return None if prompt_2NPH is None else (prompt_2NPH[0], prompt_2NPH[1])


class MvpEncoderBlock(MvpBlock):
    """A layer of the encoder."""

    side = "encoder"


class MvpDecoderBlock(MvpBlock):
    """A layer of the decoder."""

    side = "decoder"


class _Stack(Trunk):
    """What both stacks have: positions, the embeddings' norm, blocks, perhaps prompts.

    Attributes:
        has_prompts: whether the config's `use_prompt` counts.
    """

    has_prompts: bool = True

    block_class: ClassVar[type[MvpBlock]]
    prompts: ClassVar[tuple[str, ...]]
    """The prompts that a block takes."""

    def setup(self) -> None:
        c, dtypes = self.config, dict(dtype=self.dtype, param_dtype=self.param_dtype)
        init = nn.initializers.normal(c.init_std)
        num_rows = c.max_position_embeddings + FIRST_POSITION
        self.positions = Embed(num_rows, c.d_model, row_axis=None, embedding_init=init, **dtypes)
        self.embed_norm = self.norm()
        self.embed_dropout = dropout_layer(c.dropout)
        num_layers, num_heads, _ = c.sizes(self.block_class.side)
        self.layers = stack.parameters(self, "layers", self.block(), num_layers, c.d_model)
        if c.use_prompt and self.has_prompts:
            for name in self.prompts:
                setattr(self, name, Prompt(c, num_layers, num_heads, **dtypes))

    def enter(
        self, x_BTD: jax.Array, slots_T: jax.Array, segment_ids: jax.Array | None, deterministic: bool
    ) -> jax.Array:
        """What the first block reads: embedded tokens with their positions, normed."""
        if segment_ids is not None:
            slots_T = segment_positions(segment_ids)
        check_length(x_BTD, self.config.max_position_embeddings, "max_position_embeddings")
        x_BTD = self.embed_norm(x_BTD + self.positions(slots_T + FIRST_POSITION))
        return self.embed_dropout(x_BTD, deterministic=deterministic)

    def make_prompts(self, deterministic: bool) -> dict[str, jax.Array]:
        """Every prompt by name, [L, 2, N, P, H]."""
        names = self.prompts if self.config.use_prompt and self.has_prompts else ()
        return {name: getattr(self, name)(deterministic) for name in names}


class MvpEncoder(_Stack):
    """The encoder: every token sees every other that is not padding."""

    block_class = MvpEncoderBlock
    prompts = ("self_prompt",)

    def __call__(
        self,
        x_BTD: jax.Array,
        attention_mask: jax.Array | None = None,
        head_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        **options: Unpack[StackOptions],
    ) -> BaseModelOutput:
        """Runs embedded tokens through the encoder.

        Args:
            x_BTD: [B, T, D].
            attention_mask: [B, T], non-zero where a token is real.
            head_mask: [N] or [L, N].
            segment_ids: [B, T], which document of a packed row a token belongs to; tokens see their own alone.
            options: see `StackOptions`.
        """
        deterministic = options.get("deterministic", True)
        check_segments(segment_ids, x_BTD.shape[1], None)
        slots_T, mask_BT, _, _ = begin(None, attention_mask, x_BTD.shape[1])
        x_BTD = self.enter(x_BTD, slots_T, segment_ids, deterministic)
        shared = dict(bias=Bias(mask_BT, None, None, segment_ids, segment_ids))
        return self.run(x_BTD, shared, None, head_mask, self.make_prompts(deterministic), **options)


class MvpDecoder(_Stack):
    """The decoder: a token sees those before it and, through cross-attention, the encoder's."""

    block_class = MvpDecoderBlock
    prompts = ("self_prompt", "cross_prompt")

    def __call__(
        self,
        x_BTD: jax.Array,
        attention_mask: jax.Array | None = None,
        source_BSD: jax.Array | None = None,
        source_mask: jax.Array | None = None,
        head_mask: jax.Array | None = None,
        cross_head_mask: jax.Array | None = None,
        cache: Cache | None = None,
        segment_ids: jax.Array | None = None,
        source_segment_ids: jax.Array | None = None,
        **options: Unpack[StackOptions],
    ) -> BaseModelOutput:
        """Runs embedded tokens through the decoder.

        Args:
            x_BTD: [B, T, D].
            attention_mask: [B, T], or longer with a cache (`layers.cache.Cache.admit`). Of four dimensions,
                [B, 1, T, S], it says alone what a query sees: what is one.
            source_BSD: the encoder's states [B, S, D]; None where the cache has seen them, or where there are none.
            source_mask: [B, S], non-zero where a token of the encoder is real.
            head_mask, cross_head_mask: [N] or [L, N].
            cache: of earlier tokens.
            segment_ids, source_segment_ids: [B, T] and [B, S], which document of a packed row a token is of; tokens
                see their own alone, and of the encoder's those of the same number.
            options: see `StackOptions`.

        Raises:
            ValueError: a mask does not fit what it is for.
        """
        deterministic = options.get("deterministic", True)
        if attention_mask is not None and attention_mask.ndim == 4:
            attention_mask = to_bias(attention_mask == 1)
        check_segments(segment_ids, x_BTD.shape[1], cache)
        slots_T, mask_BS, _, cache = begin(cache, attention_mask, x_BTD.shape[1])
        x_BTD = self.enter(x_BTD, slots_T, segment_ids, deterministic)
        shared: dict[str, Any] = dict(bias=Bias(mask_BS, slots_T, None, segment_ids, segment_ids))
        if source_BSD is not None:
            if (segment_ids is None) != (source_segment_ids is None):
                raise ValueError(
                    "segments of the encoder's tokens and of the decoder's go together: pass both or none"
                )
            check_segments(source_segment_ids, source_BSD.shape[1], cache)
            bias = _source_bias(source_mask, source_BSD.shape[1])
            segments = dict(query_segments=segment_ids, key_segments=source_segment_ids)
            shared["source_BSD"] = source_BSD
            shared["cross_bias"] = dataclasses.replace(bias, **segments)
        elif cache is not None and cache.cross is not None:
            shared["cross_bias"] = _source_bias(source_mask, jax.tree.leaves(cache.cross)[0].shape[-2])
        prompts = self.make_prompts(deterministic)
        return self.run(x_BTD, shared, cache, head_mask, prompts, cross_head_mask, **options)


def _source_bias(source_mask: jax.Array | None, length: int) -> Bias:
    """The bias of cross-attention to `length` tokens of an encoder."""
    if source_mask is not None and (source_mask.ndim != 2 or source_mask.shape[1] != length):
        raise ValueError(
            f"the mask of the encoder's tokens has shape {source_mask.shape}: it is [batch, {length}], as the encoder "
            f"has {length} tokens"
        )
    return Bias(source_mask)
