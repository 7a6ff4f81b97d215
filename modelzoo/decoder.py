"""What causal decoders share: block and trunk, built as `knobs.DecoderKnobs` say. A family adds how it embeds.

sequential, pre    x = x + attention(norm(x)), then x + mlp(norm(x))
sequential, post   x = norm(x + attention(x)), then norm(x + mlp(x))
parallel, pre      x + attention(h) + mlp(h) with h = norm(x)
parallel, post     norm(x + attention(x) + mlp(x))
"""

from functools import partial
from typing import Any, ClassVar, Unpack

import flax.linen as nn
import jax
import jax.numpy as jnp

from modelzoo.layers import stack
from modelzoo.layers.attention import Attention, AttentionInputs
from modelzoo.layers.bias import Bias
from modelzoo.layers.cache import Cache, begin
from modelzoo.layers.embed import Embed, check_length
from modelzoo.layers.linear import dropout_layer
from modelzoo.layers.masks import check_segments
from modelzoo.layers.mlp import Mlp
from modelzoo.layers.position import alibi_bias, rotary_tables, rotate, segment_positions
from modelzoo.trunk import Block, Trunk


class DecoderBlock(Block):
    """One layer: attention and MLP, with norms and residuals where the config places them."""

    attention_biases: ClassVar[bool] = True
    """Whether the attention's projections have biases."""

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        rotary: tuple[jax.Array, jax.Array] | None = None,
        output_attentions: bool = False,
        deterministic: bool = True,
        **attending: Unpack[AttentionInputs],
    ) -> tuple[jax.Array, stack.LayerOutput]:
        c, is_pre = self.config, self.config.norm_placement == "pre"
        turn = None if rotary is None else partial(rotate, sin_BTR=rotary[0], cos_BTR=rotary[1])
        attention = Attention(
            c.hidden_size,
            c.num_heads,
            c.head_dim,
            use_bias=self.attention_biases,
            out_bias=self.attention_biases,
            dropout=c.attention_dropout,
            relative="relative_key" if c.position == "relative" else None,
            max_positions=c.max_positions or 0,
            name="attention",
            **self.head_fields,
            **self.projections,
        )
        mlp = Mlp(
            c.hidden_size, c.mlp_dim, c.activation_function, c.hidden_dropout, name="mlp", **self.projections
        )
        drop = dropout_layer(c.hidden_dropout)

        def attend(h_BTD: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
            y_BTD, probs, cache = attention(h_BTD, rotary=turn, deterministic=deterministic, **attending)
            return drop(y_BTD, deterministic=deterministic), probs, cache

        def before(name: str, x_BTD: jax.Array) -> jax.Array:
            return self.norm(name)(x_BTD) if is_pre else x_BTD

        def after(name: str, x_BTD: jax.Array) -> jax.Array:
            return x_BTD if is_pre else self.norm(name)(x_BTD)

        def residual(x_BTD: jax.Array, h_BTD: jax.Array) -> jax.Array:
            return h_BTD if c.residual_is_normed else x_BTD

        if c.block == "parallel":
            h_BTD = before("norm", x_BTD)
            attended_BTD, probs, cache = attend(h_BTD)
            y_BTD = after("norm", attended_BTD + mlp(h_BTD, deterministic) + residual(x_BTD, h_BTD))
        else:
            h_BTD = before("attention_norm", x_BTD)
            attended_BTD, probs, cache = attend(h_BTD)
            x_BTD = after("attention_norm", residual(x_BTD, h_BTD) + attended_BTD)
            h_BTD = before("mlp_norm", x_BTD)
            y_BTD = after("mlp_norm", residual(x_BTD, h_BTD) + mlp(h_BTD, deterministic))
        return y_BTD, stack.LayerOutput(cache, probs if output_attentions else None)


class DecoderTrunk(Trunk):
    """Embed, a stack of blocks, a final norm where blocks norm what they read.

    A subclass names its `block_class`, and its call embeds, gives positions (`locate`) and runs.
    """

    def setup(self) -> None:
        c = self.config
        table: dict[str, Any] = dict(
            features=c.hidden_size,
            embedding_init=nn.initializers.normal(c.initializer_std),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        self.embed = Embed(c.vocab_size, **table)
        if c.position == "learned":
            self.embed_positions = Embed(c.max_positions, row_axis=None, **table)
        self.layers = stack.parameters(self, "layers", self.block(), c.num_layers, c.hidden_size)
        if c.norm_placement == "pre":
            self.final_norm = self.norm()

    def default_positions(
        self, slots_T: jax.Array, mask_BS: jax.Array | None, segment_ids: jax.Array | None
    ) -> jax.Array:
        """The position ids [B or 1, T] of a call that passes none: counted from a row's or a segment's first slot.

        Args:
            slots_T: the tokens' places in their rows, [T] or [B, T].
            mask_BS: of the keys, as `layers.cache.begin` gives it.
            segment_ids: [B, T] or None.
        """
        return jnp.atleast_2d(slots_T) if segment_ids is None else segment_positions(segment_ids)

    def locate(
        self,
        x_BTD: jax.Array,
        attention_mask: jax.Array | None,
        cache: Cache | None,
        segment_ids: jax.Array | None,
        position_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, Any], Cache | None]:
        """Gives embedded tokens their places, in the way of the config's `position`.

        Args:
            x_BTD: [B, T, D].
            attention_mask, cache, segment_ids, position_ids: as a decoder takes them (`gptj.model.GPTJModel`). Rotary
                and learned positions are those of position_ids; ALiBi counts the real tokens of a row for itself,
                relative positions its slots.

        Returns:
            (x, with learned positions added; what the blocks share; the cache with its mask set).

        Raises:
            ValueError: more tokens than there are positions; masks or segments of another shape.
        """
        c = self.config
        check_length(x_BTD, c.max_positions, c.length_field)
        check_segments(segment_ids, x_BTD.shape[1], cache)
        slots_T, mask_BS, num_keys, cache = begin(cache, attention_mask, x_BTD.shape[1])
        alibi = None
        if c.position == "alibi":
            if mask_BS is None or mask_BS.ndim > 2:
                real_BS = jnp.ones((1, num_keys), bool)
            else:
                real_BS = mask_BS
            alibi = alibi_bias(real_BS, c.num_heads, segment_ids)
        shared: dict[str, Any] = dict(bias=Bias(mask_BS, slots_T, alibi, segment_ids, segment_ids))
        if c.position in ("rotary", "learned"):
            if position_ids is None:
                position_ids = self.default_positions(slots_T, mask_BS, segment_ids)
            if c.position == "rotary":
                shared["rotary"] = rotary_tables(position_ids, c.rotary_features)
            else:
                x_BTD = x_BTD + self.embed_positions(position_ids)
        return x_BTD, shared, cache
