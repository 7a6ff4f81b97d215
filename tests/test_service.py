"""The engine's thread: requests in, events out, and nobody left waiting when something goes wrong."""

import asyncio

import pytest

from inference.requests import SamplingParams
from inference.service import EngineFailed, QueueFull, Service
from tests.fake_engine import FakeEngine


async def tokens(job):
    found = []
    async for events in job.read():
        found += [(event.token, event.finish_reason) for event in events]
    return found


def run(test, engine=None, max_waiting=8):
    async def inside():
        service = Service(engine or FakeEngine(), max_waiting)
        try:
            return await asyncio.wait_for(test(service), 30)
        finally:
            await service.stop()

    return asyncio.run(inside())


def submit(service, *prompts, new=4):
    return service.submit([(prompt, SamplingParams(max_new_tokens=new)) for prompt in prompts])


def test_every_request_gets_its_own_events():
    async def test(service):
        jobs = submit(service, [1, 2], [3], [4, 5, 6])
        assert service.num_open == 3
        found = await asyncio.gather(*map(tokens, jobs))
        assert service.num_open == service.num_running == service.num_waiting == 0
        return found

    first, second, third = run(test)
    assert [token for token, _ in first] == [1, 2, 1, 2]
    assert second == [(3, None)] * 3 + [(3, "length")]
    assert [token for token, _ in third] == [4, 5, 6, 4]


def test_more_than_the_queue_holds_are_refused_all_at_once():
    async def test(service):
        jobs = submit(service, *[[1]] * 4)
        with pytest.raises(QueueFull, match="4 of 5 sequences are open, and 2 more do not fit"):
            submit(service, [1], [1])
        assert service.num_open == 4
        await asyncio.gather(*map(tokens, jobs))
        submit(service, *[[1]] * 5)

    run(test, max_waiting=3)


def test_what_the_engine_refuses_is_never_let_in():
    async def test(service):
        with pytest.raises(ValueError, match="the prompt is empty"):
            submit(service, [1], [])
        assert service.num_open == 0

    run(test)


def test_cancelling_frees_the_place():
    engine = FakeEngine(num_rows=1, seconds=0.001)

    async def test(service):
        running, waiting = submit(service, [1], [2], new=10**6)
        async for _ in running.read():
            break
        for job in (waiting, running, running):
            service.cancel(job)
        assert (await tokens(waiting))[-1] == (None, "cancelled")
        assert (await tokens(running))[-1] == (None, "cancelled")
        service.cancel(running)
        assert service.num_open == 0

    engine.max_length = 10**7
    run(test, engine)
    assert engine.is_idle


def test_a_failure_reaches_everybody_who_waits():
    engine = FakeEngine(seconds=0.001)
    engine.max_length = 10**7

    async def test(service):
        jobs = submit(service, [1], [2], [3], new=10**6)
        async for _ in jobs[0].read():
            break
        assert service.is_alive
        engine.failure = RuntimeError("no memory")
        for job in jobs:
            with pytest.raises(EngineFailed, match="no memory"):
                await tokens(job)
        assert not service.is_alive
        assert service.num_open == 0
        with pytest.raises(EngineFailed, match="no memory"):
            submit(service, [1])

    run(test, engine)


def test_stopping_ends_what_is_under_way():
    engine = FakeEngine(seconds=0.001)
    engine.max_length = 10**7

    async def test(service):
        (job,) = submit(service, [1], new=10**6)
        await service.stop()
        with pytest.raises(EngineFailed, match="shutting down"):
            await tokens(job)

    run(test, engine)
