"""What every family's block and trunk have in common: fields, and the stack's run with its caches and masks."""

import functools
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from modelzoo.layers import stack
from modelzoo.layers.cache import Cache
from modelzoo.layers.masks import layer_head_mask
from modelzoo.layers.norm import make_norm
from modelzoo.model import Model
from modelzoo.outputs import BaseModelOutput


class Block(nn.Module):
    """Base of all blocks: the fields that a trunk gives them, and what their layers are made with.

    Attributes:
        config: the family's.
        dtype: computation dtype.
        param_dtype: dtype that parameters are created in.
    """

    config: Any
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @property
    def dtypes(self) -> dict[str, Any]:
        """Keyword arguments of every layer."""
        return dict(dtype=self.dtype, param_dtype=self.param_dtype)

    @property
    def projections(self) -> dict[str, Any]:
        """Keyword arguments of every layer with kernels."""
        return dict(self.dtypes, kernel_init=nn.initializers.normal(self.config.initializer_std))

    @property
    def head_fields(self) -> dict[str, Any]:
        """Keyword arguments of every attention, of a config with `knobs.BlockKnobs`."""
        c = self.config
        return dict(num_kv_heads=c.num_key_value_heads, qk_norm=c.qk_norm, norm_epsilon=c.norm_epsilon)

    def norm(self, name: str) -> nn.Module:
        """A norm over the model's width."""
        c = self.config
        return make_norm(c.norm, c.hidden_size, c.norm_epsilon, name=name, **self.dtypes)


class Trunk(Model):
    """Base of all trunks and of an encoder-decoder's two stacks.

    A subclass names its block, declares `self.layers` (`stack.parameters`) in its `setup`, and `self.final_norm` where
    it has one, embeds its inputs and calls `run`.
    """

    layer_drop: float = 0.0

    block_class: ClassVar[type[Block]]

    table_path: ClassVar[tuple[str, ...]] = ("embed", "embedding")
    """Where the token embedding [V, D], which a head may be tied to, stands in the trunk and in its parameters."""

    def block(self) -> Block:
        """The block that every layer is, unbound."""
        return self.block_class(self.config, self.dtype, self.param_dtype, parent=None)

    def norm(self) -> nn.Module:
        """A norm over the model's width."""
        c = self.config
        return make_norm(
            c.norm, c.hidden_size, c.norm_epsilon, dtype=self.dtype, param_dtype=self.param_dtype
        )

    def embedding_table(self) -> jax.Array:
        """The array at `table_path`."""
        return functools.reduce(getattr, self.table_path, cast(Any, self))

    def run(
        self,
        x_BTD: jax.Array,
        shared: Mapping[str, Any],
        cache: Cache | None = None,
        head_mask: jax.Array | None = None,
        per_layer: Mapping[str, Any] | None = None,
        cross_head_mask: jax.Array | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        deterministic: bool = True,
    ) -> BaseModelOutput:
        """Runs embedded inputs through the stack and the final norm.

        Args:
            x_BTD: [B, T, D].
            shared: what the block gets besides, the same for every layer: bias, rotary tables, an encoder's states.
            cache: with the mask of the new tokens set (`layers.cache.begin`).
            head_mask: [N] or [L, N].
            per_layer: what it gets with a leading axis L.
            cross_head_mask: as head_mask, for cross-attention.
            output_attentions, output_hidden_states, deterministic: see `StackOptions`.
        """
        num_layers = stack.num_layers_of(self.layers)
        sliced = dict(per_layer or {}, head_mask=layer_head_mask(head_mask, num_layers))
        if cross_head_mask is not None:
            sliced["cross_head_mask"] = layer_head_mask(cross_head_mask, num_layers)
        if cache is not None:
            shared = dict(shared, cache_index=cache.index)
            sliced["cache"] = cache.layers
            if cache.cross is not None:
                sliced["cross_cache"] = cache.cross
        x_BTD, hidden_states, layer = stack.run(
            self.block(),
            self.layers,
            x_BTD,
            shared=shared,
            per_layer=sliced,
            dropout_rng=None if deterministic else self.make_rng("dropout"),
            remat=self.remat,
            scan=self.scan_layers,
            layer_drop=self.layer_drop,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            deterministic=deterministic,
        )
        x_BTD = self.final_norm(x_BTD) if hasattr(self, "final_norm") else x_BTD
        return BaseModelOutput(
            last_hidden_state=x_BTD,
            cache=None if cache is None else cache.advance(layer.cache, x_BTD.shape[1], layer.cross_cache),
            hidden_states=None if hidden_states is None else (*hidden_states, x_BTD),
            attentions=layer.attentions,
            cross_attentions=layer.cross_attentions,
        )
