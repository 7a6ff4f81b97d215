"""What is asked of the engine and what it answers: sampling parameters, requests and events, on the host alone."""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any

MAX_LOGPROBS = 20
"""Most alternatives that can be asked for beside each token."""
MAX_BIASES = 300
"""Most tokens that `logit_bias` may name, as with OpenAI."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request chooses its tokens and when it stops; checked when made.

    Attributes:
        max_new_tokens: tokens to generate at most; 0 reads the prompt alone.
        min_new_tokens: no stop token before so many.
        temperature: divides the logits; 0 takes the most probable token.
        top_k: keep the k most probable tokens; 0 keeps all. This and the next two act only where temperature is not 0.
        top_p: keep the smallest set of most probable tokens with this total probability, in (0, 1].
        min_p: keep tokens at least so many times as probable as the most probable one, in [0, 1].
        repetition_penalty: divides positive logits of tokens in prompt or output, and multiplies negative ones.
        frequency_penalty, presence_penalty: subtracted from a generated token's logit, for each time or once.
        logit_bias: token id -> what is added to its logit; -100 and below rules it out in practice.
        stop_token_ids: ids that end the text; the one that does is reported and counted.
        seed: of the draw. The same seed gives the same tokens as `generate(..., rng=jax.random.key(seed))`.
        sample: which of several samples of one seed: row i of generate's batch draws as sample i.
        logprobs: alternatives to report beside each token, at most 20; None reports no probabilities.
        prompt_logprobs: report the prompt's log-probabilities too.
    """

    max_new_tokens: int = 16
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    sample: int = 0
    logprobs: int | None = None
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        limits = {
            "max_new_tokens": (0, math.inf),
            "min_new_tokens": (0, self.max_new_tokens),
            "temperature": (0, math.inf),
            "top_k": (0, math.inf),
            "min_p": (0, 1),
            "frequency_penalty": (-math.inf, math.inf),
            "presence_penalty": (-math.inf, math.inf),
            "seed": (-(2**63), 2**63 - 1),
            "sample": (0, 2**31 - 1),
        }
        counts = ("max_new_tokens", "min_new_tokens", "top_k", "seed", "sample")
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            whole = "an integer" if name in counts else "a finite number"
            self._check(
                _is_number(value, name in counts) and low <= value <= high,
                name,
                f"{whole} from {low} to {high}",
            )
        for name, high in (("top_p", 1), ("repetition_penalty", math.inf)):
            value = getattr(self, name)
            self._check(_is_number(value) and 0 < value <= high, name, f"a number above 0 and at most {high}")
        self._check(
            self.logprobs is None or (_is_number(self.logprobs, True) and 0 <= self.logprobs <= MAX_LOGPROBS),
            "logprobs",
            f"an integer from 0 to {MAX_LOGPROBS}",
        )
        self._check(
            len(self.logit_bias) <= MAX_BIASES
            and all(_is_number(k, True) and _is_number(v) for k, v in self.logit_bias.items()),
            "logit_bias",
            f"at most {MAX_BIASES} token ids, each with a finite number",
        )

    def _check(self, holds: bool, name: str, meaning: str) -> None:
        if not holds:
            raise ValueError(f"{name} = {getattr(self, name)!r}: it is {meaning}")

    @property
    def reads_history(self) -> bool:
        """Whether any penalty looks at what prompt and output hold."""
        return bool(self.repetition_penalty != 1.0 or self.frequency_penalty or self.presence_penalty)


def _is_number(value: Any, whole: bool = False) -> bool:
    kind = numbers.Integral if whole else numbers.Real
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability under the model itself, before temperature, penalties and truncation.

    Attributes:
        token: its id.
        logprob: natural logarithm of its probability.
        top: the most probable (token, logprob) pairs in falling order, as many as `SamplingParams.logprobs`.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(eq=False)
class Request:
    """One prompt on its way; made by `Engine.submit`.

    Attributes:
        number: counts from 0 in the order of submission.
        prompt: token ids.
        params: how to continue it.
        output: tokens generated so far, the stop token included.
        finish_reason: None while it runs; "stop" at a stop token, "length" at the limit, "cancelled".
        prompt_logprobs: of each prompt token but the first, where asked for; filled when the prompt has been read.
        cached_tokens: how many of the prompt's tokens were found in the cache.
    """

    number: int
    prompt: tuple[int, ...]
    params: SamplingParams
    output: list[int] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    prompt_logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    cached_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Event:
    """One step of one request.

    Attributes:
        request: whose; `request.output` already holds the token.
        token: the new token, with its probability where asked for; None where a request ends without one.
        finish_reason: set in a request's last event.
    """

    request: Request
    token: int | None
    logprob: TokenLogprob | None = None
    finish_reason: str | None = None
