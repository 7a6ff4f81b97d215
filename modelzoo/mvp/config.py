"""MVP's hyper-parameters, named as in transformers."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from modelzoo.knobs import NormKnobs
from modelzoo.layers.mlp import get_activation

SIDES = ("encoder", "decoder")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MvpConfig(NormKnobs):
    """The defaults are those of the published model, RUCAIBox/mvp; for knobs see `modelzoo.knobs`.

    Attributes:
        vocab_size: V, tokens that the model knows.
        max_position_embeddings: longest sequence, of either stack.
        d_model: D, of both stacks.
        encoder_layers, encoder_attention_heads, encoder_ffn_dim: L, N, F of the encoder.
        decoder_layers, decoder_attention_heads, decoder_ffn_dim: L, N, F of the decoder.
        encoder_layerdrop, decoder_layerdrop: probability of skipping a whole layer.
        activation_function: such as 'gelu_new' or 'swiglu': a key of `layers.mlp.ACTIVATIONS` or GATED.
        dropout: on embeddings, on prompts, and on what attention and MLP add.
        attention_dropout, activation_dropout: on attention weights; between an MLP's two layers.
        classifier_dropout: on what either layer of the classification head reads.
        init_std: standard deviation of every kernel and embedding at the start.
        scale_embedding: token embeddings are multiplied by sqrt(D); embeddings passed as inputs are not.
        tie_word_embeddings: the LM head is the embedding table, which encoder and decoder share in any case.
        use_prompt: learned keys and values stand before all others in every attention.
        prompt_length: P, how many.
        prompt_mid_dim: width of the layer that they are made through.
        decoder_start_token_id: what a decoder's input begins with.
        forced_bos_token_id, forced_eos_token_id: what generation puts first and last.
        is_encoder_decoder, is_decoder: kept for the file; the class decides.
    """

    model_type: ClassVar[str] = "mvp"
    aliases: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
    }

    additions: ClassVar[tuple[str, ...]] = ("use_prompt",)

    vocab_size: int = 50267
    max_position_embeddings: int = 1024
    d_model: int = 1024
    encoder_layers: int = 12
    encoder_attention_heads: int = 16
    encoder_ffn_dim: int = 4096
    encoder_layerdrop: float = 0.0
    decoder_layers: int = 12
    decoder_attention_heads: int = 16
    decoder_ffn_dim: int = 4096
    decoder_layerdrop: float = 0.0
    activation_function: str = "gelu"
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    classifier_dropout: float = 0.0
    init_std: float = 0.02
    scale_embedding: bool = False
    tie_word_embeddings: bool = True
    use_prompt: bool = False
    prompt_length: int = 100
    prompt_mid_dim: int = 800
    bos_token_id: int | None = 0
    pad_token_id: int | None = 1
    eos_token_id: int | None = 2
    decoder_start_token_id: int | None = 2
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = 2
    is_encoder_decoder: bool = True
    is_decoder: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_sizes(
            "vocab_size", "max_position_embeddings", "d_model", "prompt_length", "prompt_mid_dim"
        )
        for side in SIDES:
            self._check_sizes(f"{side}_layers", f"{side}_attention_heads", f"{side}_ffn_dim")
            heads = getattr(self, f"{side}_attention_heads")
            why = f"{side}_attention_heads = {heads} does not divide it"
            self._check(self.d_model % heads == 0, "d_model", why)
        self._check_probabilities("dropout", "attention_dropout", "activation_dropout", "classifier_dropout")
        self._check_probabilities("encoder_layerdrop", "decoder_layerdrop")
        for field in ("pad_token_id", "decoder_start_token_id"):
            token = getattr(self, field)
            known = token is None or 0 <= token < self.vocab_size
            self._check(known, field, f"it is an id below vocab_size = {self.vocab_size}")
        get_activation(self.activation_function)

    @classmethod
    def from_hf(cls, hf_config: Mapping[str, Any]) -> Self:
        if hf_config.get("force_bos_token_to_be_generated") and hf_config.get("forced_bos_token_id") is None:
            # How files of before transformers 4.10 say it.
            hf_config = {**hf_config, "forced_bos_token_id": hf_config.get("bos_token_id", cls.bos_token_id)}
        return super().from_hf(hf_config)

    def sizes(self, side: str) -> tuple[int, int, int]:
        """(L, N, F) of one of SIDES."""
        names = ("layers", "attention_heads", "ffn_dim")
        num_layers, num_heads, mlp_dim = (getattr(self, f"{side}_{name}") for name in names)
        return num_layers, num_heads, mlp_dim

    @property
    def num_layers(self) -> int:
        return self.decoder_layers

    @property
    def hidden_size(self) -> int:
        return self.d_model

    @property
    def max_positions(self) -> int:
        return self.max_position_embeddings

    @property
    def initializer_std(self) -> float:
        return self.init_std

    @property
    def norm_epsilon(self) -> float:
        return 1e-5

    @property
    def head_dropout(self) -> float:
        return self.classifier_dropout

    @property
    def cache_heads(self) -> tuple[int, int]:
        """(K, H) of the decoder's key/value caches."""
        return self.decoder_attention_heads, self.d_model // self.decoder_attention_heads


PRESETS = {
    "mvp": MvpConfig(),
    "tiny-mvp": MvpConfig(
        vocab_size=256,
        max_position_embeddings=64,
        d_model=64,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=256,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=256,
        prompt_length=8,
        prompt_mid_dim=32,
    ),
}
