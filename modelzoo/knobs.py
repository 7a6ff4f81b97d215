"""What an ablation changes of an architecture: fields of configs that no Hugging Face file knows.

The default of each is the family's own value: with it parameters, results and files are those of transformers' class. A
field at its default is not written into a config.json. One that has another value makes a model of which transformers
has no class (`ModelConfig.knobs_on`): our own checkpoints hold it, Hugging Face folders do not.

Names and values are those of the literature: parallel blocks as in GPT-J; pre- and post-norm as in Xiong et al., 2020,
arXiv:2002.04745; for the others see the layers that compute them.
"""

import dataclasses
from typing import Any, ClassVar, Literal

from modelzoo.config import ModelConfig
from modelzoo.layers.mlp import usual_hidden

NormKind = Literal["layer", "rms"]
NormPlacement = Literal["pre", "post"]
Position = Literal["rotary", "alibi", "learned", "relative", "none"]
BlockKind = Literal["sequential", "parallel"]

KNOBS = ("position", "block", "norm_placement", "norm", "qk_norm", "num_key_value_heads")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormKnobs(ModelConfig):
    """Of every family.

    Attributes:
        norm: "layer" or "rms": what every norm is (`layers.norm`).
        qk_norm: every head's queries and keys are normed (`layers.attention`).
    """

    knobs: ClassVar[tuple[str, ...]] = KNOBS

    norm: NormKind = "layer"
    qk_norm: bool = False

    @property
    def norm_epsilon(self) -> float:
        """Added to the variance, or to the mean square."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockKnobs(NormKnobs):
    """Of every family with one stack.

    Attributes:
        norm_placement: "pre" norms what attention and MLP read, and what the last layer returns; "post" norms each sum
            of a residual, and nothing after the last layer.
        num_key_value_heads: K, heads of keys and values, each for num_heads / K query heads; None is one for each.
    """

    norm_placement: NormPlacement = "pre"
    num_key_value_heads: int | None = None

    def _check_knobs(self) -> None:
        """To be called once the sizes are known to be right."""
        given = self.num_key_value_heads
        self._check(
            given is None or (given >= 1 and self.num_heads % given == 0),
            "num_key_value_heads",
            f"it divides the {self.num_heads} heads of queries, or is None for as many",
        )

    @property
    def num_heads(self) -> int:
        """N."""
        raise NotImplementedError

    @property
    def head_dim(self) -> int:
        """H."""
        return self.hidden_size // self.num_heads

    @property
    def cache_heads(self) -> tuple[int, int]:
        """(K, H) of the key/value cache."""
        return self.num_key_value_heads or self.num_heads, self.head_dim

    @property
    def knobs_on(self) -> dict[str, Any]:
        found = super().knobs_on
        if found.get("num_key_value_heads") == self.num_heads:
            del found["num_key_value_heads"]
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderKnobs(BlockKnobs):
    """Of causal decoders, which `modelzoo.decoder` builds of them.

    Attributes:
        position: "rotary", "alibi" or "relative" (`layers.position`; relative is Shaw's relative_key, a table in every
            layer), "learned" (a table added to the embeddings), or "none".
        block: "sequential", or "parallel": attention and MLP read the same and are added together.
    """

    length_field: ClassVar[str]
    """The field that `max_positions` comes from."""

    position: Position
    block: BlockKind

    def _check_knobs(self) -> None:
        super()._check_knobs()
        needs_table = self.position in ("learned", "relative")
        self._check(
            not needs_table or self.max_positions is not None,
            "position",
            f"its table has a row for each position: set {self.length_field}",
        )
        self._check(
            self.position != "rotary" or self.rotary_features % 2 == 0,
            "position",
            f"features rotate in pairs, and a head has {self.rotary_features}",
        )

    @property
    def norm_epsilon(self) -> float:
        return self.layer_norm_epsilon  # type: ignore[attr-defined]

    @property
    def rotary_features(self) -> int:
        """Features of every head that rotate where positions are rotary."""
        return self.head_dim

    @property
    def mlp_dim(self) -> int:
        """F."""
        return usual_hidden(self.hidden_size, self.activation_function)  # type: ignore[attr-defined]

    @property
    def residual_is_normed(self) -> bool:
        """Whether the residual of a pre-norm block is what its norm returns."""
        return False
