"""What the descendants of BERT share: config, block, trunk, names of tensors. A family says where its norms stand.

BERT (Devlin et al., 2018, arXiv:1810.04805) embeds tokens, token types and learned positions, runs blocks of attention
and MLP, and pools the first token. With `is_decoder` its attention is causal, with `add_cross_attention` its blocks
also attend to an encoder's states. Where these families depart from transformers 4.57.6:

- Decoding through a cache gives what the whole sequence gives at once. transformers measures the relative positions of
  all tokens of a call from the last one where it keeps a cache, and from each token's own place where it does not.
- A 4-D attention mask is taken, as a bias.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Unpack, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from modelzoo import heads, tasks
from modelzoo.knobs import BlockKnobs
from modelzoo.layers import stack
from modelzoo.layers.attention import Attention
from modelzoo.layers.bias import Bias
from modelzoo.layers.cache import Cache, LayerCache, begin
from modelzoo.layers.embed import Embed, check_length, embed_inputs
from modelzoo.layers.linear import dropout_layer
from modelzoo.layers.masks import check_segments
from modelzoo.layers.mlp import Mlp, get_activation
from modelzoo.layers.position import segment_positions
from modelzoo.model import StackOptions
from modelzoo.outputs import BaseModelOutput
from modelzoo.trunk import Block, Trunk
from modelzoo.weights import Weight

Given = jax.Array | None
"""An input that may be left out."""
Layer = Callable[[jax.Array], Any]
"""From [B, T, D] to a tuple: the same, and what else there is."""
POSITION_TYPES = ("absolute", "relative_key", "relative_key_query")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig(BlockKnobs):
    """Hyper-parameters, named as in transformers; the defaults are BERT-base's. For knobs see `modelzoo.knobs`.

    Attributes:
        vocab_size: V.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: D, L, N, F.
        hidden_act: a key of `layers.mlp.ACTIVATIONS` or GATED.
        hidden_dropout_prob: dropout on embeddings, after attention and MLP, on what classifiers read.
        attention_probs_dropout_prob: on attention weights.
        max_position_embeddings: rows of the table of positions; the largest distance + 1 of relative ones.
        type_vocab_size: kinds of token_type_ids.
        initializer_range: standard deviation of every kernel and table at the start.
        layer_norm_eps: added to the variance.
        position_embedding_type: one of POSITION_TYPES: a table of positions is added to the embeddings, or every
            layer's scores depend on learned vectors of the distance (`layers.attention.Attention`).
        is_decoder: attention is causal, and a cache may be passed.
        add_cross_attention: blocks also attend to encoder_hidden_states; needs is_decoder.
        tie_word_embeddings: the LM head's projection is the table of tokens.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    position_embedding_type: str = "absolute"
    is_decoder: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_sizes("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        self._check_sizes("intermediate_size", "max_position_embeddings", "type_vocab_size")
        self._check_probabilities("hidden_dropout_prob", "attention_probs_dropout_prob")
        self._check(
            self.hidden_size % self.num_attention_heads == 0,
            "hidden_size",
            f"num_attention_heads = {self.num_attention_heads} does not divide it",
        )
        self._check(
            self.pad_token_id is None or 0 <= self.pad_token_id < self.vocab_size,
            "pad_token_id",
            f"it is an id below vocab_size = {self.vocab_size}",
        )
        self._check(
            self.position_embedding_type in POSITION_TYPES,
            "position_embedding_type",
            f"choose from {POSITION_TYPES}",
        )
        self._check(
            self.is_decoder or not self.add_cross_attention,
            "add_cross_attention",
            "only a decoder attends to an encoder: set is_decoder too",
        )
        get_activation(self.hidden_act)
        self._check_knobs()

    @property
    def num_layers(self) -> int:
        return self.num_hidden_layers

    @property
    def max_positions(self) -> int:
        """Rows of the table of positions that tokens may stand at."""
        return self.max_position_embeddings

    @property
    def head_dropout(self) -> float:
        return self.hidden_dropout_prob

    @property
    def lm_head_act(self) -> str:
        """Activation of the LM head's own layer."""
        return self.hidden_act

    @property
    def relative(self) -> str | None:
        """Kind of relative positions, if any."""
        return None if self.position_embedding_type == "absolute" else self.position_embedding_type

    @property
    def num_heads(self) -> int:
        return self.num_attention_heads

    @property
    def norm_epsilon(self) -> float:
        return self.layer_norm_eps


class BertBlock(Block):
    """One layer: self-attention, cross-attention to an encoder's states if there are any, MLP.

    Each is x + it(norm(x)) where norms are placed before, norm(x + it(x)) where they are placed behind.
    """

    crosses_relatively: ClassVar[bool] = False
    """Whether cross-attention has relative positions where self-attention has."""

    def residual(self, name: str, x_BTD: jax.Array, layer: Layer) -> Any:
        """layer(x) with the residual and the layer's norm; what else the layer returns is handed on."""
        norm, is_pre = self.norm(f"{name}_norm"), self.config.norm_placement == "pre"
        y_BTD, *rest = layer(norm(x_BTD) if is_pre else x_BTD)
        y_BTD = x_BTD + y_BTD
        return y_BTD if is_pre else norm(y_BTD), *rest

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        output_attentions: bool = False,
        deterministic: bool = True,
        head_mask: Given = None,
        bias: Bias | None = None,
        cache: LayerCache | None = None,
        cache_index: Given = None,
        source_BSD: Given = None,
        source_bias: Bias | None = None,
        cross_cache: LayerCache | None = None,
    ) -> tuple[jax.Array, stack.LayerOutput]:
        c, drop = self.config, dropout_layer(self.config.hidden_dropout_prob)

        def attend(name: str, relative: str | None, x_BTD: jax.Array, **options: Any) -> Any:
            sizes = dict(features=c.hidden_size, num_heads=c.num_attention_heads, head_dim=c.head_dim)
            sizes |= dict(max_positions=c.max_position_embeddings, **self.head_fields)
            dropout = c.attention_probs_dropout_prob
            attention = Attention(**sizes, relative=relative, dropout=dropout, name=name, **self.projections)
            options |= dict(cache_index=cache_index, head_mask=head_mask, deterministic=deterministic)

            def layer(h_BTD: jax.Array) -> tuple[jax.Array, jax.Array, LayerCache | None]:
                y_BTD, probs, written = attention(h_BTD, **options)
                return drop(y_BTD, deterministic=deterministic), probs, written

            return self.residual(name, x_BTD, layer)

        x_BTD, probs, written = attend("attention", c.relative, x_BTD, bias=bias, cache=cache)
        cross_probs = projected = None
        if c.add_cross_attention and self.is_initializing():
            source_BSD = x_BTD
        if source_BSD is not None or cross_cache is not None:
            source = dict(source_BSD=source_BSD, projected=cross_cache, bias=source_bias)
            relative = c.relative if self.crosses_relatively else None
            x_BTD, cross_probs, projected = attend("cross_attention", relative, x_BTD, **source)
        sizes = dict(features=c.hidden_size, hidden=c.intermediate_size)
        rate = c.hidden_dropout_prob
        mlp = Mlp(**sizes, activation=c.hidden_act, dropout=rate, name="mlp", **self.projections)
        x_BTD, *_ = self.residual("mlp", x_BTD, lambda h_BTD: (mlp(h_BTD, deterministic),))

        asked = (probs, cross_probs) if output_attentions else (None, None)
        projected = None if cache is None else projected
        return x_BTD, stack.LayerOutput(written, asked[0], projected, asked[1])


class BertTrunk(Trunk):
    """Embeddings, a stack of blocks, a final norm where blocks norm what they read, a pooler.

    A family names its `block_class`, and sets up `embed_norm` where it has one.

    Attributes:
        add_pooling_layer: has a pooler. Language models, and classifiers of tokens, have none.
    """

    add_pooling_layer: bool = True

    block_class: ClassVar[type[BertBlock]]
    pads_positions: ClassVar[bool] = False
    """Whether the row of the table of positions that pad_token_id numbers is for padding."""

    def setup(self) -> None:
        c, padding = self.config, self.config.pad_token_id
        init = nn.initializers.normal(c.initializer_range)
        shared: dict[str, Any] = dict(
            features=c.hidden_size, embedding_init=init, dtype=self.dtype, param_dtype=self.param_dtype
        )
        self.embed = Embed(c.vocab_size, padding_idx=padding, **shared)
        self.embed_types = Embed(c.type_vocab_size, row_axis=None, **shared)
        padding = padding if self.pads_positions else None
        self.embed_positions = Embed(c.max_position_embeddings, row_axis=None, padding_idx=padding, **shared)
        self.embed_dropout = dropout_layer(c.hidden_dropout_prob)
        self.layers = stack.parameters(self, "layers", self.block(), c.num_hidden_layers, c.hidden_size)
        if c.norm_placement == "pre":
            self.final_norm = self.norm()
        if self.add_pooling_layer:
            self.pooler = heads.Pooler(c.hidden_size, init, self.dtype, self.param_dtype)

    def default_positions(
        self, input_ids: Given, slots_T: jax.Array, cache: Cache | None, segment_ids: Given
    ) -> jax.Array:
        """The position ids [B or 1, T] of a call that passes none.

        Args:
            input_ids: [B, T], or None where embeddings were passed.
            slots_T: the places of the tokens in their rows.
            cache: with the new tokens' mask set.
            segment_ids: [B, T], in each of which positions start anew, or None.
        """
        return jnp.atleast_2d(slots_T) if segment_ids is None else segment_positions(segment_ids)

    def __call__(
        self,
        input_ids: Given = None,
        attention_mask: Given = None,
        token_type_ids: Given = None,
        position_ids: Given = None,
        head_mask: Given = None,
        inputs_embeds: Given = None,
        encoder_hidden_states: Given = None,
        encoder_attention_mask: Given = None,
        segment_ids: Given = None,
        cache: Cache | None = None,
        **options: Unpack[StackOptions],
    ) -> BaseModelOutput:
        """Embeds, runs the blocks and pools.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], non-zero where a token is real; a decoder's with a cache may be longer and then
                covers the slots from the first. [B, T, S] says of each query what it sees, in a decoder too.
            token_type_ids: [B, T], by default 0.
            position_ids: [B or 1, T]; see `default_positions`.
            head_mask: [N] or [L, N], multiplied into the probabilities of attention and cross-attention.
            inputs_embeds: [B, T, D] in place of input_ids.
            encoder_hidden_states: [B, S, D], attended to by a decoder; an encoder leaves them out, as in transformers.
                With a cache, a call whose cache has seen them need not pass them again.
            encoder_attention_mask: [B, S] or [B, T, S], of the encoder's states; None shows them all.
            segment_ids: [B, T], which document of a packed row a token belongs to; tokens see their own alone. Of the
                encoder's states, encoder_attention_mask [B, T, S] says what each sees.
            cache: from `init_cache` or an earlier call; a decoder's.
            options: see `StackOptions`.

        Raises:
            ValueError: a cache without is_decoder; encoder_hidden_states without add_cross_attention; more tokens than
                there are positions; both or neither of input_ids and inputs_embeds.
        """
        c, deterministic = self.config, options.get("deterministic", True)
        if cache is not None and not c.is_decoder:
            raise ValueError(
                "a cache is a decoder's, whose attention is causal: set is_decoder in the config"
            )
        x_BTD = embed_inputs(self.embed, input_ids, inputs_embeds)
        limit = c.max_positions if position_ids is None else c.max_position_embeddings
        check_length(x_BTD, limit, "positions")
        check_segments(segment_ids, x_BTD.shape[1], cache)
        slots_T, mask_BS, _, cache = begin(cache, attention_mask, x_BTD.shape[1])
        types = jnp.zeros((1, 1), jnp.int32) if token_type_ids is None else token_type_ids
        x_BTD = x_BTD + self.embed_types(types)
        if c.relative is None or self.is_initializing():  # the table stands in every file
            if position_ids is None:
                position_ids = self.default_positions(input_ids, slots_T, cache, segment_ids)
            x_BTD = x_BTD + self.embed_positions(position_ids)
        x_BTD = self.embed_norm(x_BTD) if hasattr(self, "embed_norm") else x_BTD
        x_BTD = self.embed_dropout(x_BTD, deterministic=deterministic)

        bias = Bias(mask_BS, slots_T if c.is_decoder else None, None, segment_ids, segment_ids)
        source = self._source(encoder_hidden_states, encoder_attention_mask, cache)
        shared = dict(bias=bias) | source
        out = self.run(x_BTD, shared, cache, head_mask, **options)
        if not self.add_pooling_layer:
            return out
        return cast(Any, out).replace(pooler_output=self.pooler(out.last_hidden_state))

    def _source(self, states_BSD: Given, mask: Given, cache: Cache | None) -> dict[str, Any]:
        """What the blocks get for their cross-attention."""
        c = self.config
        if not c.is_decoder or (states_BSD is None and (cache is None or cache.cross is None)):
            return {}
        if not c.add_cross_attention:
            raise ValueError(
                "encoder_hidden_states need cross-attention: set add_cross_attention in the config"
            )
        if states_BSD is not None and c.relative is not None and self.block_class.crosses_relatively:
            check_length(states_BSD, c.max_positions, "positions")
        return dict(source_BSD=states_BSD, source_bias=Bias(mask))


class LMTask(tasks.Task):
    """A task whose LM head is BERT's: dense, activation and norm before the projection, and a bias."""

    def make_lm_head(self, **options: Any) -> heads.LMHead:
        c = self.config
        options |= dict(use_bias=True, transform=c.lm_head_act, norm=c.norm, norm_epsilon=c.norm_epsilon)
        return super().make_lm_head(**options)


def trunk_weights(prefix: str, decoder: str) -> tuple[Weight, ...]:
    """The rows of a family's weight table that all have.

    Args:
        prefix: of the trunk's names.
        decoder: name of the LM head's projection; a file may hold it though it is tied.
    """
    layer, embeddings = f"{prefix}encoder.layer.{{}}.", f"{prefix}embeddings."
    rows = [
        Weight(f"{embeddings}word_embeddings.weight", "embed.embedding", "v d -> v d", also=(decoder,)),
        Weight(f"{embeddings}position_embeddings.weight", "embed_positions.embedding", "p d -> p d"),
        Weight(f"{embeddings}token_type_embeddings.weight", "embed_types.embedding", "t d -> t d"),
    ]
    for theirs, ours in (("attention", "layers.attention"), ("crossattention", "layers.cross_attention")):
        for name in ("query", "key", "value"):
            source = f"{layer}{theirs}.self.{name}"
            rows.append(Weight(f"{source}.weight", f"{ours}.{name}.kernel", "(n h) d -> d n h"))
            rows.append(Weight(f"{source}.bias", f"{ours}.{name}.bias", "(n h) -> n h"))
        table = f"{layer}{theirs}.self.distance_embedding.weight"
        rows.append(Weight(table, f"{ours}.distance", "r h -> r h"))
        out = f"{layer}{theirs}.output.dense"
        rows.append(Weight(f"{out}.weight", f"{ours}.out.kernel", "d (n h) -> n h d"))
        rows.append(Weight(f"{out}.bias", f"{ours}.out.bias", "d -> d"))
    dense = (
        (f"{layer}intermediate.dense", "layers.mlp.fc_in"),
        (f"{layer}output.dense", "layers.mlp.fc_out"),
    )
    pooler = linear_weights(f"{prefix}pooler.dense", "pooler.dense", optional=True)
    return (*rows, *(row for pair in dense for row in linear_weights(*pair)), *pooler)


def linear_weights(source: str, target: str, optional: bool = False) -> tuple[Weight, Weight]:
    """The rows of a linear layer."""
    kernel = Weight(f"{source}.weight", f"{target}.kernel", "o i -> i o", optional=optional)
    return kernel, Weight(f"{source}.bias", f"{target}.bias", "o -> o", optional=optional)


def norm_weights(source: str, target: str) -> tuple[Weight, Weight]:
    """The rows of a layer norm."""
    scale = Weight(f"{source}.weight", f"{target}.scale", "d -> d")
    return scale, Weight(f"{source}.bias", f"{target}.bias", "d -> d")
