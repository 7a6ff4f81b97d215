"""GPT-2's hyper-parameters, named as in transformers."""

import dataclasses
from typing import ClassVar, Literal

from modelzoo.config import ModelConfig
from modelzoo.layers.mlp import ACTIVATIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config(ModelConfig):
    """The defaults are those of the smallest GPT-2.

    Attributes:
        vocab_size: V, tokens that the model knows.
        n_positions: rows of the table of positions.
        n_embd, n_layer, n_head: the width D, the number of layers L, the number of heads N.
        n_inner: F; None is 4 D.
        activation_function: a key of `layers.mlp.ACTIVATIONS`.
        resid_pdrop, embd_pdrop, attn_pdrop: dropout after attention and MLP, on embeddings, on attention weights.
        classifier_dropout: on what the token classifier reads; None is 0.1.
        layer_norm_epsilon: added to the variance.
        initializer_range: standard deviation at the start; of what is added to the residual, over sqrt(2 L).
        scale_attn_weights: scores are divided by the root of a head's width.
        scale_attn_by_inverse_layer_idx: those of layer i, counted from 1, also by i.
        reorder_and_upcast_attn: scores are float32 in any dtype; here they are so in any case.
        add_cross_attention: blocks also attend to encoder_hidden_states.
        tie_word_embeddings: the LM head is the embedding table.
        summary_type: which state scores a choice: `heads.summarize`.
        summary_activation: what its score goes through; None is nothing.
        summary_first_dropout: dropout on that state.
    """

    model_type: ClassVar[str] = "gpt2"
    aliases: ClassVar[dict[str, str]] = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    absent_when_none: ClassVar[tuple[str, ...]] = ("problem_type", "classifier_dropout")

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    classifier_dropout: float | None = None
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    add_cross_attention: bool = False
    bos_token_id: int | None = 50256
    eos_token_id: int | None = 50256
    tie_word_embeddings: bool = True
    summary_type: Literal["last", "first", "mean", "cls_index"] = "cls_index"
    summary_activation: str | None = None
    summary_first_dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(
            self.activation_function in ACTIVATIONS, "activation_function", f"known are {sorted(ACTIVATIONS)}"
        )
        self._check(
            self.summary_activation in (None, *ACTIVATIONS),
            "summary_activation",
            f"known are {sorted(ACTIVATIONS)}, or None",
        )
        self._check_probabilities(
            "resid_pdrop", "embd_pdrop", "attn_pdrop", "classifier_dropout", "summary_first_dropout"
        )
        self._check_sizes("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
        self._check(self.mlp_dim >= 1, "n_inner", "it is a size, at least 1, or None for 4 n_embd")
        self._check(self.n_embd % self.n_head == 0, "n_embd", f"n_head = {self.n_head} does not divide it")

    @property
    def mlp_dim(self) -> int:
        """F."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def residual_std(self) -> float:
        return self.initializer_range / (2 * self.n_layer) ** 0.5

    @property
    def head_dropout(self) -> float:
        return 0.1 if self.classifier_dropout is None else self.classifier_dropout

    @property
    def cache_heads(self) -> tuple[int, int]:
        """(K, H) of the key/value cache."""
        return self.n_head, self.n_embd // self.n_head


PRESETS = {
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
    "tiny-gpt2": GPT2Config(
        n_positions=64,
        n_embd=64,
        n_layer=2,
        n_head=4,
        vocab_size=256,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
}
