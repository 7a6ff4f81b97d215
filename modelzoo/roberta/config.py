"""RoBERTa's hyper-parameters, named as in transformers."""

import dataclasses
from typing import ClassVar

from modelzoo.bert import BertConfig
from modelzoo.knobs import NormPlacement


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobertaConfig(BertConfig):
    """The defaults are transformers'; fields as `modelzoo.bert.BertConfig` has them.

    Attributes:
        pad_token_id: padding, and the position of padding: tokens count on from the position after it.
        classifier_dropout: on what classifiers of sequences and tokens read; None is hidden_dropout_prob.
    """

    model_type: ClassVar[str] = "roberta"

    vocab_size: int = 50265
    bos_token_id: int | None = 0
    eos_token_id: int | None = 2
    pad_token_id: int | None = 1
    classifier_dropout: float | None = None
    norm_placement: NormPlacement = "post"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_probabilities("classifier_dropout")
        self._check(self.pad_token_id is not None, "pad_token_id", "positions are counted from it")
        self._check(
            self.first_position < self.max_position_embeddings,
            "max_position_embeddings",
            f"positions begin at {self.first_position}, after pad_token_id",
        )

    @property
    def first_position(self) -> int:
        """The position of a row's first token."""
        assert self.pad_token_id is not None
        return self.pad_token_id + 1

    @property
    def max_positions(self) -> int:
        limit = self.max_position_embeddings
        return limit - self.first_position if self.relative is None else limit

    @property
    def head_dropout(self) -> float:
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout

    @property
    def lm_head_act(self) -> str:
        return "gelu"  # whatever hidden_act is


_BASE = RobertaConfig(max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5)

PRESETS = {
    "roberta-base": _BASE,
    "roberta-large": dataclasses.replace(
        _BASE, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
    "tiny-roberta": dataclasses.replace(
        _BASE,
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=66,
    ),
}
