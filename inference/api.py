"""The HTTP side of the server: OpenAI's completions, models, health, metrics and a page to try the model."""

import asyncio
import contextlib
import dataclasses
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from tokenizers import Tokenizer

from inference.calls import Call, SseResponse, unless_gone
from inference.completions import ApiError, ChoiceText, CompletionRequest, as_api_error
from inference.monitoring import Metrics
from inference.service import EngineFailed, EngineLike, QueueFull, Service
from inference.text import encode

LOG = logging.getLogger("inference")
PAGE = Path(__file__).with_name("page.html")
READ_ON = 16
"""A body that is too large is read on to so many times the limit, and dropped: a client that is still sending would
lose the answer."""
LONG_TEXT = 10_000
"""Characters from which a prompt is tokenised in a thread, so that nobody's tokens wait for it."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the server is told.

    Attributes:
        name: of the model, as clients say it.
        eos_ids: tokens that end a text.
        max_waiting: sequences that may wait for a row.
        max_sequences: that one request may ask for.
        max_body: bytes of a request.
        request_seconds: after which a request is given up.
        body_seconds: within which a request's body must have come.
        api_key: that clients must send, or None.
    """

    name: str
    eos_ids: tuple[int, ...] = ()
    max_waiting: int = 256
    max_sequences: int = 64
    max_body: int = 1 << 20
    request_seconds: float = 600.0
    body_seconds: float = 30.0
    api_key: str | None = None


class Server:
    """The routes, and what they share.

    Args:
        engine: that generates.
        tokenizer: of its model.
        settings: see `Settings`.
    """

    def __init__(self, engine: EngineLike, tokenizer: Tokenizer, settings: Settings):
        self.settings, self.metrics, self._tokenizer = settings, Metrics(), tokenizer
        self._vocab_size = tokenizer.get_vocab_size()  # slow: the library copies its vocabulary to count it
        self._engine, self._created = engine, int(time.time())
        self._service: Service | None = None
        self.metrics.watch(
            "sequences_running", "Sequences that are read or generated", lambda: self.service.num_running
        )
        self.metrics.watch(
            "sequences_waiting", "Sequences that wait for a row", lambda: self.service.num_waiting
        )

    @property
    def service(self) -> Service:
        """The engine's thread, while the server runs."""
        assert self._service is not None, "the server has not started"
        return self._service

    def app(self) -> FastAPI:
        """The ASGI application."""

        @contextlib.asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            self._service = Service(self._engine, self.settings.max_waiting)
            yield
            await self._service.stop()

        app = FastAPI(title="flaxtron", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
        app.add_api_route("/v1/completions", self._guarded(self.completions), methods=["POST"])
        app.add_api_route("/v1/models", self._guarded(self.models), methods=["GET"])
        app.add_api_route("/v1/models/{name:path}", self._guarded(self.model), methods=["GET"])
        app.add_api_route("/health", self.health, methods=["GET"])
        app.add_api_route("/metrics", self.exposition, methods=["GET"])
        app.add_api_route("/", self.page, methods=["GET"])
        for status in (404, 405):
            app.add_exception_handler(status, self._wrong_path)
        app.add_middleware(Counted, metrics=self.metrics)
        return app

    def _guarded(
        self, handler: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """A route that asks for the key, and answers errors as OpenAI does."""

        async def answer(request: Request) -> Response:
            try:
                self._check_key(request)
                return await handler(request)
            except ApiError as error:
                return _error(error)

        return answer

    def _check_key(self, request: Request) -> None:
        if self.settings.api_key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode(), self.settings.api_key.encode())
        if scheme.lower() != "bearer" or not same:
            raise ApiError(
                401,
                "the API key is missing or wrong: send Authorization: Bearer KEY",
                None,
                "invalid_api_key",
            )

    async def _wrong_path(self, request: Request, error: Any) -> Response:
        there = "completions are at POST /v1/completions"
        message = f"{request.method} {request.url.path}: {error.detail.lower()}; {there}"
        return _error(ApiError(error.status_code, message, None, "wrong_path"))

    async def page(self) -> Response:
        """A page to try the model on."""
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    async def health(self) -> Response:
        """200 while the engine runs, 503 once it has failed."""
        alive = self.service.is_alive
        return JSONResponse({"status": "ok" if alive else "the engine has failed"}, 200 if alive else 503)

    async def exposition(self) -> Response:
        """Prometheus' text format."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _describe(self) -> dict[str, Any]:
        return {"id": self.settings.name, "object": "model", "created": self._created, "owned_by": "flaxtron"}

    async def models(self, request: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._describe()]})

    async def model(self, request: Request) -> Response:
        """The one model, by name."""
        self._check_model(request.path_params["name"])
        return JSONResponse(self._describe())

    def _check_model(self, name: str) -> None:
        if name != self.settings.name:
            raise ApiError(
                404,
                f"there is no model {name!r}: this server has {self.settings.name!r}",
                "model",
                "model_not_found",
            )

    async def completions(self, request: Request) -> Response:
        """Continues prompts."""
        wanted = CompletionRequest.parse(await self._body(request))
        self._check_model(wanted.model)
        wanted.check(min(self.settings.max_sequences, self.service.capacity))
        prompts = [await self._encode(prompt) for prompt in wanted.prompts()]
        params = wanted.sampling(self.settings.eos_ids)
        try:
            jobs = self.service.submit([(ids, each) for ids, _ in prompts for each in params])
        except ValueError as error:
            raise as_api_error(error) from None
        except QueueFull as error:
            raise ApiError(
                429, f"the server is busy: {error}; try again later", None, "queue_full", "requests"
            ) from None
        except EngineFailed as error:
            raise ApiError(503, str(error), None, "engine_failed", "server_error") from None
        texts = [
            ChoiceText(self._tokenizer, ids, wanted.stops, text if wanted.echo else "", self.settings.eos_ids)
            for ids, text in prompts
            for _ in params
        ]
        call = Call(self.metrics, self.service, self.settings.request_seconds, wanted, jobs, texts)
        self.metrics.prompt_tokens.inc(sum(len(ids) for ids, _ in prompts))
        if wanted.stream:
            return SseResponse(call)
        return await unless_gone(request, call.whole())

    async def _body(self, request: Request) -> bytes:
        body, size, limit = b"", 0, self.settings.max_body
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                async for chunk in request.stream():
                    size += len(chunk)
                    body = body + chunk if size <= limit else b""
                    if size > READ_ON * limit:
                        break
        except TimeoutError:
            raise ApiError(408, "the body did not come in time", None, "timeout") from None
        if size > limit:
            raise ApiError(413, f"the body is larger than {limit} bytes", None, "request_too_large")
        return body

    async def _encode(self, prompt: str | list[int]) -> tuple[list[int], str]:
        """A prompt's tokens and text."""
        if not isinstance(prompt, str):
            ids = [token for token in prompt if 0 <= token < self._vocab_size]
            return prompt, self._tokenizer.decode(ids, skip_special_tokens=False)
        try:
            if len(prompt) < LONG_TEXT:
                return encode(self._tokenizer, prompt), prompt
            return await asyncio.to_thread(encode, self._tokenizer, prompt), prompt
        except ValueError as error:
            raise ApiError(400, str(error), "prompt") from None


class Counted:
    """Middleware that counts answers."""

    def __init__(self, app: Any, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def count(message: Any) -> None:
            if message["type"] == "http.response.start":
                # Not the path, which would make a label of every typing error.
                path = getattr(scope.get("route"), "path", "(none)")
                self._metrics.requests.labels(path=path, code=str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, count if scope["type"] == "http" else send)


def _error(error: ApiError) -> Response:
    headers = {"retry-after": "1"} if error.status in (429, 503) else None
    return JSONResponse(error.body, error.status, headers)
