"""OpenAI's completions: what a client may ask for, checked, and the text that goes back, cut at stop strings."""

import dataclasses
import json
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError
from tokenizers import Tokenizer

from inference.requests import Event, SamplingParams, TokenLogprob
from inference.text import REPLACEMENT, TextStream

MAX_STOPS = 16
DEFAULT_TOKENS = 16
"""OpenAI's default of max_tokens."""


class ApiError(Exception):
    """An error that goes to the client as OpenAI's error object.

    Args:
        status: of HTTP.
        message: what is wrong, and how to mend it.
        param: the field at fault.
        code: a word for programs.
        kind: OpenAI's type.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
    ):
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`."""

    model_config = ConfigDict(extra="forbid")
    include_usage: StrictBool = False


Number = float
TokenIds = list[StrictInt]


class CompletionRequest(BaseModel):
    """The body of POST /v1/completions: OpenAI's fields, and a few of vLLM's (from `top_k` on)."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: StrictStr
    prompt: StrictStr | TokenIds | list[StrictStr] | list[TokenIds]
    max_tokens: StrictInt | None = Field(default=DEFAULT_TOKENS, ge=0)
    temperature: Number | None = Field(default=1.0, ge=0, le=100)
    top_p: Number | None = Field(default=1.0, gt=0, le=1)
    n: StrictInt | None = Field(default=1, ge=1)
    best_of: StrictInt | None = Field(default=None, ge=1)
    stream: StrictBool | None = False
    stream_options: StreamOptions | None = None
    logprobs: StrictInt | None = Field(default=None, ge=0, le=20)
    echo: StrictBool | None = False
    stop: StrictStr | list[StrictStr] | None = None
    presence_penalty: Number | None = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: Number | None = Field(default=0.0, ge=-2, le=2)
    logit_bias: dict[str, Number] | None = None
    seed: StrictInt | None = Field(default=None, ge=-(2**63), lt=2**63)
    suffix: None = None
    user: StrictStr | None = None

    top_k: StrictInt = Field(default=0, ge=-1)
    min_p: Number = Field(default=0.0, ge=0, le=1)
    repetition_penalty: Number = Field(default=1.0, gt=0, le=100)
    min_tokens: StrictInt = Field(default=0, ge=0)
    stop_token_ids: TokenIds = Field(default=[], max_length=15)
    ignore_eos: StrictBool = False

    @classmethod
    def parse(cls, body: bytes) -> "CompletionRequest":
        """Reads a request's body.

        Raises:
            ApiError: it is no JSON object, or not of these fields.
        """
        try:
            content = json.loads(body.decode())
        except UnicodeDecodeError as error:
            raise ApiError(400, f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
        except RecursionError:
            raise ApiError(400, "the body is not JSON that anybody needs: it is nested too deeply") from None
        except ValueError as error:
            raise ApiError(400, f"the body is not JSON: {error}") from None
        if not isinstance(content, dict):
            raise ApiError(400, f"the body is a JSON {type(content).__name__}, and has to be an object")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise _as_api_error(error) from None

    @property
    def choices(self) -> int:
        """`n`."""
        return self.n or 1

    @property
    def candidates(self) -> int:
        """Sequences to generate for each prompt, of which the best `choices` are returned."""
        return self.best_of or self.choices

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def check(self, max_sequences: int) -> None:
        """What the fields must be to each other.

        Args:
            max_sequences: that one request may ask for.

        Raises:
            ApiError: they do not fit.
        """
        if self.candidates < self.choices:
            raise ApiError(400, f"best_of = {self.best_of} is below n = {self.n}", "best_of")
        if self.stream and self.candidates > self.choices:
            raise ApiError(400, "best_of above n cannot be streamed: the best is known at the end", "best_of")
        if len(self.stops) > MAX_STOPS or not all(self.stops):
            raise ApiError(400, f"stop is a string or up to {MAX_STOPS} strings, none of them empty", "stop")
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "max_tokens = 0 asks for nothing, unless echo is on", "max_tokens")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options goes with stream = true", "stream_options")
        wanted = len(self.prompts()) * self.candidates
        if not wanted:
            raise ApiError(400, "prompt is an empty list", "prompt")
        if wanted > max_sequences:
            raise ApiError(
                400,
                f"{wanted} sequences (prompts x best_of or n) are asked for: at most {max_sequences} fit",
                "n",
            )

    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list, of texts or of token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # pyright: ignore[reportReturnType]
        return list(self.prompt)  # pyright: ignore[reportReturnType, reportArgumentType]

    def sampling(self, eos_ids: tuple[int, ...]) -> list[SamplingParams]:
        """Sampling parameters of a prompt's candidates.

        Args:
            eos_ids: that end a text.

        Raises:
            ApiError: a value is out of range.
        """

        def or_default(name: str) -> Any:
            value = getattr(self, name)
            return type(self).model_fields[name].default if value is None else value

        seed = secrets.randbits(32) if self.seed is None else self.seed
        stops = (*(() if self.ignore_eos else eos_ids), *self.stop_token_ids)
        ranks = self.candidates > self.choices
        try:
            biases = {int(token): value for token, value in (self.logit_bias or {}).items()}
        except ValueError:
            raise ApiError(
                400, "logit_bias has token ids, written as integers, for keys", "logit_bias"
            ) from None
        if not all(-100 <= value <= 100 for value in biases.values()):
            raise ApiError(400, "logit_bias has values from -100 to 100", "logit_bias")
        try:
            return [
                SamplingParams(
                    max_new_tokens=or_default("max_tokens"),
                    min_new_tokens=self.min_tokens,
                    temperature=or_default("temperature"),
                    top_k=max(0, self.top_k),
                    top_p=or_default("top_p"),
                    min_p=self.min_p,
                    repetition_penalty=self.repetition_penalty,
                    frequency_penalty=or_default("frequency_penalty"),
                    presence_penalty=or_default("presence_penalty"),
                    logit_bias=biases,
                    stop_token_ids=stops,
                    seed=seed,
                    sample=sample,
                    logprobs=0 if self.logprobs is None and ranks else self.logprobs,
                    prompt_logprobs=bool(self.echo and self.logprobs is not None),
                )
                for sample in range(self.candidates)
            ]
        except ValueError as error:
            raise as_api_error(error) from None


def as_api_error(error: ValueError) -> ApiError:
    """An error of the engine's checks, whose message begins with the field's name in the engine."""
    names = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "a": "prompt", "the": "prompt"}
    first = str(error).split(maxsplit=1)[0]
    name = names.get(first, first)
    message = str(error).replace(first, name, 1) if first not in ("a", "the") else str(error)
    too_long = "are past the" in message
    return ApiError(400, message, name, "context_length_exceeded" if too_long else None)


def _as_api_error(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False)[0]
    name = str(first["loc"][0]) if first["loc"] else None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"there is no parameter {name!r}", name, "unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{name} is missing", name, "missing_required_parameter")
    if name == "prompt":
        return ApiError(
            400, "prompt is a string, a list of strings, a list of token ids, or a list of those", name
        )
    return ApiError(400, f"{name}: {first['msg'].lower()}", name)


@dataclasses.dataclass
class Delta:
    """What one step adds to a choice: text, and the tokens that it is made of.

    Attributes:
        text: that is certain by now.
        tokens: (token's text, its log-probability, alternatives, where it begins in the choice's text).
        finish_reason: at the end.
    """

    text: str
    tokens: list[tuple[str, float | None, dict[str, float] | None, int]]
    finish_reason: str | None = None


class ChoiceText:
    """One sequence's text so far.

    Args:
        tokenizer: of the tokens.
        prompt: token ids.
        stops: strings that end the text, and are not part of it.
        echoed: the prompt's text, if the choice begins with it.
        eos_ids: tokens that are no text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stops: tuple[str, ...] = (),
        echoed: str = "",
        eos_ids: Sequence[int] = (),
    ):
        self._tokenizer, self._prompt, self._stops = tokenizer, prompt, stops
        self._stream, self._eos_ids = TextStream(tokenizer, prompt), frozenset(eos_ids)
        self._echoed, self._begun = echoed, False
        self._held = ""  # text that may be the beginning of a stop string
        self._tokens: list[tuple[str, float | None, dict[str, float] | None, int]] = []
        self._length = self._offset = 0  # of the text given away, and where the next token begins
        self.sum_logprobs, self.num_tokens, self.is_over = 0.0, 0, False

    def take(self, events: Sequence[Event]) -> Delta:
        """Adds the next events; after a stop string the rest is dropped."""
        text, reason = "", None
        if not self._begun:
            self._begun = True
            text += self._echo(events[0])
        for event in events:
            if self.is_over:
                break
            added = ""
            if event.token is not None:
                self.num_tokens += 1
                if event.logprob is not None:
                    self.sum_logprobs += event.logprob.logprob
                if not (event.finish_reason == "stop" and event.token in self._eos_ids):
                    added = self._stream.push([event.token])
                    self._note(event.token, event.logprob)
            if event.finish_reason is not None:
                added += self._stream.finish() if event.finish_reason != "cancelled" else ""
            given, stopped = self._cut(added, event.finish_reason is not None)
            text += given
            self.is_over = stopped or event.finish_reason is not None
            reason = "stop" if stopped else event.finish_reason
        self._length += len(text)
        return Delta(text, self._release(), reason)

    def _echo(self, first: Event) -> str:
        """The prompt's text, and its tokens' log-probabilities where asked for."""
        if not self._echoed:
            return ""
        if first.request.params.prompt_logprobs:
            self._note(self._prompt[0], None)
            for detail in first.request.prompt_logprobs:
                self._note(detail.token, detail)
        self._offset = len(self._echoed)
        return self._echoed

    def _cut(self, added: str, at_end: bool) -> tuple[str, bool]:
        """(the text that is certain to stand before any stop string, whether one has come)."""
        text = self._held + added
        found = [place for place in map(text.find, self._stops) if place >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = 0 if at_end else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def _note(self, token: int, detail: TokenLogprob | None) -> None:
        text = show_token(self._tokenizer, token)
        top = None
        if detail is not None:
            # Two tokens may look the same: the more probable comes first, and stays.
            top = {}
            for other, logprob in (*detail.top, (token, detail.logprob)):
                top.setdefault(show_token(self._tokenizer, other), logprob)
        self._tokens.append((text, None if detail is None else detail.logprob, top, self._offset))
        self._offset += 0 if text.startswith("bytes:") else len(text)

    def _release(self) -> list[tuple[str, float | None, dict[str, float] | None, int]]:
        """Tokens whose text is given away; those of a stop string never are."""
        count = len(self._tokens)
        if self._stops:
            count = sum(offset < self._length for *_, offset in self._tokens)
        released, self._tokens = self._tokens[:count], self._tokens[count:]
        return released


def _overlap(text: str, stop: str) -> int:
    """How many of a text's last characters may be the first of a stop string."""
    return next(
        (size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0
    )


def show_token(tokenizer: Tokenizer, token: int) -> str:
    """A token by itself: its text, or where that is no whole character what the vocabulary writes for it."""
    text = tokenizer.decode([token], skip_special_tokens=False)
    if REPLACEMENT in text or not text:
        return f"bytes:{tokenizer.id_to_token(token)}"
    return text


def choice_body(index: int, delta: Delta, with_logprobs: bool) -> dict[str, Any]:
    """One choice, whole or a part of a stream, as OpenAI writes it."""
    logprobs = None
    if with_logprobs:
        columns: Callable[[int], list[Any]] = lambda i: [token[i] for token in delta.tokens]  # noqa: E731
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        logprobs = {name: columns(i) for i, name in enumerate(names)}
    return {"index": index, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish_reason}
