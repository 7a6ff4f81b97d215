"""What to generate: the fields of transformers' GenerationConfig (4.57.6), frozen, hashable and checked.

Departures: every value is checked when the config is made; a field whose machinery is not there is held, and refused
when it is set, where transformers would warn or ignore; `eos_token_id=None` never stops, whatever the model's config
says. OpenAI's frequency and presence penalties and log-probabilities come on top.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

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
        temperature: divides the logits; above 0. This and the next six act only with do_sample.
        top_k: keep the k most probable tokens (ties with the last are kept); 0 or None is off. Default 50.
        top_p: keep the smallest set of most probable tokens whose probability reaches top_p, in (0, 1].
        min_p: keep tokens at least min_p times as probable as the most probable one, in [0, 1].
        typical_p: keep the tokens of most typical surprise up to this probability, in (0, 1].
        epsilon_cutoff, eta_cutoff: keep tokens at least that probable, eta's limit adapting; in [0, 1), 0 is off.
        repetition_penalty: divides positive logits of tokens that prompt or output hold, and multiplies
            negative ones.
        frequency_penalty: subtracted from a token's logit once for each time that it was generated.
        presence_penalty: subtracted from the logit of each token that was generated.
        encoder_repetition_penalty: the inverse of repetition_penalty, for tokens of the encoder's input (or of the
            prompt): above 1 it favours them.
        no_repeat_ngram_size: no run of so many tokens occurs twice in prompt and output.
        encoder_no_repeat_ngram_size: none of the encoder's input (or of the prompt) is generated.
        bad_words_ids: sequences of ids that are never completed.
        sequence_bias: {(ids): bias} or [[ids, bias]], added to the last id's logit where the others stand before it.
        suppress_tokens: ids that are never generated.
        begin_suppress_tokens: ids that are not generated first.
        forced_bos_token_id: what follows a prompt of a single token, such as an encoder-decoder's start token.
        forced_eos_token_id: id or ids; the last token that the limit allows is one of them.
        exponential_decay_length_penalty: (begin, factor): after `begin` new tokens the end becomes more probable.
        remove_invalid_values: NaN and infinite logits become finite.
        renormalize_logits: log-softmax after all processors, so that `scores` are log-probabilities.
        num_return_sequences: results of each prompt, in neighbouring rows: samples, or the best beams.
        num_beams: hypotheses of each prompt that are followed; above 1 is beam search, with do_sample beam sampling.
        length_penalty: a hypothesis' log-probability is divided by its length to this power.
        early_stopping: True stops once num_beams hypotheses have ended, False when a running one is unlikely to
            become better than they are, "never" when it cannot.
        num_beam_groups, diversity_penalty: beams in groups, each group avoiding the tokens of those before it.
        eos_token_id: id or ids that end a row; None never stops.
        pad_token_id: fills a finished row; None is the model's, or the first eos_token_id.
        bos_token_id: held for tokenizers; generation starts from the prompt.
        decoder_start_token_id: what an encoder-decoder's output begins with; None is the model's.
        stop_strings: texts that end a row with the token that completes them; needs a tokenizer.
        prompt_lookup_num_tokens: guess so many tokens at a time from earlier text (`inference.speculative`).
        max_matching_ngram_size: the longest run of tokens that such a guess is looked up by; None is 2.
        num_draft_tokens: guess so many tokens at a time by a draft model (`inference.drafting`); None is 4.
        output_scores, output_logits: return the processed, the model's own logits of every step.
        output_logprobs: return the model's log-probability of each new token, whatever processors made of it.
        output_prompt_logprobs: the same of each token of the prompt.
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
    typical_p: float | None = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0

    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    encoder_repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    bad_words_ids: Sequence[Sequence[int]] | None = None
    sequence_bias: Any = None
    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | Sequence[int] | None = None
    exponential_decay_length_penalty: tuple[int, float] | None = None
    remove_invalid_values: bool = False
    renormalize_logits: bool = False

    num_return_sequences: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0

    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    decoder_start_token_id: int | None = None
    stop_strings: str | Sequence[str] | None = None
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int | None = None
    num_draft_tokens: int | None = None

    output_scores: bool = False
    output_logits: bool | None = None
    output_logprobs: bool = False
    output_prompt_logprobs: bool = False

    guidance_scale: float | None = None
    max_time: float | None = None
    use_cache: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, dict):
                value = list(value.items())
            if isinstance(value, (list, tuple)):  # hashable: the config is a static argument of jit
                object.__setattr__(self, field.name, _as_tuple(value))
            elif isinstance(value, numbers.Number) and hasattr(value, "item"):  # a numpy scalar
                object.__setattr__(self, field.name, value.item())  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(self.stop_strings, str):
            object.__setattr__(self, "stop_strings", (self.stop_strings,))
        for name in _ABSENT:
            default = type(self).__dataclass_fields__[name].default
            if getattr(self, name) != default:
                self._check(False, name, f"flaxtron does not support it; leave it at {default!r}")
        for name, lowest in _COUNTS.items():
            value = getattr(self, name)
            self._check(value is None or _is_int(value, lowest), name, f"it is an integer from {lowest} on")
        for name, (fits, why) in _REALS.items():
            self._check_real(name, fits, why)
        self._check_real(
            "temperature",
            lambda t: t > 0 or not self.do_sample,
            "sampling divides logits by it, so it is above 0; do_sample=False takes the most probable token",
        )
        self._check_sequences()
        self._check_beams()
        for name in _TOKENS:
            for token in _ids(getattr(self, name)):
                self._check(_is_int(token, 0), name, "a token id is an integer from 0 on")

    def _check_sequences(self) -> None:
        """The fields that hold sequences of ids, texts or pairs."""
        for name in ("bad_words_ids", "sequence_bias", "stop_strings", "exponential_decay_length_penalty"):
            given = getattr(self, name)
            self._check(
                given is None or (isinstance(given, tuple) and given), name, "it is a list, not empty"
            )
        for ids in self.bad_words_ids or ():
            self._check(_is_sequence(ids), "bad_words_ids", "each is a list of token ids, not empty")
        for pair in self.sequence_bias or ():
            fits = isinstance(pair, tuple) and len(pair) == 2 and _is_sequence(pair[0]) and _is_real(pair[1])
            self._check(fits, "sequence_bias", "it is {(ids): bias} or [[ids, bias]]")
        for text in self.stop_strings or ():
            self._check(isinstance(text, str) and text, "stop_strings", "each is a text, not empty")
        decay = self.exponential_decay_length_penalty
        if decay is not None:
            fits = len(decay) == 2 and _is_int(decay[0], 0) and _is_real(decay[1])
            self._check(fits, "exponential_decay_length_penalty", "it is (begin, factor)")
            why = "it makes the end more probable: set eos_token_id"
            self._check(bool(self.eos_ids), "exponential_decay_length_penalty", why)

    def _check_beams(self) -> None:
        """How beams, groups, samples and guesses go together."""
        beams = self.num_beams > 1
        known = self.early_stopping is True or self.early_stopping is False or self.early_stopping == "never"
        self._check(known, "early_stopping", 'it is True, False or "never"')
        many = self.num_return_sequences
        if beams:
            self._check(many <= self.num_beams, "num_return_sequences", f"there are {self.num_beams} beams")
        else:
            why = "greedy decoding has one result per prompt; set do_sample=True or num_beams"
            self._check(many == 1 or self.do_sample, "num_return_sequences", why)
        groups = self.num_beam_groups
        why = f"it divides num_beams = {self.num_beams}"
        self._check(self.num_beams % groups == 0, "num_beam_groups", why)
        if groups > 1:
            self._check(not self.do_sample, "do_sample", "groups of beams are not sampled")
            self._check(
                self.diversity_penalty > 0, "diversity_penalty", "above 0 it sets num_beam_groups apart"
            )
        elif self.diversity_penalty:
            self._check(False, "diversity_penalty", "it needs num_beam_groups above 1")
        guesses = self.prompt_lookup_num_tokens is not None
        self._check(
            not (guesses and beams), "prompt_lookup_num_tokens", "beams are not guessed; num_beams is 1"
        )

    def _check(self, holds: Any, field: str, why: str) -> None:
        if not holds:
            raise ValueError(f"GenerationConfig.{field} = {getattr(self, field)!r}: {why}")

    def _check_real(self, field: str, fits: Callable[[float], bool], why: str) -> None:
        value: Any = getattr(self, field)
        if value is not None or field not in ("top_p", "min_p", "typical_p"):
            self._check(_is_real(value) and math.isfinite(value) and fits(value), field, why)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a row, none or more."""
        return _ids(self.eos_token_id)

    @property
    def forced_eos_ids(self) -> tuple[int, ...]:
        """The ids that the last token is forced to, none or more."""
        return _ids(self.forced_eos_token_id)

    @property
    def num_guesses(self) -> int:
        """Tokens that are guessed at a time, by looking up or by a draft; 0 is none."""
        return self.prompt_lookup_num_tokens or self.num_draft_tokens or 0

    @property
    def banned_sequences(self) -> tuple[tuple[int, ...], ...]:
        """bad_words_ids without those that are an end alone, which may always come."""
        ends = {(token,) for token in self.eos_ids}
        return tuple(ids for ids in _tuples(self.bad_words_ids) if ids not in ends)

    @property
    def min_tokens_to_keep(self) -> int:
        """How many tokens the truncations of sampling leave at least: with beams, one that does not end them."""
        return 1 if self.num_beams == 1 else max(2, len(self.eos_ids) + 1)

    @property
    def fill_id(self) -> int:
        """What stands after a finished row: pad_token_id or the first eos id; 0 if no row can finish."""
        return next(iter((*_ids(self.pad_token_id), *self.eos_ids)), 0)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuses token ids that a model does not have.

        Raises:
            ValueError: an id of vocab_size or above.
        """
        within = {name: _ids(getattr(self, name)) for name in _TOKENS}
        within["bad_words_ids"] = sum(_tuples(self.bad_words_ids), ())
        within["sequence_bias"] = sum((ids for ids, _ in self.sequence_bias or ()), ())
        for name, ids in within.items():
            known = max(ids, default=0) < vocab_size
            self._check(known, name, f"the model's vocabulary has ids 0 to {vocab_size - 1}")

    def for_model(self, model_config: Any, is_encoder_decoder: bool) -> "GenerationConfig":
        """This config with the special tokens that it leaves to the model, as transformers fills them in.

        Args:
            model_config: of the model, with transformers' field names.
            is_encoder_decoder: such a model also says what its output begins and ends with.

        Raises:
            ValueError: an encoder-decoder's start token is named nowhere.
        """

        def model_has(name: str) -> Any:
            return getattr(model_config, name, None)

        names = ("pad_token_id", "forced_bos_token_id", "forced_eos_token_id")
        known = {name: model_has(name) for name in names}
        if is_encoder_decoder:
            start = model_has("decoder_start_token_id")
            known["decoder_start_token_id"] = model_has("bos_token_id") if start is None else start
        filled = {name: value for name, value in known.items() if getattr(self, name) is None}
        config = dataclasses.replace(self, **filled)
        if is_encoder_decoder:
            why = "an encoder-decoder's output begins with it, and the model's config names none"
            config._check(config.decoder_start_token_id is not None, "decoder_start_token_id", why)
        return config

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
        at_least = self.min_length - prompt_length if self.min_new_tokens is None else self.min_new_tokens
        return max(0, at_least), at_most

    def loop_key(self) -> "GenerationConfig":
        """This config without what the loop takes as arrays or does not read, so that fewer compile."""
        has_minimum = bool(self.eos_ids) and bool(self.min_new_tokens or self.min_length)
        greedy = {name: type(self).__dataclass_fields__[name].default for name in _SAMPLING}
        return dataclasses.replace(
            self,
            **({} if self.do_sample else greedy),
            max_new_tokens=None,
            max_length=DEFAULT_MAX_LENGTH,
            min_new_tokens=1 if has_minimum else None,
            min_length=0,
            num_return_sequences=1,
            bos_token_id=None,
            decoder_start_token_id=None,
            stop_strings=None,
        )


_ABSENT = ("guidance_scale", "max_time", "use_cache")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_COUNTS = {
    "max_new_tokens": 1,
    "max_length": 1,
    "min_new_tokens": 0,
    "min_length": 0,
    "top_k": 0,
    "num_return_sequences": 1,
    "num_beams": 1,
    "num_beam_groups": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "prompt_lookup_num_tokens": 1,
    "max_matching_ngram_size": 1,
    "num_draft_tokens": 1,
}
_PENALTY = (lambda p: p > 0, "it is above 0; 1 is no penalty")
_CUTOFF = (lambda p: 0 <= p < 1, "it is a probability in [0, 1); 0 is off")
_REALS: dict[str, tuple[Callable[[float], bool], str]] = {
    "top_p": (lambda p: 0 < p <= 1, "it is a probability in (0, 1]; 1 keeps all tokens"),
    "min_p": (lambda p: 0 <= p <= 1, "it is a fraction of the top probability, in [0, 1]"),
    "typical_p": (lambda p: 0 < p <= 1, "it is a probability in (0, 1]; 1 keeps all tokens"),
    "epsilon_cutoff": _CUTOFF,
    "eta_cutoff": _CUTOFF,
    "repetition_penalty": _PENALTY,
    "encoder_repetition_penalty": _PENALTY,
    "frequency_penalty": (lambda p: True, "it is a number; 0 is no penalty"),
    "presence_penalty": (lambda p: True, "it is a number; 0 is no penalty"),
    "length_penalty": (lambda p: True, "it is a number: the power of a hypothesis' length"),
    "diversity_penalty": (lambda p: p >= 0, "it is from 0 on; 0 is off"),
}
_TOKENS = (
    *("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id"),
    *("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"),
)


def _as_tuple(value: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(_as_tuple(item) if isinstance(item, (list, tuple)) else item for item in value)


def _tuples(value: Any) -> tuple[tuple[int, ...], ...]:
    return value or ()


def _is_int(value: Any, lowest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= lowest


def _is_real(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def _is_sequence(ids: Any) -> bool:
    """Whether it is a tuple of token ids, one or more."""
    return isinstance(ids, tuple) and bool(ids) and all(_is_int(token, 0) for token in ids)


def _ids(value: Any) -> tuple[int, ...]:
    """An id, a sequence of ids or None, as a tuple."""
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)
