"""What to generate: the fields of transformers' GenerationConfig (4.57.6), frozen, hashable and checked.

Departures: every value is checked when the config is made; a field whose machinery is not there yet is held,
and refused when it is set, where transformers would warn or ignore; `eos_token_id=None` never stops, since
there is no model config to fall back on.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

DEFAULT_MAX_LENGTH = 20
"""transformers' default of `max_length`; left at it, it counts new tokens alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How tokens are chosen and when to stop.

    It is a static argument of the compiled loop: only what is on is compiled. Lists are taken for tuples.

    Attributes:
        max_new_tokens: tokens to generate at most; rules over max_length.
        max_length: prompt (with its padding) and new tokens together; its default, 20, means 20 new tokens.
        min_new_tokens, min_length: no end-of-sequence token before that; lists as the two above.
        do_sample: draw from the distribution; False takes the most probable token.
        temperature: divides the logits; above 0. This and the next three act only with do_sample.
        top_k: keep the k most probable tokens (ties with the last are kept); 0 or None is off. Default 50.
        top_p: keep the smallest set of most probable tokens whose probability reaches top_p, in (0, 1].
        min_p: keep tokens at least min_p times as probable as the most probable one, in [0, 1].
        repetition_penalty: divides positive logits of tokens that prompt or output hold, and multiplies
            negative ones.
        suppress_tokens: ids that are never generated.
        forced_eos_token_id: id or ids; the last token that the limit allows is one of them.
        renormalize_logits: log-softmax after all processors, so that `scores` are log-probabilities.
        num_return_sequences: samples of each prompt, in neighbouring rows; needs do_sample.
        eos_token_id: id or ids that end a row; None never stops.
        pad_token_id: fills a finished row; None is the first eos_token_id.
        bos_token_id: held for tokenizers; generation starts from the prompt.
        output_scores: return the processed logits of every step.
        The remaining fields are transformers' too, and raise ValueError unless they keep their defaults.
    """

    max_new_tokens: int | None = None
    max_length: int = DEFAULT_MAX_LENGTH
    min_new_tokens: int | None = None
    min_length: int = 0

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = 50
    top_p: float | None = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    suppress_tokens: Sequence[int] | None = None
    forced_eos_token_id: int | Sequence[int] | None = None
    renormalize_logits: bool = False

    num_return_sequences: int = 1
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    output_scores: bool = False

    num_beams: int = 1
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    encoder_repetition_penalty: float = 1.0
    bad_words_ids: Sequence[Sequence[int]] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    sequence_bias: Any = None
    exponential_decay_length_penalty: tuple[int, float] | None = None
    forced_bos_token_id: int | None = None
    decoder_start_token_id: int | None = None
    remove_invalid_values: bool = False
    guidance_scale: float | None = None
    stop_strings: Sequence[str] | None = None
    max_time: float | None = None
    prompt_lookup_num_tokens: int | None = None
    output_logits: bool | None = None
    use_cache: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # hashable: the config is a static argument of jit
                object.__setattr__(self, field.name, _as_tuple(value))
            elif isinstance(value, numbers.Number) and hasattr(value, "item"):  # a numpy scalar
                object.__setattr__(self, field.name, value.item())  # pyright: ignore[reportAttributeAccessIssue]
        for name in _LATER:
            default = type(self).__dataclass_fields__[name].default
            if getattr(self, name) != default:
                self._check(False, name, f"flaxtron does not support it yet; leave it at {default!r}")
        for name, lowest in _COUNTS.items():
            value = getattr(self, name)
            self._check(
                value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= lowest),
                name,
                f"it is an integer from {lowest} on",
            )
        self._check_real("top_p", lambda p: 0 < p <= 1, "it is a probability in (0, 1]; 1 keeps all tokens")
        self._check_real("min_p", lambda p: 0 <= p <= 1, "it is a fraction of the top probability, in [0, 1]")
        self._check_real("repetition_penalty", lambda p: p > 0, "it is above 0; 1 is no penalty")
        self._check_real(
            "temperature",
            lambda t: t > 0 or not self.do_sample,
            "sampling divides logits by it, so it is above 0; do_sample=False takes the most probable token",
        )
        self._check(
            self.num_return_sequences == 1 or self.do_sample,
            "num_return_sequences",
            "greedy decoding has one result per prompt; set do_sample=True",
        )
        for name in _TOKENS:
            for token in _ids(getattr(self, name)):
                self._check(isinstance(token, int) and token >= 0, name, "a token id is an integer from 0 on")

    def _check(self, holds: bool, field: str, why: str) -> None:
        if not holds:
            raise ValueError(f"GenerationConfig.{field} = {getattr(self, field)!r}: {why}")

    def _check_real(self, field: str, fits: Callable[[float], bool], why: str) -> None:
        value: Any = getattr(self, field)
        if value is None and field in ("top_p", "min_p"):
            return
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            self._check(False, field, why)
        else:
            self._check(fits(value), field, why)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a row, none or more."""
        return _ids(self.eos_token_id)

    @property
    def forced_eos_ids(self) -> tuple[int, ...]:
        """The ids that the last token is forced to, none or more."""
        return _ids(self.forced_eos_token_id)

    @property
    def fill_id(self) -> int:
        """What stands after a finished row: pad_token_id or the first eos id; 0 if no row can finish."""
        return next(iter((*_ids(self.pad_token_id), *self.eos_ids)), 0)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuses token ids that a model does not have.

        Raises:
            ValueError: an id of vocab_size or above.
        """
        for name in _TOKENS:
            for token in _ids(getattr(self, name)):
                self._check(token < vocab_size, name, f"the model's vocabulary has ids 0 to {vocab_size - 1}")

    def new_tokens(self, prompt_length: int, max_positions: int | None) -> tuple[int, int]:
        """How many tokens to generate for a prompt, in transformers' reading of the four length fields.

        Args:
            prompt_length: of the batch, its padding included.
            max_positions: the model's window, or None.

        Returns:
            (at least, at most).

        Raises:
            ValueError: max_length leaves no room for a new token.
        """
        if self.max_new_tokens is not None:
            at_most = self.max_new_tokens
        elif self.max_length == DEFAULT_MAX_LENGTH:
            room = DEFAULT_MAX_LENGTH if max_positions is None else max_positions - prompt_length
            at_most = max(1, min(DEFAULT_MAX_LENGTH, room))
        else:
            at_most = self.max_length - prompt_length
            why = f"the prompt alone has {prompt_length} tokens; set max_new_tokens"
            self._check(at_most > 0, "max_length", why)
        return max(self.min_new_tokens or 0, self.min_length - prompt_length), at_most

    def loop_key(self) -> "GenerationConfig":
        """This config without what the loop takes as arrays or does not read, so that fewer compile."""
        has_minimum = bool(self.eos_ids) and bool(self.min_new_tokens or self.min_length)
        greedy = dict(temperature=1.0, top_k=None, top_p=None, min_p=None)
        return dataclasses.replace(
            self,
            **({} if self.do_sample else greedy),
            max_new_tokens=None,
            max_length=DEFAULT_MAX_LENGTH,
            min_new_tokens=1 if has_minimum else None,
            min_length=0,
            num_return_sequences=1,
            bos_token_id=None,
        )


_LATER = (
    "num_beams",
    "num_beam_groups",
    "diversity_penalty",
    "length_penalty",
    "early_stopping",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "bad_words_ids",
    "begin_suppress_tokens",
    "sequence_bias",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "decoder_start_token_id",
    "remove_invalid_values",
    "guidance_scale",
    "stop_strings",
    "max_time",
    "prompt_lookup_num_tokens",
    "output_logits",
    "use_cache",
)
_COUNTS = {
    "max_new_tokens": 1,
    "max_length": 1,
    "min_new_tokens": 0,
    "min_length": 0,
    "top_k": 0,
    "num_return_sequences": 1,
}
_TOKENS = ("eos_token_id", "pad_token_id", "bos_token_id", "forced_eos_token_id", "suppress_tokens")


def _as_tuple(value: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(_as_tuple(item) if isinstance(item, list) else item for item in value)


def _ids(value: Any) -> tuple[int, ...]:
    """An id, a sequence of ids or None, as a tuple."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
