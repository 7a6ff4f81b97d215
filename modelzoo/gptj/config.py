"""GPT-J's hyper-parameters, named as in transformers."""

import dataclasses
from typing import Any, ClassVar

from modelzoo.knobs import BlockKind, DecoderKnobs, Position
from modelzoo.layers.mlp import get_activation


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTJConfig(DecoderKnobs):
    """The defaults are GPT-J-6B's; for knobs see `modelzoo.knobs`.

    Attributes:
        vocab_size: V, tokens that the model knows.
        n_positions: longest sequence; rotary positions have no table, so of them this is a promise, not a size.
        n_embd, n_layer, n_head: the width D, the number of layers L, the number of heads N.
        rotary_dim: features of each head that rotate; None rotates all.
        n_inner: F; None is 4 D, or of a gated activation 8/3 D (`layers.mlp.usual_hidden`).
        activation_function: such as 'gelu_new' or 'swiglu': a key of `layers.mlp.ACTIVATIONS` or GATED.
        resid_pdrop, embd_pdrop, attn_pdrop: dropout after attention and MLP, on embeddings, on attention weights.
        layer_norm_epsilon: added to the variance.
        initializer_range: standard deviation of every kernel and of the embedding at the start.
        tie_word_embeddings: the LM head's projection is the embedding table; its bias stays.
    """

    model_type: ClassVar[str] = "gptj"
    aliases: ClassVar[dict[str, str]] = {
        "max_position_embeddings": "n_positions",
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    length_field: ClassVar[str] = "n_positions"

    vocab_size: int = 50400
    n_positions: int = 2048
    n_embd: int = 4096
    n_layer: int = 28
    n_head: int = 16
    rotary_dim: int | None = 64
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.0
    embd_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    bos_token_id: int | None = 50256
    eos_token_id: int | None = 50256
    tie_word_embeddings: bool = False
    position: Position = "rotary"
    block: BlockKind = "parallel"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_sizes("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
        self._check(self.mlp_dim >= 1, "n_inner", "it is a size, at least 1, or None for 4 n_embd")
        self._check(self.n_embd % self.n_head == 0, "n_embd", f"n_head = {self.n_head} does not divide it")
        self._check(
            self.rotary_dim is None or (0 < self.rotary_dim <= self.head_dim and self.rotary_dim % 2 == 0),
            "rotary_dim",
            f"it is even and at most the head width {self.head_dim}, or None for all of it",
        )
        self._check_probabilities("resid_pdrop", "embd_pdrop", "attn_pdrop")
        get_activation(self.activation_function)
        self._check_knobs()

    def to_hf(self) -> dict[str, Any]:
        # transformers reads None as the model's width, which is right for one head alone.
        return super().to_hf() | {"rotary_dim": self.rotary_dim or self.head_dim}

    @property
    def num_layers(self) -> int:
        return self.n_layer

    @property
    def hidden_size(self) -> int:
        return self.n_embd

    @property
    def max_positions(self) -> int:
        return self.n_positions

    @property
    def num_heads(self) -> int:
        return self.n_head

    @property
    def mlp_dim(self) -> int:
        return self.n_inner if self.n_inner is not None else super().mlp_dim

    @property
    def rotary_features(self) -> int:
        return self.rotary_dim or self.head_dim

    @property
    def hidden_dropout(self) -> float:
        """After attention and MLP."""
        return self.resid_pdrop

    @property
    def attention_dropout(self) -> float:
        """On attention weights."""
        return self.attn_pdrop


PRESETS = {
    "gpt-j-6b": GPTJConfig(),
    "tiny-gptj": GPTJConfig(
        vocab_size=256,
        n_positions=64,
        n_embd=64,
        n_layer=2,
        n_head=4,
        rotary_dim=8,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    ),
}
