"""MVP's soft prompts: keys and values that stand before all others in a stack's attentions (prefix tuning).

Li and Liang, 2021, arXiv:2101.00190: P learned vectors, through an MLP that all layers share the first half of, become
the prefix of every layer and head.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from modelzoo.layers.embed import Embed
from modelzoo.layers.linear import Linear, dropout_layer
from modelzoo.layers.mlp import get_activation
from modelzoo.mvp.config import MvpConfig


class Prompt(nn.Module):
    """The prefix of one kind of attention in one stack.

    Attributes:
        num_layers, num_heads: L and N of the stack.
    """

    config: MvpConfig
    num_layers: int
    num_heads: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, deterministic: bool = True) -> jax.Array:
        """Makes the prefix: [L, 2, N, P, H], keys and then values."""
        c, width, middle = self.config, (self.config.d_model,), (self.config.prompt_mid_dim,)
        init = nn.initializers.normal(c.init_std)
        dtypes: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        embed = Embed(c.prompt_length, c.d_model, None, embedding_init=init, name="embed", **dtypes)
        fc_in = Linear(width, middle, ("embed", None), kernel_init=init, name="fc_in", **dtypes)
        made = (self.num_layers, 2, self.num_heads, c.d_model // self.num_heads)
        # The wide kernel's input rests in shards like any other; "mlp" would lie on the mesh axis that heads need.
        axes = ("embed", None, None, "heads", "head_dim")
        fc_out = Linear(middle, made, axes, kernel_init=init, name="fc_out", **dtypes)
        h_PF = get_activation("gelu")(fc_in(embed(jnp.arange(c.prompt_length))))
        prefix_PL2NH = dropout_layer(c.dropout)(fc_out(h_PF), deterministic=deterministic)
        return jnp.moveaxis(prefix_PL2NH, 0, 3)
