"""Clients that stall are dropped; clients that wait for a slow answer are not."""

import asyncio
import contextlib

import pytest
import uvicorn

from inference.watchdog import watching

STALL = 0.2


async def app(scope, receive, send):
    if scope["path"] == "/slow":
        await asyncio.sleep(3 * STALL)
    if scope["path"] == "/body":
        while (await receive()).get("more_body"):
            pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == "/endless":
        for _ in range(100_000):  # far more than any buffer on the way holds
            await send({"type": "http.response.body", "body": b"x" * 10_000, "more_body": True})
    await send({"type": "http.response.body", "body": b"done"})


@contextlib.asynccontextmanager
async def serving():
    config = uvicorn.Config(
        app, port=0, http=watching(STALL), log_level="critical", lifespan="off", ws="none"
    )
    server = uvicorn.Server(config)
    config.load()
    running = asyncio.create_task(server._serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield server
    server.should_exit = True
    await running


async def until_dropped(server, sent, read):
    """Sends, reads on or not, and waits for the end of the connection."""
    port = server.servers[0].sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    answer = b""
    if read:
        with contextlib.suppress(ConnectionResetError):
            while part := await reader.read(100_000):
                answer += part
    else:
        while server.server_state.connections:
            await asyncio.sleep(0.02)
    writer.close()
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        await writer.wait_closed()
    return answer


@pytest.mark.parametrize(
    ("sent", "read", "begins"),
    [
        (b"", True, b""),
        (b"GET / HT", True, b""),
        (b"POST /body HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nabc", True, b""),
        (b"GET /endless HTTP/1.1\r\nHost: a\r\n\r\n", False, b""),
        (b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n", True, b"HTTP/1.1 200 OK"),
    ],
    ids=["silent", "head", "body", "reads nothing", "waits"],
)
def test_stalled_connections_are_dropped(sent, read, begins):
    async def inside():
        async with serving() as server:
            answer = await asyncio.wait_for(until_dropped(server, sent, read), 20)
            assert answer[: len(begins) or None] == begins
            for _ in range(100):
                if not server.server_state.connections:
                    break
                await asyncio.sleep(0.02)
            assert not server.server_state.connections

    asyncio.run(inside())
