"""BLOOM's hyper-parameters, named as in transformers."""

import dataclasses
from typing import ClassVar

from modelzoo.knobs import KNOBS, BlockKind, DecoderKnobs, Position
from modelzoo.layers.mlp import get_activation


@dataclasses.dataclass(frozen=True, kw_only=True)
class BloomConfig(DecoderKnobs):
    """The defaults are transformers': a small model with BLOOM's vocabulary; for knobs see `modelzoo.knobs`.

    Attributes:
        vocab_size: V, tokens that the model knows.
        hidden_size, n_layer, n_head: the width D, the number of layers L, the number of heads N.
        layer_norm_epsilon: added to the variance.
        initializer_range: standard deviation of every kernel and of the embedding at the start.
        apply_residual_connection_post_layernorm: the residual is what a norm returns, not what it reads.
        hidden_dropout, attention_dropout: after attention and MLP; on attention weights.
        classifier_dropout: on what the token classifier reads; None is hidden_dropout.
        tie_word_embeddings: the LM head is the embedding table.
        activation_function: a knob: a key of `layers.mlp.ACTIVATIONS` or GATED. F is 4 D, or of a gated one 8/3 D
            (`layers.mlp.usual_hidden`).
        max_position_embeddings: longest sequence, of knobs whose positions have a table; ALiBi needs none.
    """

    model_type: ClassVar[str] = "bloom"
    # Files of the published models spell some fields in other ways.
    aliases: ClassVar[dict[str, str]] = {
        "n_embed": "hidden_size",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
    }
    absent_when_none: ClassVar[tuple[str, ...]] = (
        "problem_type",
        "classifier_dropout",
        "max_position_embeddings",
    )
    knobs: ClassVar[tuple[str, ...]] = (*KNOBS, "activation_function")
    length_field: ClassVar[str] = "max_position_embeddings"

    vocab_size: int = 250880
    hidden_size: int = 64
    n_layer: int = 2
    n_head: int = 8
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    apply_residual_connection_post_layernorm: bool = False
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    classifier_dropout: float | None = None
    tie_word_embeddings: bool = True
    position: Position = "alibi"
    block: BlockKind = "sequential"
    activation_function: str = "gelu_pytorch_tanh"
    max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_sizes("vocab_size", "hidden_size", "n_layer", "n_head")
        self._check(
            self.hidden_size % self.n_head == 0, "hidden_size", f"n_head = {self.n_head} does not divide it"
        )
        self._check_probabilities("hidden_dropout", "attention_dropout", "classifier_dropout")
        self._check(
            self.max_position_embeddings is None or self.max_position_embeddings >= 1,
            "max_position_embeddings",
            "it is a size, at least 1, or None for no limit",
        )
        self._check(
            not self.apply_residual_connection_post_layernorm or self.norm_placement == "pre",
            "norm_placement",
            "with apply_residual_connection_post_layernorm it is 'pre'",
        )
        get_activation(self.activation_function)
        self._check_knobs()

    @property
    def max_positions(self) -> int | None:
        return self.max_position_embeddings  # ALiBi has no table and no longest sequence

    @property
    def head_dropout(self) -> float:
        return self.hidden_dropout if self.classifier_dropout is None else self.classifier_dropout

    @property
    def num_layers(self) -> int:
        return self.n_layer

    @property
    def num_heads(self) -> int:
        return self.n_head

    @property
    def residual_is_normed(self) -> bool:
        return self.apply_residual_connection_post_layernorm


def _published(hidden_size: int, n_layer: int, n_head: int) -> BloomConfig:
    return BloomConfig(hidden_size=hidden_size, n_layer=n_layer, n_head=n_head, pad_token_id=3)


PRESETS = {
    "bloom-560m": _published(1024, 24, 16),
    "bloom-1b1": _published(1536, 24, 16),
    "bloom-1b7": _published(2048, 24, 16),
    "bloom-3b": _published(2560, 30, 32),
    "bloom-7b1": _published(4096, 30, 32),
    "bloom-176b": _published(14336, 70, 112),
    "tiny-bloom": BloomConfig(vocab_size=256, hidden_size=64, n_layer=2, n_head=4, pad_token_id=3),
}
