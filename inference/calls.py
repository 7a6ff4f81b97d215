"""One request to /v1/completions: from the engine's events to what the client reads, whole or as a stream."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from inference.completions import ApiError, ChoiceText, CompletionRequest, Delta, choice_body
from inference.monitoring import Metrics
from inference.requests import Event
from inference.service import EngineFailed, Job, Service


class Call:
    """One request to /v1/completions that has been let in.

    Args:
        metrics: to keep.
        service: that runs the jobs.
        seconds: after which the request is given up.
        wanted: what it asks for.
        jobs: its sequences, each prompt's candidates together.
        texts: of each.
    """

    def __init__(
        self,
        metrics: Metrics,
        service: Service,
        seconds: float,
        wanted: CompletionRequest,
        jobs: Sequence[Job],
        texts: Sequence[ChoiceText],
    ):
        self._metrics, self._service, self._seconds = metrics, service, seconds
        self.wanted, self._jobs, self._texts = wanted, jobs, texts
        self._head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": wanted.model}
        self._started = time.perf_counter()
        self._times: dict[Job, float] = {}

    async def whole(self) -> Response:
        """The answer in one piece."""
        try:
            async with asyncio.timeout(self._seconds):
                parts = await asyncio.gather(*(self._all(i) for i in range(len(self._jobs))))
        except TimeoutError:
            raise self._too_late() from None
        except EngineFailed as error:
            raise ApiError(503, str(error), None, "engine_failed", "server_error") from None
        finally:
            self.cancel()
        with_logprobs, best = self.wanted.logprobs is not None, []
        for first in range(0, len(parts), self.wanted.candidates):
            group = range(first, first + self.wanted.candidates)
            ranked = sorted(
                group, key=lambda i: -self._texts[i].sum_logprobs / max(1, self._texts[i].num_tokens)
            )
            best += ranked[: self.wanted.choices] if self.wanted.candidates > self.wanted.choices else group
        choices = [choice_body(place, parts[i], with_logprobs) for place, i in enumerate(best)]
        return JSONResponse(
            {**self._head, "object": "text_completion", "choices": choices, "usage": self._usage()}
        )

    async def _all(self, i: int) -> Delta:
        whole = Delta("", [])
        async for delta in self._deltas(i):
            whole = Delta(whole.text + delta.text, whole.tokens + delta.tokens, delta.finish_reason)
        return whole

    async def _deltas(self, i: int) -> AsyncIterator[Delta]:
        job, text = self._jobs[i], self._texts[i]
        async for events in job.read():
            self._measure(job, events)
            delta = text.take(events)
            if delta.finish_reason is not None:
                self._metrics.finished.labels(reason=delta.finish_reason).inc()
            yield delta
            if text.is_over:
                self._service.cancel(job)  # a stop string may end it before the engine does
                return

    async def stream(self) -> AsyncIterator[bytes]:
        """The answer in server-sent events."""
        merged: asyncio.Queue[tuple[int, Delta] | Exception | None] = asyncio.Queue()

        async def follow(i: int) -> None:
            try:
                async for delta in self._deltas(i):
                    merged.put_nowait((i, delta))
                merged.put_nowait(None)
            except EngineFailed as error:
                merged.put_nowait(error)

        followers = [asyncio.create_task(follow(i)) for i in range(len(self._jobs))]
        with_logprobs, left = self.wanted.logprobs is not None, len(followers)
        options = self.wanted.stream_options
        with_usage = options is not None and options.include_usage
        try:
            while left:
                # Not asyncio.timeout, which would also interrupt what happens between two of this generator's steps.
                found = await asyncio.wait_for(
                    merged.get(), self._started + self._seconds - time.perf_counter()
                )
                if found is None:
                    left -= 1
                    continue
                if isinstance(found, Exception):
                    raise ApiError(503, str(found), None, "engine_failed", "server_error")
                i, delta = found
                if delta.text or delta.tokens or delta.finish_reason:
                    yield self._event(
                        [choice_body(i, delta, with_logprobs)], {"usage": None} if with_usage else {}
                    )
            if with_usage:
                yield self._event([], {"usage": self._usage()})
        except TimeoutError:
            yield _sse(self._too_late().body)
        except ApiError as error:
            yield _sse(error.body)
        finally:
            for follower in followers:
                follower.cancel()
            self.cancel()
        yield b"data: [DONE]\n\n"

    def cancel(self) -> None:
        """Ends whatever has not ended."""
        for job, text in zip(self._jobs, self._texts, strict=True):
            self._service.cancel(job)
            if not text.is_over:
                text.is_over = True
                self._metrics.finished.labels(reason="cancelled").inc()

    def _event(self, choices: list[dict[str, Any]], more: dict[str, Any]) -> bytes:
        return _sse({**self._head, "object": "text_completion", "choices": choices, **more})

    def _usage(self) -> dict[str, Any]:
        prompts = [len(job.prompt) for job in self._jobs[:: self.wanted.candidates]]
        new = sum(text.num_tokens for text in self._texts)
        cached = sum(
            job.request.cached_tokens for job in self._jobs[:: self.wanted.candidates] if job.request
        )
        return {
            "prompt_tokens": sum(prompts),
            "completion_tokens": new,
            "total_tokens": sum(prompts) + new,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _too_late(self) -> ApiError:
        seconds = self._seconds
        return ApiError(504, f"the request took longer than {seconds:g} s", None, "timeout", "server_error")

    def _measure(self, job: Job, events: Sequence[Event]) -> None:
        metrics, now = self._metrics, time.perf_counter()
        count = sum(event.token is not None for event in events)
        metrics.new_tokens.inc(count)
        if job not in self._times:
            metrics.first_token.observe(now - self._started)
            metrics.cached_tokens.inc(events[0].request.cached_tokens)
            count -= 1
        for _ in range(count):
            metrics.gap.observe((now - self._times.get(job, now)) / count)
        self._times[job] = now
        if events[-1].finish_reason is not None:
            metrics.whole.observe(now - self._started)


class SseResponse(StreamingResponse):
    """A stream of server-sent events that ends its generation when the client leaves."""

    def __init__(self, call: Call):
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(call.stream(), media_type="text/event-stream", headers=headers)
        self._call = call

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._call.cancel()


async def unless_gone(request: Request, answer: Awaitable[Response]) -> Response:
    """The answer, given up when the client leaves before it is there."""
    working = asyncio.ensure_future(answer)

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    leaving = asyncio.ensure_future(leave())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        return Response(status_code=499)  # nobody reads it
    finally:
        working.cancel()
        leaving.cancel()


def _sse(content: Any) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
