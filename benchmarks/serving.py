"""`python -m benchmarks.serving`: the server against the bare engine, by tokens a second and the gaps between tokens.

As many clients as the engine has rows each send one request after the other. One side is `python -m inference.serve` in
a process of its own, asked for server-sent events; the other is `inference.Engine` in another, stepped in a loop.
"""

import asyncio
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.checkpoint import Checkpoint
from benchmarks.sides import Shape, Worker


@dataclasses.dataclass(frozen=True)
class Streams:
    """The load.

    Attributes:
        num_streams: clients, and rows of the engine.
        per_stream: requests that each sends, one after the other.
        prompt: shortest and longest prompt, in tokens.
        new: tokens of every answer.
    """

    num_streams: int = 8
    per_stream: int = 3
    prompt: tuple[int, int] = (8, 64)
    new: int = 48

    def prompts(self, vocab_size: int) -> list[list[list[int]]]:
        """Every client's prompts."""
        random = np.random.default_rng(0)
        low, high = self.prompt
        return [
            [
                random.integers(1, vocab_size, random.integers(low, high + 1)).tolist()
                for _ in range(self.per_stream)
            ]
            for _ in range(self.num_streams)
        ]

    @property
    def max_length(self) -> int:
        """Of the engine."""
        return -(-(self.prompt[1] + self.new) // 64) * 64


@dataclasses.dataclass(frozen=True)
class Run:
    """What was measured: seconds in all, and the moments at which each request's tokens came."""

    seconds: float
    moments: list[list[float]]

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return sum(map(len, self.moments)) / self.seconds

    @property
    def gaps(self) -> list[float]:
        """Seconds from each token to the next of its request."""
        return [b - a for moments in self.moments for a, b in zip(moments, moments[1:], strict=False)]


class Bare:
    """The engine's own loop."""

    def __init__(self, folder: Path, streams: Streams):
        import modelzoo
        from inference.engine import Engine

        model, params = modelzoo.from_hf(folder)
        self._engine = Engine(model, params, streams.num_streams, streams.max_length)
        self._engine.warm_up()
        self._streams, self._vocab_size = streams, model.config.vocab_size

    def run(self) -> Run:
        """Everything once."""
        from inference.requests import SamplingParams

        params = SamplingParams(max_new_tokens=self._streams.new, logprobs=0)  # as the clients ask
        queues = [list(prompts) for prompts in self._streams.prompts(self._vocab_size)]
        started, moments, owner = time.perf_counter(), {}, {}

        def send(queue: list[list[int]]) -> None:
            if queue:
                owner[self._engine.submit(queue.pop(0), params)] = queue

        for queue in queues:
            send(queue)
        while not self._engine.is_idle:
            for event in self._engine.step():
                moments.setdefault(event.request, []).append(time.perf_counter())
                if event.finish_reason is not None:
                    send(owner[event.request])
        return Run(time.perf_counter() - started, list(moments.values()))


class ServerProcess:
    """`python -m inference.serve` on a port of its own, of this machine alone.

    Args:
        folder: of the checkpoint.
        flags: more of them.
    """

    def __init__(self, folder: Path, *flags: Any):
        command = [
            sys.executable,
            "-m",
            "inference.serve",
            "--checkpoint",
            folder,
            "--port",
            0,
            "--name",
            "model",
            *flags,
        ]
        self.process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        if found is None:
            raise OSError(f"the server did not start: {line}")
        self.port = int(found[1])

    def rss(self) -> float:
        """MiB that the server's process holds at present."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise OSError("the server's process has ended")

    def stop(self) -> int:
        """Its exit code after SIGTERM."""
        self.process.terminate()
        code = self.process.wait(120)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


def head(body: bytes) -> bytes:
    """A request to /v1/completions up to its body."""
    lines = [
        "POST /v1/completions HTTP/1.1",
        "Host: localhost",
        "Connection: close",
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode()


async def stream(port: int, prompt: Any, new: int) -> list[float]:
    """The moments at which one request's tokens come."""
    asked = dict(
        model="model", prompt=prompt, max_tokens=new, temperature=0, stream=True, ignore_eos=True, logprobs=0
    )
    body, moments = json.dumps(asked).encode(), []
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head(body) + body)
    async for line in reader:
        if line.startswith(b"data: {"):
            choices = json.loads(line[6:])["choices"]
            moments += [time.perf_counter()] * len(choices[0]["logprobs"]["tokens"])
    writer.close()
    return moments


async def all_streams(port: int, prompts: Sequence[Sequence[list[int]]], new: int) -> Run:
    """Everything once, through the server."""
    started = time.perf_counter()

    async def client(mine: Sequence[list[int]]) -> list[list[float]]:
        return [await stream(port, prompt, new) for prompt in mine]

    found = await asyncio.gather(*map(client, prompts))
    return Run(time.perf_counter() - started, [moments for each in found for moments in each])


def summary(name: str, runs: Sequence[Run]) -> str:
    """One side's line."""
    gaps = sorted(gap for run in runs for gap in run.gaps)
    middle, late = statistics.median(gaps), gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))]
    return (
        f"  {name}: {statistics.median(run.rate for run in runs):.1f} tok/s; gap between tokens: median"
        f" {1e3 * middle:.1f} ms, p99 {1e3 * late:.1f} ms = {late / middle:.2f} x"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The command line."""

    shape: Shape = dataclasses.field(default_factory=Shape)
    """The model."""
    streams: Streams = dataclasses.field(default_factory=Streams)
    """The load."""
    rounds: int = 3
    """How often each side runs; medians are taken."""


def run(flags: Flags, side: Any = Worker) -> None:
    """Measures and prints."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(flags.shape, folder, side)
        streams, runs = flags.streams, {"engine": [], "server": []}
        server = ServerProcess(folder, "--rows", streams.num_streams, "--max-length", streams.max_length)
        prompts = streams.prompts(flags.shape.vocab_size)
        try:
            with side(Bare, folder, streams) as bare:
                for i in range(flags.rounds):
                    for turn in list(runs)[:: 1 if i % 2 == 0 else -1]:
                        if turn == "engine":
                            runs[turn].append(bare.call("run")[0])
                        else:
                            runs[turn].append(asyncio.run(all_streams(server.port, prompts, streams.new)))
        finally:
            server.stop()
    share = statistics.median(s.rate / e.rate for s, e in zip(runs["server"], runs["engine"], strict=True))
    print(f"{streams.num_streams} streams of {streams.per_stream} requests, {streams.new} new tokens each")
    for turn, measured in runs.items():
        print(summary(turn, measured))
    print(f"  server / engine = {share:.3f} of the tokens a second", flush=True)


def write_checkpoint(shape: Shape, folder: Path, side: Any = Worker) -> None:
    """A random model, and a tokenizer whose every id is a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    with side(Checkpoint, shape, folder):
        pass
    vocabulary = {f"w{i} ": i for i in range(shape.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0 "))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


def main() -> None:
    """Reads the flags."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    run(tyro.cli(Flags, prog="python -m benchmarks.serving", description=__doc__))


if __name__ == "__main__":
    main()
