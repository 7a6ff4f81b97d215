"""`python -m benchmarks.soak`: minutes of bad luck for the server, after which it must be as it was.

Waves of clients that come all at once, stall, vanish or send nonsense; after each the server must be idle, healthy and
give the first wave's text again, and its memory must not grow from wave to wave. All of it stays on this machine's
loopback address, and ends by itself.
"""

import asyncio
import collections
import contextlib
import dataclasses
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import tyro

from benchmarks.serving import ServerProcess, head, write_checkpoint
from benchmarks.sides import Shape, Worker

SMALL = Shape(vocab_size=1000, n_embd=64, n_layer=2, n_head=2, rotary_dim=8, n_positions=256)
SETTLED_AFTER = 2
"""Waves after which memory has its level."""
GROWTH = 1.05
"""Of memory that is still none."""
STALL = 3.0

BAD_BODIES: dict[bytes, int] = {
    b"{": 400,
    b"\xff\xfe": 400,
    b"[" * 50_000: 400,
    b'{"model": "other", "prompt": "w1"}': 404,
    b'{"model": "model", "prompt": "w1", "max_tokens": -1}': 400,
    b'{"model": "model", "prompt": "w1", "max_tokens": 1000000000}': 400,
    b'{"model": "model", "prompt": ""}': 400,
    b'{"model": "model", "prompt": [1000]}': 400,
    json.dumps({"model": "model", "prompt": [1] * 300}).encode(): 400,
    b'{"model": "model", "prompt": "\\ud800"}': 400,
    b'{"model": "model", "prompt": "' + b"w1 " * 500_000 + b'"}': 413,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The command line."""

    minutes: float = 10.0
    """After which no new wave begins."""
    at_once: int = 500
    """Requests of a wave that come together."""
    bad: int = 20
    """Clients of a wave of each kind that stalls, vanishes or sends nonsense."""
    shape: Shape = SMALL
    """The model."""


def body_of(**fields: Any) -> bytes:
    """A request."""
    return json.dumps(dict(model="model", prompt=[7, 8, 9], temperature=0, ignore_eos=True) | fields).encode()


class Waves:
    """Clients of one server."""

    def __init__(self, port: int, flags: Flags):
        self._port, self._flags = port, flags
        self.answers: collections.Counter[int] = collections.Counter()

    async def ask(self, body: bytes) -> tuple[int, bytes]:
        """One request's status and answer."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        with contextlib.suppress(
            ConnectionError
        ):  # of a body that is too large the server need not read the rest
            writer.write(head(body) + body)
            await writer.drain()
        answer = b""
        with contextlib.suppress(ConnectionError):
            answer = await reader.read()
        writer.close()
        status = int(answer.split(b" ", 2)[1]) if answer else 0
        self.answers[status] += 1
        return status, answer.partition(b"\r\n\r\n")[2]

    async def get(self, path: str) -> str:
        """A page's text."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = (await reader.read()).decode()
        writer.close()
        return answer.partition("\r\n\r\n")[2]

    async def together(self) -> None:
        """Many at once: each is answered, or told to come back."""
        bodies = [
            body_of(prompt=[i % 900 + 1] * (i % 40 + 1), max_tokens=i % 30 + 1, stream=i % 2 == 0)
            for i in range(self._flags.at_once)
        ]
        found = await asyncio.gather(*map(self.ask, bodies))
        statuses = {status for status, _ in found}
        assert statuses <= {200, 429}, statuses

    async def nonsense(self) -> None:
        """Every bad body gets its error object."""
        for body, wanted in BAD_BODIES.items():
            status, answer = await self.ask(body)
            assert status == wanted, (body[:60], status)
            assert json.loads(answer)["error"]["message"]

    async def stall(self, kind: int) -> None:
        """Sends a part of a head or a body, or reads nothing of its answer, until the server drops it."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1024)
        body = body_of(n=8, max_tokens=200, stream=True, logprobs=20)
        sent = [b"POST /v1/comp", head(body), head(body) + body[:20], head(body) + body][kind % 4]
        writer.write(sent)
        if kind % 4 == 3:
            writer.transport.pause_reading()  # pyright: ignore[reportAttributeAccessIssue]
            await asyncio.sleep(3 * STALL)
            writer.transport.abort()
            return
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(10 * STALL):
                await reader.read()
        writer.close()

    async def vanish(self, i: int) -> None:
        """Leaves in the middle of its answer, or before it."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        body = body_of(max_tokens=200, n=1 + i % 3, stream=i % 2 == 0)
        writer.write(head(body) + body)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(reader.read(400), random.Random(i).uniform(0, 1))
        writer.transport.abort()

    async def wave(self) -> str:
        """All of it; returns the text of a plain request after it."""
        kinds = range(self._flags.bad)
        await asyncio.gather(
            self.together(), self.nonsense(), *map(self.stall, kinds), *map(self.vanish, kinds)
        )
        for _ in range(600):
            lines = (await self.get("/metrics")).splitlines()
            if {"flaxtron_sequences_running 0.0", "flaxtron_sequences_waiting 0.0"} <= set(lines):
                break
            await asyncio.sleep(0.1)
        else:
            raise RuntimeError("the server did not become idle")
        assert json.loads(await self.get("/health")) == {"status": "ok"}
        _, answer = await self.ask(body_of(max_tokens=20))
        return json.loads(answer)["choices"][0]["text"]


async def soak(server: ServerProcess, flags: Flags) -> list[float]:
    """Runs the waves; returns the memory after each, in MiB."""
    waves, memory, first = Waves(server.port, flags), [], None
    started = time.monotonic()
    while time.monotonic() - started < 60 * flags.minutes or len(memory) < SETTLED_AFTER + 1:
        text = await waves.wave()
        first = first or text
        if text != first:
            raise RuntimeError(f"the same request got {text!r} after {first!r}")
        memory.append(server.rss())
        minutes = (time.monotonic() - started) / 60
        print(
            f"wave {len(memory)}, {minutes:.1f} min: {memory[-1]:.0f} MiB; answers so far {dict(waves.answers)}",
            flush=True,
        )
    return memory


def run(flags: Flags, side: Any = Worker) -> None:
    """Soaks a server and says how its memory went.

    Raises:
        RuntimeError: it grew, or the server gave another text, or did not end well.
    """
    with tempfile.TemporaryDirectory() as name:
        write_checkpoint(flags.shape, Path(name), side)
        server = ServerProcess(Path(name), "--stall-seconds", STALL, "--max-waiting", 100)
        try:
            memory = asyncio.run(soak(server, flags))
        finally:
            code = server.stop()
    level, last = memory[SETTLED_AFTER - 1], memory[-1]
    print(
        f"memory after wave {SETTLED_AFTER}: {level:.0f} MiB, after wave {len(memory)}: {last:.0f} MiB",
        flush=True,
    )
    if last > GROWTH * level or code:
        raise RuntimeError(f"memory grew from {level:.0f} to {last:.0f} MiB, exit code {code}")


def main() -> None:
    """Reads the flags."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    run(tyro.cli(Flags, prog="python -m benchmarks.soak", description=__doc__))


if __name__ == "__main__":
    main()
