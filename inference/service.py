"""The engine in a thread of its own, and what a server asks of it from an event loop.

Commands go one way through a queue, events the other way, one call a step. Nothing else is shared.
"""

import asyncio
import dataclasses
import logging
import queue
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from inference.requests import Event, Request, SamplingParams

LOG = logging.getLogger("inference")


class EngineLike(Protocol):
    """What the service needs of `inference.engine.Engine`."""

    num_rows: int

    @property
    def num_waiting(self) -> int: ...
    @property
    def num_running(self) -> int: ...
    @property
    def is_idle(self) -> bool: ...
    def check(self, prompt: Sequence[int], params: SamplingParams) -> None: ...
    def submit(self, prompt: Sequence[int], params: SamplingParams) -> Request: ...
    def cancel(self, request: Request) -> None: ...
    def step(self) -> list[Event]: ...


class QueueFull(Exception):
    """More requests are open than the service takes."""


class EngineFailed(Exception):
    """The engine's thread has ended with an error."""


@dataclasses.dataclass(eq=False)
class Job:
    """One sequence under way.

    Attributes:
        prompt, params: as `Engine.submit` takes them.
        events: what the engine has said and nobody has read yet; an exception ends it.
        request: the engine's, set by its thread.
        is_over: the last event has been put into `events`.
    """

    prompt: Sequence[int]
    params: SamplingParams
    events: "asyncio.Queue[Event | Exception]" = dataclasses.field(default_factory=asyncio.Queue)
    request: Request | None = None
    is_over: bool = False

    async def read(self) -> AsyncIterator[list[Event]]:
        """Yields the events as they come, those that have come together in one list.

        Raises:
            EngineFailed: there will be no more.
        """
        while True:
            found = [await self.events.get()]
            while not self.events.empty():
                found.append(self.events.get_nowait())
            events = [event for event in found if isinstance(event, Event)]
            if events:
                yield events
            if events and events[-1].finish_reason is not None:
                return
            for event in found:
                if isinstance(event, Exception):
                    raise event


class Service:
    """See the module. Made and used in one event loop.

    Args:
        engine: nobody else uses it from now on.
        max_waiting: sequences that may wait beside those that the engine's rows hold.
    """

    def __init__(self, engine: EngineLike, max_waiting: int):
        self._engine, self.capacity = engine, engine.num_rows + max_waiting
        self.num_open = 0
        self._loop = asyncio.get_running_loop()
        self._commands: queue.SimpleQueue[tuple[str, Job | None]] = queue.SimpleQueue()
        self._jobs: dict[Request, Job] = {}  # the thread's
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the engine runs."""
        return self._thread.is_alive() and self._failure is None

    @property
    def num_running(self) -> int:
        """Sequences that have a row."""
        return self._engine.num_running

    @property
    def num_waiting(self) -> int:
        """Sequences that have none yet."""
        return max(0, self.num_open - self._engine.num_running)

    def submit(self, wanted: Sequence[tuple[Sequence[int], SamplingParams]]) -> list[Job]:
        """Takes sequences in, all or none.

        Args:
            wanted: (prompt, params) of each.

        Raises:
            ValueError: the engine does not take one of them.
            QueueFull: too many are open.
            EngineFailed: it does not run any more.
        """
        if self._failure is not None:
            raise EngineFailed(str(self._failure))
        for prompt, params in wanted:
            self._engine.check(prompt, params)
        if self.num_open + len(wanted) > self.capacity:
            raise QueueFull(
                f"{self.num_open} of {self.capacity} sequences are open, and {len(wanted)} more do not fit"
            )
        jobs = [Job(prompt, params) for prompt, params in wanted]
        self.num_open += len(jobs)
        for job in jobs:
            self._commands.put(("submit", job))
        return jobs

    def cancel(self, job: Job) -> None:
        """Ends a sequence that nobody waits for any more; one that has ended stays as it is."""
        if not job.is_over:
            self._commands.put(("cancel", job))

    async def stop(self) -> None:
        """Ends the thread; what is under way ends with EngineFailed."""
        self._commands.put(("stop", None))
        await asyncio.to_thread(self._thread.join)

    def _serve(self) -> None:
        """The thread."""
        try:
            while self._take_commands():
                events = self._engine.step()
                if events:
                    said = [
                        (self._jobs[event.request], event) for event in events if event.request in self._jobs
                    ]
                    for event in events:
                        if event.finish_reason is not None:
                            self._jobs.pop(event.request, None)
                    self._tell(said)
            failure = EngineFailed("the server is shutting down")
        except Exception as error:  # whatever it is, those who wait must hear of it
            LOG.exception("the engine failed")
            failure = EngineFailed(f"the engine failed: {error}")
        self._failure = failure
        left = list(self._jobs.values())
        while not self._commands.empty():
            kind, job = self._commands.get()
            if kind == "submit" and job is not None:
                left.append(job)
        self._tell([(job, failure) for job in left])

    def _take_commands(self) -> bool:
        """Carries out what has been asked, waiting while there is nothing to do; False ends the thread."""
        while True:
            try:
                kind, job = self._commands.get(block=self._engine.is_idle)
            except queue.Empty:
                return True
            if kind == "stop" or job is None:
                return False
            if kind == "submit":
                job.request = self._engine.submit(job.prompt, job.params)
                self._jobs[job.request] = job
            elif job.request is not None:
                self._engine.cancel(job.request)

    def _tell(self, said: Sequence[tuple[Job, Event | Exception]]) -> None:
        try:
            self._loop.call_soon_threadsafe(self._deliver, said)
        except RuntimeError:  # the loop is closed: nobody is left to hear it
            return

    def _deliver(self, said: Sequence[tuple[Job, Event | Exception]]) -> None:
        """In the event loop."""
        for job, event in said:
            job.events.put_nowait(event)
            if isinstance(event, Exception) or event.finish_reason is not None:
                if not job.is_over:
                    self.num_open -= 1
                job.is_over = True
